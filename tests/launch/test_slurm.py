"""Submission with stand-ins for SLURM's commands; tests/slurm has the real ones."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from xdino import config
from xdino.errors import RunFailed, UsageError
from xdino.runtime.rendezvous import first_host, from_slurm
from xdino_launch.slurm import Resources, job_script, submit, whole_minutes
from xdino_transfer.finetuning.recipe import FineTuning

SMALL = {"train.batch_size": "2500", "crops.global_size": "12", "crops.local_count": "0",
         "evaluate.every": "0"}  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(name, body) puts a shell script in the place of a command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    return make


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


# --- what is handed over ---


def sbatch_arguments(commands, tmp_path, answer="echo '42;cluster'"):
    told = tmp_path / "told"
    commands("sbatch", f'printf "%s\\n" "$@" > {told}; env > {told}.env; {answer}')
    return told


def test_the_job_gets_its_configuration_in_full(commands, tmp_path, xdino):
    told = sbatch_arguments(commands, tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {path: fashion_mnist_sample}\ntrain: {epochs: 17}\n")
    run = tmp_path / "a run 100%"
    options = ("--gpus-per-node", 4, "--nodes", 2, "--hours", 2, "--partition", "gpu",
               "--slurm", "account=me", "--slurm", "mail_type=END")  # fmt: skip
    code, out, err = xdino("submit", recipe, "--run", run, *options, "--optim.lr", "1e-3")
    assert (code, out) == (0, "42\n"), err
    given = told.read_text().splitlines()
    expected = ["--parsable", "--requeue", "--open-mode=append", "--nodes=2", "--ntasks-per-node=4",
                "--cpus-per-task=10", "--time=120", "--signal=B:USR1@120", "--gres=gpu:4",
                "--partition=gpu", "--account=me", "--mail-type=END", "--job-name=a run 100%",
                f"--output={tmp_path}/a run 100%%-slurm/%j.log", f"--chdir={os.getcwd()}"]  # fmt: skip
    assert given[:-1] == expected
    script = Path(given[-1])
    assert script.parent == tmp_path / "a run 100%-slurm"
    (line,) = [x for x in script.read_text().splitlines() if x.startswith("srun")]
    assert "--kill-on-bad-exit=1" in line
    *_, program, kept, option, folder, _ = shlex.split(line)
    assert (program, option, folder) == ("pretrain", "--run-dir", str(run))
    recipe.write_text("train: {epochs: 18}\n")  # edited while the job waits
    assert config.load(kept).train.epochs == 17
    assert config.load(kept).optim.lr == 1e-3
    assert not run.exists()
    # Another submission leaves the files of a job that waits as they are.
    assert xdino("submit", recipe, "--run", run, "--data.path", "fashion_mnist_sample")[0] == 0
    assert config.load(kept).train.epochs == 17


def test_a_submission_says_how_to_follow_and_to_cancel(commands, tmp_path, xdino):
    sbatch_arguments(commands, tmp_path)
    code, out, err = xdino("submit", "debug", "--run", tmp_path / "a run")
    assert (code, out) == (0, "42\n"), "the number alone, for scripts"
    logs = tmp_path / "a run-slurm"
    assert err.splitlines() == [
        f"logs    {logs}",
        f"follow  tail -F '{logs}/42.log'",
        "state   squeue --job=42",
        "cancel  scancel 42",
    ]
    _, _, err = xdino("submit", "debug", "--run", tmp_path / "b", "--slurm", "clusters=east")
    assert "scancel --clusters=east 42" in err


def test_nothing_of_an_allocation_around_it_goes_along(commands, tmp_path, monkeypatch):
    told = sbatch_arguments(commands, tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    assert submit(config.load("debug"), tmp_path / "run", Resources()) == "42"
    environment = Path(f"{told}.env").read_text().splitlines()
    assert "SLURM_CONF=/etc/other.conf" in environment
    assert not [x for x in environment if x.startswith("SLURM_NTASKS")]


def test_where_there_is_no_slurm_nothing_starts(no_slurm, tmp_path, xdino):
    code, out, err = xdino("submit", "debug", "--run", tmp_path / "run")
    assert (code, out) == (2, "")
    assert "no SLURM here" in err
    assert "--cluster local" in err
    assert not list(tmp_path.glob("run*"))


def test_the_local_cluster_is_one_process_here(no_slurm, tmp_path, xdino):
    small = [part for key, value in SMALL.items() for part in (f"--{key}", value)]
    code, out, err = xdino(
        "submit", "debug", "--run", tmp_path / "run", "--cluster", "local", *small
    )
    assert code == 0, err
    assert out.strip().endswith("backbone.safetensors")
    assert "one process on this machine" in err
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--slurm", "account"], "KEY=VALUE"),
        (["--slurm", "ac count=x"], "no option of sbatch"),
        (["--slurm", "array=0-3"], "one job"),
        (["--slurm", "comment=a\nb"], "do not print"),
        (["--hours", "0.008"], "--hours"),
        (["--hours", "0"], "--hours"),
        (["--hours", "-1"], "--hours"),
        (["--hours", "nan"], "--hours"),
        (["--hours", "inf"], "--hours"),
        (["--hours", "0.5", "--warning", "1800"], "leaves nothing"),
        (["--gpus-per-node", "4", "--tasks-per-node", "2"], "one GPU"),
        (["--optim.lrr", "1"], "lr"),
        (["--data.path", ""], "data.path"),
    ],
)
def test_mistakes_are_found_before_the_queue(commands, tmp_path, xdino, options, sentence):
    told = sbatch_arguments(commands, tmp_path)
    code, _, err = xdino("submit", "debug", "--run", tmp_path / "run", *options)
    assert code == 2
    assert sentence in err
    assert not told.exists()
    assert not list(tmp_path.glob("run*"))


def test_a_folder_of_something_else_is_found_before_the_queue(commands, tmp_path):
    told = sbatch_arguments(commands, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="not a run"):
        submit(config.load("debug"), run, Resources())
    with pytest.raises(UsageError, match="script"):
        submit(config.load("debug"), tmp_path / "a\nb", Resources())
    assert not told.exists()


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        (
            "sbatch: error: invalid partition specified: gpuu",
            UsageError,
            "partition specified: gpuu",
        ),
        ("sbatch: error: Unable to contact slurm controller", RunFailed, "does not answer"),
        ("", UsageError, "ended with 1"),
    ],
)
def test_what_sbatch_says_is_said(commands, tmp_path, said, kind, sentence):
    sbatch_arguments(commands, tmp_path, f"echo '{said}' >&2; exit 1")
    with pytest.raises(kind, match=sentence):
        submit(config.load("debug"), tmp_path / "runs" / "a", Resources())
    assert not (tmp_path / "runs").exists(), "a job that there is none of leaves nothing"


def test_what_fails_leaves_a_waiting_job_its_files(commands, tmp_path):
    def files():
        return sorted(path.name for path in (tmp_path / "run-slurm").iterdir())

    sbatch_arguments(commands, tmp_path)
    submit(config.load("debug"), tmp_path / "run", Resources())
    waiting = files()
    sbatch_arguments(commands, tmp_path, "exit 1")
    for recipe in ("debug", "demo"):
        with pytest.raises(UsageError, match="refuses the job"):
            submit(config.load(recipe), tmp_path / "run", Resources())
        assert files() == waiting
    # Perhaps it is in the queue: nobody knows.
    sbatch_arguments(
        commands, tmp_path, "echo 'Socket timed out on send/recv operation' >&2; exit 1"
    )
    with pytest.raises(RunFailed, match="timed out"):
        submit(config.load("demo"), tmp_path / "run", Resources())
    assert len(files()) == 4


def test_times_are_whole_minutes():
    assert [whole_minutes(h) for h in (1 / 60, 0.017, 0.2, 24, 1.0001)] == [1, 2, 12, 1440, 61]
    # Of a short time, a part is left to train in.
    warnings = [Resources(minutes=m).seconds_to_save for m in (1, 6, 12, 1440)]
    assert warnings == [10, 60, 120, 120]
    assert Resources(minutes=60, warning=300).options()[-1] == "--gres=gpu:8"
    assert "--signal=B:USR1@300" in Resources(minutes=60, warning=300).options()


def test_tasks_without_gpus():
    options = Resources(gpus_per_node=0, tasks_per_node=3).options()
    assert "--ntasks-per-node=3" in options
    assert not [x for x in options if "gpu" in x]
    assert "--ntasks-per-node=1" in Resources(gpus_per_node=0).options()


# --- what the script does with how the tasks ended ---


def start_script(tmp_path, most=None, setup=(), **environment):
    resources = Resources(max_requeues=most, cpus_per_task=1, setup=tuple(setup))
    script = tmp_path / "job.sh"
    script.write_text(job_script(["sbatch"], ["pretrain", "c.yaml"], resources))
    return subprocess.Popen(
        ["bash", script],
        env=os.environ | {"SLURM_JOB_ID": "7"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pretend_scontrol(commands, tmp_path, facts):
    commands("scontrol", f'[ $1 = requeue ] && echo "$2" >> {tmp_path}/queued || echo "{facts}"')


RUNNING = "JobId=7 JobName=x JobState=RUNNING Reason=None PreemptTime=None ExitCode=0:0"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-25T23:20:58")
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")
TIMEOUT = CANCELLED.replace("Reason=None", "Reason=TimeLimit")


@pytest.mark.parametrize(
    ("ended", "facts", "again"),
    [
        (0, RUNNING, False),
        (0, PREEMPTED, False),
        (75, RUNNING, True),
        (75, PREEMPTED, True),
        (75, TIMEOUT, True),  # saving took longer than the warning before the end
        (75, CANCELLED, False),  # or queued again by somebody else
        (1, RUNNING, False),
        (1, PREEMPTED, False),
        (2, TIMEOUT, False),
        (137, RUNNING, False),  # out of memory
        (143, RUNNING, False),  # by srun, because another task died
        (143, PREEMPTED, True),  # before the task could listen
        (143, TIMEOUT, True),
        (143, CANCELLED, False),
    ],
)
def test_the_script_queues_a_stopped_job_again(commands, tmp_path, ended, facts, again):
    commands("srun", f"exit {ended}")
    pretend_scontrol(commands, tmp_path, facts)
    script = start_script(tmp_path)
    assert script.wait(timeout=20) == ended, script.stderr.read()
    queued = tmp_path / "queued"
    assert (queued.read_text() == "7\n" if queued.exists() else False) is again


def test_the_script_bounds_the_requeues_where_asked(commands, tmp_path):
    commands("srun", "exit 75")
    pretend_scontrol(commands, tmp_path, RUNNING)
    assert start_script(tmp_path, most=2, SLURM_RESTART_COUNT="1").wait(timeout=20) == 75
    assert (tmp_path / "queued").read_text() == "7\n"
    script = start_script(tmp_path, most=2, SLURM_RESTART_COUNT="2")
    assert script.wait(timeout=20) == 75
    assert (tmp_path / "queued").read_text() == "7\n"
    assert "submit the run again" in script.stderr.read()


@pytest.mark.parametrize(("handles", "code"), [("exit 75", 75), ("exit 138", 138)])
def test_the_script_passes_the_warning_on_and_outlives_the_end(commands, tmp_path, handles, code):
    ready = tmp_path / "ready"
    commands("srun", f"trap '{handles}' USR1\ntouch {ready}\nwhile true; do sleep 0.05; done")
    pretend_scontrol(commands, tmp_path, RUNNING)
    script = start_script(tmp_path)
    while not ready.exists():
        assert script.poll() is None
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)  # goes to the tasks by themselves
    with pytest.raises(subprocess.TimeoutExpired):
        script.wait(timeout=0.3)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=20) == code
    assert (tmp_path / "queued").read_text() == "7\n"


def test_the_script_takes_another_port_at_every_start_and_where_one_is_taken(commands, tmp_path):
    commands("srun", "env")
    pretend_scontrol(commands, tmp_path, RUNNING)

    def port(restarts: int) -> int:
        inherited = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "elsewhere"}
        script = start_script(tmp_path, SLURM_RESTART_COUNT=str(restarts), **inherited)
        told = dict(
            line.split("=", 1) for line in script.communicate()[0].splitlines() if "=" in line
        )
        assert not inherited.keys() & told.keys()
        return int(told["MASTER_PORT"])

    first, second = port(0), port(1)
    assert first != second
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", first))
        listener.listen()
        assert port(0) not in (first, second)


def test_the_script_begins_with_what_it_was_given(commands, tmp_path):
    commands("srun", 'echo "$MODULES $*"')
    script = start_script(tmp_path, setup=["MODULES='cuda 13'", "export MODULES  # 100 %{x}"])
    assert script.communicate()[0].startswith("cuda 13 --kill-on-bad-exit=1")


def test_a_job_of_an_array_speaks_of_itself_alone(commands, tmp_path):
    """SLURM takes the number of an array's last job for all of them."""
    commands("srun", "exit 75")
    commands("scontrol", f'echo "$@" >> {tmp_path}/told; echo "{RUNNING}"')
    script = start_script(tmp_path, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert script.wait(timeout=20) == 75
    assert (tmp_path / "told").read_text() == "--oneliner show job 7_3\nrequeue 7_3\n"


def test_scripts_are_what_a_shell_and_a_linter_take(commands, tmp_path, xdino):
    told = sbatch_arguments(commands, tmp_path)
    for words in ((), ("--seeds", "1-3"), ("--max-requeues", "2", "--setup", "module load cuda")):
        assert xdino("submit", "debug", "--run", tmp_path / "it's a run", *words)[0] == 0
        script = told.read_text().splitlines()[-1]
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        if shutil.which("shellcheck"):
            assert subprocess.run(["shellcheck", "--severity=warning", script]).returncode == 0


# --- seeds, and other commands ---


def test_seeds_are_an_array_of_runs(commands, tmp_path, xdino):
    told = sbatch_arguments(commands, tmp_path)
    run = tmp_path / "a run"
    code, out, err = xdino("submit", "debug", "--run", run, "--seeds", "0-1,7")
    assert (code, out) == (0, "42\n"), err
    assert f"follow  tail -F '{run}-slurm/42'_*.log" in err.splitlines()
    given = told.read_text().splitlines()
    assert "--array=0,1,7" in given
    assert f"--output={run}-slurm/%A_%a.log" in given
    (line,) = [x for x in Path(given[-1]).read_text().splitlines() if x.startswith("srun")]
    done = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}; {line.removesuffix('&')}"],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "7", "SLURM_CPUS_PER_TASK": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    *_, program, recipe, option, place = done.stdout.splitlines()
    assert (program, option, place) == ("pretrain", "--run-dir", f"{run}/seed7")
    assert config.load(recipe).train.seed == 7
    kept = sorted(path.name[12:] for path in Path(recipe).parent.glob("*.yaml"))
    assert kept == ["-seed0.yaml", "-seed1.yaml", "-seed7.yaml"]


def test_any_command_is_one_task(commands, tmp_path, xdino, monkeypatch):
    told = sbatch_arguments(commands, tmp_path)
    (tmp_path / "classes").mkdir()
    command = ("knn", "runs/s 12", "--data", str(tmp_path / "classes"), "--k", "10,20")
    code, out, err = xdino("submit", "--run", tmp_path / "run", "--hours", 2, "--", *command)
    assert (code, out) == (0, "42\n"), err
    given = told.read_text().splitlines()
    assert {"--ntasks-per-node=1", "--gres=gpu:1", "--nodes=1", "--time=120"} <= set(given)
    script = Path(given[-1]).read_text()
    (line,) = [x for x in script.splitlines() if x.startswith("srun")]
    assert tuple(shlex.split(line)[-len(command) - 1 : -1]) == command
    assert "started 0 times again" in script, "it would begin anew each time"
    assert xdino("submit", "--run", tmp_path / "run", "--gpus-per-node", 0, "--", *command)[0] == 0
    assert not [x for x in told.read_text().splitlines() if "gres" in x]
    # These share their work.
    weights, data = ("runs/s 12", "--data"), str(tmp_path / "classes")
    for shared in (command, ("linear", *weights, data), ("score", *weights, data)):
        done = xdino("submit", "--run", tmp_path / "run", "--gpus-per-node", 4, "--", *shared)
        assert done[0] == 0, done[2]
        assert "--ntasks-per-node=4" in told.read_text().splitlines()


def test_recipes_of_every_kind_are_submitted(commands, tmp_path, xdino):
    told, run = sbatch_arguments(commands, tmp_path), tmp_path / "tuned"
    code, out, err = xdino("submit", "finetune_small", "--run", run, "--seeds", "0-1",
                           "--data.path", "classes", "--train.init", "runs/mine")  # fmt: skip
    assert (code, out) == (0, "42\n"), err
    (line,) = [x for x in Path(told.read_text().splitlines()[-1]).read_text().splitlines()
               if x.startswith("srun")]  # fmt: skip
    assert " finetune " in line
    kept = [
        config.load(str(path), None, FineTuning) for path in (tmp_path / "tuned-slurm").glob("*l")
    ]
    assert {each.train.seed for each in kept} == {0, 1}
    assert {each.train.init for each in kept} == {"runs/mine"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--", "finetune", "finetune_small"], "finetune needs a --run of its own"),
        (["--", "segment", "segment_smal", "--run", "a"], 'did you mean "segment_small"?'),
        (["--", "segment", "segment_small", "--run", "a", "--train.epoch", "3"], '"epochs"?'),
        (["--", "detect", "--run", "nothing"], "nothing holds no run to continue"),
        (
            ["--gpus-per-node", "2", "--", "transfer", "a", "--suite", "b", "--run", "c"],
            "transfer is one process",
        ),
        (["finetune_small", "--data.path", "x", "--cluster", "local"], "is for pretraining: xdino"),
        (["--", "knn", "runs/a", "--daat", "x"], "--daat"),
        (["--", "knn"], "WEIGHTS"),
        (["--seeds", "0-2", "--", "knn", "a", "--data", "b"], "for pretraining"),
        (["--gpus-per-node", "4", "--", "predict", "a", "b.png"], "predict is one process"),
        (["--", "pretrain", "debug"], "xdino submit RECIPE"),
        (["--", "submit", "debug"], "xdino submit RECIPE"),
        (["--", "knm"], "knm"),
        (["debug", "--seeds", "3-1"], "0-4 or 0,3,7"),
        (["debug", "--seeds", "a"], "0-4 or 0,3,7"),
        (["debug", "--seeds", "1,1"], "different"),
        (["debug", "--seeds", "0-5000"], "0-4 or 0,3,7"),
        (["debug", "--setup", "a\nb"], "one line of shell"),
    ],
)
def test_mistakes_about_seeds_and_commands(commands, tmp_path, xdino, words, sentence):
    told = sbatch_arguments(commands, tmp_path)
    code, _, err = xdino("submit", "--run", tmp_path / "run", *words)
    assert code == 2, err
    assert sentence in err
    assert not told.exists()


# --- how tasks find each other ---

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[03-05,9],x",
}  # fmt: skip


def test_a_task_of_srun_finds_the_others():
    found = from_slurm(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node03"}
    assert 10_000 <= port < 30_000
    assert from_slurm(STEP | {"SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    starts = [STEP | {"SLURM_RESTART_COUNT": str(i)} for i in range(20)]
    assert len({from_slurm(start)["MASTER_PORT"] for start in starts}) == 20
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert chosen.items() <= from_slurm(STEP | chosen).items()


def test_a_process_that_srun_did_not_start_is_on_its_own():
    assert from_slurm({}) == {}
    assert from_slurm(STEP | {"WORLD_SIZE": "2"}) == {}  # torchrun under srun
    assert from_slurm(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}  # one step of several tasks' job
    script = {k: v for k, v in STEP.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert from_slurm(script | {"ENVIRONMENT": "BATCH"}) == {}
    assert from_slurm({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}) == {}  # the shell of salloc


def test_half_a_description_is_refused():
    for name in ("SLURM_LOCALID", "SLURM_STEP_NODELIST"):
        with pytest.raises(UsageError, match="srun"):
            from_slurm({k: v for k, v in STEP.items() if k != name})
    with pytest.raises(UsageError, match="srun"):
        from_slurm(STEP | {"SLURM_STEP_NUM_TASKS": "many"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("vm", "vm"),
        ("a,b", "a"),
        ("node[03-05,9]", "node03"),
        ("node[7,3-5],login", "node7"),
        ("rack[1-2]n[10-12]-ib,x", "rack1n10-ib"),
        ("gpu-a[001]", "gpu-a001"),
        ("n-1.example.org,n-2.example.org", "n-1.example.org"),
    ],
)
def test_the_first_of_slurms_hosts(hosts, first):
    assert first_host(hosts) == first


# --- the page about clusters ---


def documented(language: str) -> list[str]:
    page = (ROOT / "docs" / "clusters.md").read_text()
    return [
        block.split("\n", 1)[1] for block in page.split("```")[1::2] if block.startswith(language)
    ]


def test_the_documented_job_of_kubernetes_is_whole():
    (text,) = documented("yaml")
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = pod["containers"]
    names = {variable["name"]: variable for variable in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(names["WORLD_SIZE"]["value"])
    assert "job-completion-index" in names["RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    address = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert names["MASTER_ADDR"]["value"] == address
    assert pod["subdomain"] == service["metadata"]["name"]
    actions = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert actions == {(2,): "FailJob", (75,): "Ignore"}
    assert pod["restartPolicy"] == "Never"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_documented_script_is_bash():
    (text,) = documented("bash")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_the_documented_commands_parse(commands, tmp_path, xdino, monkeypatch):
    """The line that the page gives for submit goes through as it stands."""
    page = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    (line,) = [x.strip() for x in page.splitlines() if x.startswith("    xdino submit")]
    told = sbatch_arguments(commands, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = xdino(*shlex.split(line)[1:])
    assert (code, out) == (0, "42\n"), err
    assert "--account=NAME" in told.read_text()


@pytest.mark.slow
def test_what_torchrun_makes_of_75(tmp_path):
    """docs/clusters.md says so: why its exit code does not tell a scheduler to start again."""
    worker = tmp_path / "worker.py"
    worker.write_text("import sys\nsys.exit(75)\n")
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [sys.executable, torchrun, "--standalone", "--nproc-per-node=2", worker]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 1
