"""`xdino submit`: a run or another command on a SLURM cluster, as a small script that sbatch takes.

One task a GPU; the tasks find each other by what SLURM tells each (`rendezvous.from_slurm`). Before
its time is up, or when another job takes its place, they are asked to stop: they save the run and
end with 75, and the script puts the same job into the queue again. So it goes on until it is done.
"""

import contextlib
import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xdino import config as configuration
from xdino.errors import RunFailed, UsageError, world
from xdino.run_directory import RunDirectory
from xdino.runtime.atomic import write_text

# Scripts and configurations are read by the cluster's nodes: everything is written out in full.
SCRIPT = """\
#!/bin/bash
# Written by `xdino submit`, which handed it over as
#   {command}
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:={threads}}}" PYTHONUNBUFFERED=1
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR  # of the shell that submitted; SLURM tells each task
{setup}
# Of an array, the number of its first job stands for all of them.
job=$SLURM_JOB_ID
[ -z "${{SLURM_ARRAY_TASK_ID:-}}" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID

# Where the tasks meet: a port that nobody listens at, at every start another.
for try in {{0..99}}; do
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 101 + ${{SLURM_RESTART_COUNT:-0}} * 13 + try) % 20000))
    taken=no
    for host in 127.0.0.1 "$(hostname)"; do
        (exec 3<>"/dev/tcp/$host/$MASTER_PORT") 2>/dev/null && taken=yes
    done
    [ $taken = no ] && break
done
export MASTER_PORT

# SIGUSR1: the time is nearly up, and srun tells every task. SIGTERM: SLURM ends the job and tells
# the tasks itself; this script outlives them, to see how they ended.
asked=no step=
trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
trap : TERM
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" {program} &
step=$!
[ $asked = no ] || kill -USR1 "$step"
while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done

# 75: stopped, and the run is saved. Killed by a signal: asked to stop before it could listen.
facts=" $(scontrol --oneliner show job "$job") "
[[ $facts =~ " PreemptTime="[0-9] || $facts == *" Reason=TimeLimit "* ]] && asked=yes
[ $code -eq 75 ] || [[ $code -gt 128 && $asked = yes ]] || exit $code
# What was cancelled stays so, and what was requeued by others is in the queue already.
[[ $facts == *" JobState=RUNNING "* || $facts == *" Reason=TimeLimit "* ]] || exit $code
{bound}scontrol requeue "$job" || echo "could not be queued again: submit the run again" >&2
exit $code
"""
BOUND = """\
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {most} ]; then
    echo "stopped, and started {most} times again already: submit the run again to continue it" >&2
    exit $code
fi
"""
_TASK = "\0"  # in a word: the number of an array's task


@dataclass(frozen=True)
class Resources:
    """What the job asks of the cluster.

    Args:
        tasks_per_node: processes; None for one a GPU, or one without GPUs.
        minutes: of one start; the job is queued again until the run is done.
        warning: seconds before the end of its time at which the run is asked to save; None for two
            minutes, or a sixth of a time that is short.
        setup: lines of shell that the job's script runs first: modules, an environment.
        max_requeues: how often the script queues the job again at most; None for as often as it takes.
        extra: more of sbatch's options, {"account": "..."}; they win.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    tasks_per_node: int | None = None
    cpus_per_task: int = 10
    minutes: int = 24 * 60
    warning: int | None = None
    max_requeues: int | None = None
    setup: tuple[str, ...] = ()
    partition: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise UsageError(
                f"tasks per node is {self.tasks_per_node}, and GPUs per node {self.gpus_per_node}: "
                "each task takes one GPU; --gpus-per-node 0 is for CPUs"
            )
        if self.seconds_to_save >= self.minutes * 60:
            raise UsageError(
                f"a warning {self.warning} s before the end leaves nothing of "
                f"{self.minutes} minutes: shorten --warning or raise --hours"
            )
        for key, value in self.extra.items():
            if not re.fullmatch(r"[a-z][a-z-]*", key):
                raise UsageError(
                    f'"{key}" is no option of sbatch: --slurm account=NAME and the like'
                )
            if key == "array":
                raise UsageError(
                    "a run is one job: submit every run by itself instead of an array, or one recipe "
                    "with several seeds by --seeds 0-4"
                )
            if not value.isprintable():
                raise UsageError(f"--slurm {key} holds characters that do not print")
        for line in self.setup:
            if not line.replace("\t", " ").isprintable():
                raise UsageError(
                    "--setup takes one line of shell; say it again for each further line"
                )

    @property
    def tasks(self) -> int:
        """Processes of the job."""
        return self.nodes * (self.tasks_per_node or max(self.gpus_per_node, 1))

    @property
    def seconds_to_save(self) -> int:
        return min(120, self.minutes * 10) if self.warning is None else self.warning

    def options(self) -> list[str]:
        """As sbatch takes them."""
        asked = {
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks // self.nodes,
            "cpus-per-task": self.cpus_per_task,
            "time": self.minutes,
            "signal": f"B:USR1@{self.seconds_to_save}",
            "gres": f"gpu:{self.gpus_per_node}" if self.gpus_per_node else None,
            "partition": self.partition,
            **self.extra,
        }
        given = [f"--{key}={value}" for key, value in asked.items() if value is not None]
        return ["--requeue", "--open-mode=append", *given]


def whole_minutes(hours: float) -> int:
    """SLURM's unit of time, rounded up.

    Raises:
        UsageError: less than a minute, which SLURM takes for no limit at all.
    """
    minutes = hours * 60
    if not 1 <= minutes <= 60 * 24 * 366:
        raise UsageError(f"--hours {hours:g}: SLURM counts in minutes, from one (0.017) to a year")
    return math.ceil(minutes - 1e-9)


def submit(
    config: Any, run_dir: str | Path, resources: Resources, seeds: Sequence[int] = ()
) -> str:
    """Queue the run; returns the job's number.

    Script, configuration and logs go to `RUN-slurm/` beside the run. The job reads the
    configuration as it is now, whatever becomes of the recipe.

    Args:
        config: of any kind of recipe.
        seeds: instead of one run in `run_dir` one for each, in its folders seed0, seed1, ...: an array.

    Raises:
        UsageError: there is no SLURM here, SLURM refuses the job, or the folder holds another run.
        RunFailed: SLURM does not answer, or the files cannot be written.
    """
    run = _checked(run_dir)
    if not getattr(config.data, "named", config.data.path):
        raise UsageError("data.path is not set: name the images with --data.path FOLDER")
    wanted = {"": config}
    if seeds:
        wanted = {
            f"seed{seed}": replace(config, train=replace(config.train, seed=seed)) for seed in seeds
        }
    texts = {
        name: configuration.to_yaml(RunDirectory(run / name).resolve(each))
        for name, each in wanted.items()
    }
    # By its content: a job that waits in the queue keeps its own when the run is submitted anew.
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:12]
    logs, part = logs_of(run), "-" if seeds else ""
    recipes = {logs / f"{digest}{part}{name}.yaml": text for name, text in texts.items()}
    if seeds:
        place, recipe = f"{run}/seed{_TASK}", f"{logs}/{digest}-seed{_TASK}.yaml"
    else:
        place, (recipe,) = str(run), map(str, recipes)
    words = [config.kind, recipe, "--run-dir", place]
    return _queue(run, digest, recipes, words, resources, seeds)


def submit_command(words: Sequence[str], run_dir: str | Path, resources: Resources) -> str:
    """Queue `xdino WORDS` as one task; returns the job's number. Log and script go to `RUN-slurm/`.

    Raises:
        UsageError, RunFailed: as `submit`.
    """
    run = _checked(run_dir)
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
    return _queue(run, digest, {}, words, resources)


def _checked(run_dir: str | Path) -> Path:
    run = Path(os.path.abspath(run_dir))
    if not str(run).isprintable():
        raise UsageError(f"--run {str(run)!r} holds characters that a script cannot")
    if shutil.which("sbatch") is None:
        raise UsageError(
            "there is no SLURM here (no sbatch on the PATH): `xdino pretrain` trains on this machine, "
            "and `--cluster local` tries out what would be submitted, as one process"
        )
    return run


def _queue(
    run: Path,
    name: str,
    files: Mapping[Path, str],
    words: Sequence[str],
    resources: Resources,
    seeds: Sequence[int] = (),
) -> str:
    """Write the files and the script `name` that runs `xdino WORDS`, and hand it over."""
    logs = logs_of(run)
    script, log = logs / f"{name}.sh", "%A_%a.log" if seeds else "%j.log"
    command = ["sbatch", "--parsable", *resources.options(), f"--job-name={run.name}"]
    command += [f"--array={','.join(map(str, seeds))}"] if seeds else []
    command += [f"--output={str(logs).replace('%', '%%')}/{log}", f"--chdir={os.getcwd()}"]
    with _removed_where_refused(*reversed(logs.parents), logs, *files, script):
        with world(f"write {logs}"):
            logs.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            write_text(path, text)
        write_text(script, job_script([*command, str(script)], words, resources))
        return _handed_over([*command, str(script)])


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0-2,7" -> (0, 1, 2, 7), as SLURM writes arrays.

    Raises:
        UsageError: no such list, or more than a thousand.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if found is None or int(found[2] or found[1]) - int(found[1]) not in range(1_000):
            raise UsageError(f'--seeds takes numbers as in 0-4 or 0,3,7, got "{text}"')
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    if len(set(seeds)) != len(seeds) or len(seeds) > 1_000:
        raise UsageError(f"--seeds {text}: a thousand different ones at most")
    return tuple(seeds)


def logs_of(run_dir: str | Path) -> Path:
    """Where script, configuration and logs of a run lie, in full."""
    run = Path(os.path.abspath(run_dir))
    return run.with_name(f"{run.name}-slurm")


def how_to_go_on(
    job: str, run_dir: str | Path, cluster: str | None = None, array: bool = False
) -> str:
    """What a person types next: to look, to follow, to cancel; `cluster`: of several, which."""
    logs = logs_of(run_dir)
    where = f" --clusters={shlex.quote(cluster)}" if cluster else ""
    log = f"{shlex.quote(f'{logs}/{job}')}_*.log" if array else shlex.quote(f"{logs}/{job}.log")
    lines = [
        ("logs", str(logs)),
        ("follow", f"tail -F {log}"),
        ("state", f"squeue{where} --job={job}"),
        ("cancel", f"scancel{where} {job}"),
    ]
    return "\n".join(f"{name:<8}{what}" for name, what in lines)


@contextlib.contextmanager
def _removed_where_refused(*paths: Path) -> Iterator[None]:
    """Take away again what the block made of `paths`, parents first, where it fails.

    What was there before stays, a folder with anything else in it too, and all of it where SLURM
    may have queued the job without saying so: it would read its configuration.
    """
    new = [path for path in paths if not path.exists()]
    try:
        yield
    except (UsageError, RunFailed) as error:
        for path in () if "timed out" in str(error) else reversed(new):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def job_script(command: list[str], words: Sequence[str], resources: Resources) -> str:
    """What the first node runs: `xdino WORDS` on all."""
    program = [sys.executable, "-m", "xdino_launch", *words]
    most = resources.max_requeues
    return SCRIPT.format(
        command=shlex.join(command),
        threads=resources.cpus_per_task,
        setup="".join(f"{line}\n" for line in resources.setup),
        program=" ".join(map(_quoted, program)),
        bound="" if most is None else BOUND.format(most=most),
    )


def _quoted(word: str) -> str:
    """For the shell; the number of an array's task is filled in there."""
    around = [shlex.quote(part) if part else "" for part in word.split(_TASK)]
    return '"$SLURM_ARRAY_TASK_ID"'.join(around) if len(around) > 1 else shlex.quote(word)


def _handed_over(command: list[str]) -> str:
    # Of an allocation that this runs in, the new job must not inherit anything.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    with world("run sbatch"):
        done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    told = " ".join(done.stderr.replace("sbatch: error:", " ").split())
    if done.returncode and re.search(r"contact|connect|timed out|munge", told, re.IGNORECASE):
        raise RunFailed(f"SLURM does not answer: {told}")
    if done.returncode:
        raise UsageError(f"SLURM refuses the job: {told or f'sbatch ended with {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]
