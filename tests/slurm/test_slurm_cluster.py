"""`xdino submit` and the documented batch script on a real SLURM: stopped in every way that there is,
with one and with two tasks, a run ends in the bytes of one that was left alone.

What SLURM itself says of every job is printed: pytest -s.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino import checkpoint

from .cluster import Cluster, missing, until

ROOT = Path(__file__).parents[2]
STEPS = 20

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=missing() or "there is a SLURM"),
]

# A step takes as long on every machine, and a signal always comes in the middle of the run.
SLOWLY = """\
import importlib.abc, importlib.util, os, sys, time

class Slowly(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "xdino.learner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            finish = module.Learner.finish

            def slow_finish(*given, **named):
                time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
                return finish(*given, **named)

            module.Learner.finish = slow_finish

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Slowly())
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(4 * STEPS):
        pixels = generator.integers(0, 255, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


class Runs:
    """Submits runs of `tasks` processes, and asks SLURM how they are."""

    def __init__(self, cluster: Cluster, images: Path, folder: Path, tasks: int) -> None:
        self.cluster, self.folder, self.tasks = cluster, folder, tasks
        (folder / "sitecustomize.py").write_text(SLOWLY)
        small = {
            "data.path": images, "train.epochs": 1, "train.batch_size": 4 // tasks,
            "evaluate.every": 0, "model.drop_path": 0.1, "crops.mean": "null", "crops.std": "null",
            "crops.global_size": 12, "crops.local_size": 8, "runtime.workers": 1,
            "runtime.device": "cpu", "runtime.log_every": 1, "runtime.checkpoint_every": 1000,
        }  # fmt: skip
        self.options = [part for key, value in small.items() for part in (f"--{key}", str(value))]

    def environment(self, step_seconds: float) -> dict[str, str]:
        paths = [self.folder, *(ROOT / root for root in ("ssl", "eval", "launch"))]
        return self.cluster.environment | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "STEP_SECONDS": str(step_seconds),
            "OMP_NUM_THREADS": "1",  # as `submit` has it: sums in the same order
        }

    def submit(
        self, run: Path, step_seconds: float, hours: float = 1, more: Sequence[str] = ()
    ) -> str:
        """A job of `normal` by `xdino submit`; its number."""
        command = [sys.executable, "-m", "xdino_launch", "submit", "debug", "--run", str(run)]
        command += ["--gpus-per-node", "0", "--tasks-per-node", str(self.tasks)]
        command += ["--cpus-per-task", "1", "--hours", str(hours), *more, *self.options]
        done = subprocess.run(
            command, env=self.environment(step_seconds), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fact(self, job: str, name: str) -> str:
        told = self.cluster.ask("scontrol", "--oneliner", "show", "job", job)
        found = re.search(rf" {name}=(\S+)", told)
        return found.group(1) if found else told

    def state(self, job: str) -> str:
        return self.fact(job, "JobState")

    def until_trained(self, job: str, run: Path, iteration: int) -> None:
        def trained() -> bool:
            assert self.state(job) in ("PENDING", "RUNNING", "CONFIGURING"), self.log(run)
            return rows(run)[-1:] >= [iteration]

        until(trained, f"iteration {iteration} of job {job}", 120)

    def until_over(self, job: str, run: Path, seconds: float = 200) -> str:
        """Its last state, and a print of what SLURM says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.state(job) in over, f"the end of job {job}", seconds)
        told = self.cluster.ask("scontrol", "--oneliner", "show", "job", job)
        facts = re.findall(r" (?:JobState|Reason|Restarts|ExitCode|RunTime|TimeLimit)=\S+", told)
        print(f"\n{run.name}, {self.tasks} tasks: scontrol:{''.join(facts)}")
        if self.cluster.accounted:
            columns = "--format=JobID,Partition,NTasks,State,ExitCode,Start,End"
            print(self.cluster.ask("sacct", "--duplicates", "--jobs", job, columns))
        return self.state(job)

    def starts(self, job: str) -> list[str]:
        """What the accounting says of every start of the job."""
        command = ("sacct", "--duplicates", "-XnP", "--jobs", job, "--format=State")
        return [line.split()[0] for line in self.cluster.ask(*command).splitlines() if line]

    def log(self, run: Path) -> str:
        logs = run.with_name(f"{run.name}-slurm").glob("*.log")
        return "\n".join(log.read_text() for log in logs)


def rows(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines if line.endswith("\n")]


def resumed_at(run: Path) -> list[int]:
    starts = json.loads((run / "environment.json").read_text())["starts"]
    return [start["iteration"] for start in starts]


@pytest.fixture(scope="module", params=[1, 2], ids=["one task", "two tasks"])
def runs(request, cluster, images, tmp_path_factory):
    return Runs(cluster, images, tmp_path_factory.mktemp("runs"), request.param)


#: What one task cannot show, or shows alike.
two_tasks = pytest.mark.parametrize("runs", [2], ids=["two tasks"], indirect=True)


@pytest.fixture(scope="module")
def left_alone(runs):
    """The backbone of a run that nothing disturbed; its job is not queued again."""
    run = runs.folder / "left-alone"
    job = runs.submit(run, 0)
    assert runs.until_over(job, run) == "COMPLETED", runs.log(run)
    assert runs.fact(job, "Restarts") == "0"
    assert rows(run) == list(range(1, STEPS + 1))
    return checkpoint.sha256(run / "backbone.safetensors")


def held(runs: Runs, run: Path, left_alone: str) -> None:
    """The run ended as if nothing had been, and a part of it was saved by a signal alone."""
    assert checkpoint.sha256(run / "backbone.safetensors") == left_alone
    assert rows(run) == list(range(1, STEPS + 1))
    starts = resumed_at(run)
    assert starts == sorted(starts)
    assert starts[0] == 0 < starts[-1] < STEPS, starts


def test_the_time_limit(runs, left_alone):
    run = runs.folder / "time-limit"
    job = runs.submit(run, 2.5, hours=1 / 60)
    assert runs.until_over(job, run, 400) == "COMPLETED", runs.log(run)
    held(runs, run, left_alone)
    # A warning that comes when the run is done makes one more start, which leaves it alone.
    assert int(runs.fact(job, "Restarts")) >= len(resumed_at(run)) - 1
    if runs.cluster.accounted:
        assert set(runs.starts(job)[:-1]) == {"REQUEUED"}


@pytest.mark.parametrize("runs", [1], ids=["one task"], indirect=True)
def test_seeds_are_an_array_whose_jobs_go_back_by_themselves(runs, left_alone):
    run = runs.folder / "seeds"
    more = ["--seeds", "0-1", "--setup", 'echo "set up: $SLURM_ARRAY_TASK_ID"']
    job = runs.submit(run, 0.5, more=more)
    until(lambda: rows(run / "seed1")[-1:] >= [3], f"iteration 3 of job {job}_1", 120)
    runs.cluster.ask("scancel", "--batch", "--signal=USR1", f"{job}_1")
    over = ("COMPLETED", "FAILED", "CANCELLED")
    for seed in (0, 1):
        until(lambda s=seed: runs.state(f"{job}_{s}") in over, f"the end of {job}_{seed}", 200)
        assert runs.state(f"{job}_{seed}") == "COMPLETED", runs.log(run)
        assert rows(run / f"seed{seed}") == list(range(1, STEPS + 1))
        assert f"set up: {seed}" in runs.log(run)
    # Seed 0 is the run of the recipe as it stands; its neighbour alone was stopped and went on.
    assert checkpoint.sha256(run / "seed0" / "backbone.safetensors") == left_alone
    assert checkpoint.sha256(run / "seed1" / "backbone.safetensors") != left_alone
    assert resumed_at(run / "seed0") == [0]
    assert len(resumed_at(run / "seed1")) == 2


@pytest.mark.parametrize("runs", [1], ids=["one task"], indirect=True)
def test_another_command_is_a_job(runs, left_alone, tmp_path):
    run, out = runs.folder / "left-alone", tmp_path / "features.npz"
    images = runs.options[runs.options.index("--data.path") + 1]
    words = ["features", str(run), "--data", images, "--out", str(out), "--device", "cpu"]
    command = [sys.executable, "-m", "xdino_launch", "submit", "--run", str(run), "--hours", "1"]
    command += ["--gpus-per-node", "0", "--cpus-per-task", "1", "--", *words]
    done = subprocess.run(command, env=runs.environment(0), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert runs.until_over(done.stdout.strip(), run) == "COMPLETED", runs.log(run)
    assert out.exists()


def test_requeued_by_hand(runs, left_alone):
    run = runs.folder / "requeued"
    job = runs.submit(run, 0.5)
    runs.until_trained(job, run, 3)
    runs.cluster.ask("scontrol", "requeue", job)
    assert runs.until_over(job, run) == "COMPLETED", runs.log(run)
    held(runs, run, left_alone)
    assert runs.fact(job, "Restarts") == "1"


def test_preempted(runs, left_alone):
    run = runs.folder / "preempted"
    job = runs.submit(run, 0.5)
    runs.until_trained(job, run, 3)
    urgent = ("--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 5")
    other = runs.cluster.ask("sbatch", "--parsable", *urgent)
    assert runs.until_over(job, run) == "COMPLETED", runs.log(run)
    assert runs.state(other) == "COMPLETED"
    held(runs, run, left_alone)
    assert runs.fact(job, "Restarts") == "1"


def test_cancelled_it_stays_so_and_a_new_job_continues(runs, left_alone):
    run = runs.folder / "cancelled"
    job = runs.submit(run, 0.5)
    runs.until_trained(job, run, 3)
    runs.cluster.ask("scancel", job)
    assert runs.until_over(job, run) == "CANCELLED", runs.log(run)
    assert runs.fact(job, "Restarts") == "0"
    saved = checkpoint.load_state(run / "checkpoints" / "last.pt")["iteration"]
    assert 3 <= saved < STEPS
    again = runs.submit(run, 0)
    assert runs.until_over(again, run) == "COMPLETED", runs.log(run)
    assert runs.state(job) == "CANCELLED"
    held(runs, run, left_alone)
    assert resumed_at(run) == [0, saved]


def test_the_documented_script(runs, left_alone):
    """docs/clusters.md, as it stands there; the command line fits it to this machine."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    script = runs.folder / "xdino.sbatch"
    script.write_text(text)
    run = runs.folder / "plain"
    fit = [f"--ntasks-per-node={runs.tasks}", "--cpus-per-task=1", "--gres=none", "--time=5"]
    fit += [f"--output={runs.folder}/plain-%j.log"]
    submitted = subprocess.run(
        ["sbatch", "--parsable", *fit, script, "debug", "--run-dir", run, *runs.options],
        env=runs.environment(0.5),
        capture_output=True,
        text=True,
    )
    job = submitted.stdout.strip()
    assert job, submitted.stderr
    log = runs.folder / f"plain-{job}.log"
    runs.until_trained(job, run, 3)
    # The signal of --signal=USR1@120, without waiting until the time is nearly up.
    runs.cluster.ask("scancel", "--signal=USR1", job)
    assert runs.until_over(job, run) == "COMPLETED", log.read_text()
    held(runs, run, left_alone)
    assert runs.fact(job, "Restarts") == "1"


def test_srun_alone_joins_its_tasks(runs, left_alone):
    run = runs.folder / "srun"
    command = ["srun", f"--ntasks={runs.tasks}", "--kill-on-bad-exit=1", sys.executable, "-m"]
    command += ["xdino_launch", "pretrain", "debug", "--run-dir", run, *runs.options]
    done = subprocess.run(
        command, env=runs.environment(0), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.sha256(run / "backbone.safetensors") == left_alone
    assert resumed_at(run) == [0]


@two_tasks
def test_a_task_that_is_lost_ends_the_job(runs):
    """The others do not hold the node, and the job is not queued again."""
    run = runs.folder / "lost"
    job = runs.submit(run, 0.5)
    runs.until_trained(job, run, 3)
    os.kill(process_of(job, task=1), signal.SIGKILL)
    assert runs.until_over(job, run, 60) == "FAILED", runs.log(run)
    assert runs.fact(job, "Restarts") == "0"


def process_of(job: str, task: int) -> int:
    """The process of xdino that is this task of the job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={task}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
            if wanted <= set(told) and b"xdino_launch" in command and b"srun" not in command:
                return int(process.name)
    raise AssertionError(f"job {job} has no task {task}")


@two_tasks
def test_a_failure_is_not_queued_again(runs, tmp_path):
    """A recipe that was good at submission, and whose images are gone when the job starts."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (14, 14)).save(images / "0.png")
    runs = Runs(runs.cluster, images, tmp_path, runs.tasks)
    blocker = runs.cluster.ask("sbatch", "--parsable", "-n2", "-o/dev/null", "--wrap=sleep 60")
    run = tmp_path / "gone"
    job = runs.submit(run, 0)
    images.rename(tmp_path / "elsewhere")
    runs.cluster.ask("scancel", blocker)
    assert runs.until_over(job, run) == "FAILED"
    assert runs.fact(job, "ExitCode") == "2:0", runs.log(run)
    assert runs.fact(job, "Restarts") == "0"
