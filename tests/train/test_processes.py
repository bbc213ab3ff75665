"""Several processes: the launchers as the README writes them, and what each says when one is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xdino import checkpoint
from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed, rendezvous

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def options(images: Path, **overrides: object) -> list[str]:
    small = {
        "data.path": images, "train.epochs": 2, "train.batch_size": 5, "evaluate.every": 0,
        "runtime.log_every": 1, "model.drop_path": 0, "crops.mean": "null", "crops.std": "null",
        "runtime.workers": 1, **{key.replace("__", "."): value for key, value in overrides.items()},
    }  # fmt: skip
    return [part for key, value in small.items() for part in (f"--{key}", str(value))]


def clean_environment(**more: str) -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def begin(command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 180) -> tuple[int, str, str]:
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, error


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(command: list[str], count: int = 2, **environment: str) -> list[subprocess.Popen]:
    """As a launcher that only sets variables would start them."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        begin(command, RANK=str(rank), LOCAL_RANK=str(rank), **(common | environment))
        for rank in range(count)
    ]


def told(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines if line.endswith("\n")]


def wait_for(moment, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def workers_of(launcher: int) -> list[int]:
    """The processes that a process started, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == launcher:
            found.append(int(stat.parent.name))
    return sorted(found)


XDINO = [sys.executable, "-m", "xdino_launch"]
LONG = {"train__epochs": 5000, "runtime__checkpoint_every": 1, "runtime__keep_every": 0}


def test_torchrun_as_the_documents_write_it(images, tmp_path):
    """The line of docs/clusters.md, with the folder of these tests and two processes in its places."""
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    lines = [x.strip() for x in page.splitlines() if x.strip().startswith("torchrun --nproc")]
    (line,) = [x for x in lines if " pretrain " in x]
    words = line.split()
    assert words[0] == "torchrun"
    assert "--run" not in words, "torchrun takes it for its own --run-path"
    places = {"8": "2", "imagenet_s12_p16": "debug", "runs/s12": str(tmp_path / "run")}
    words = [places.get(word, word) for word in words[1 : words.index("--data.path")]]
    command = [*TORCHRUN[:3], "--master-port", free_port(), *words, *options(images)]
    code, out, error = finish(begin(command))
    assert code == 0, error
    assert out.split() == [str(tmp_path / "run" / "backbone.safetensors")], "once, not twice"
    assert told(tmp_path / "run") == [1, 2, 3, 4]


def test_our_own_launcher_gives_the_same_and_its_exit_codes(images, tmp_path):
    by_us, by_torchrun = tmp_path / "us", tmp_path / "torchrun"
    rest = options(images)
    both = [
        begin([*XDINO, "pretrain", "debug", "--run", str(by_us), "--processes", "2", *rest]),
        begin([*TORCHRUN, *XDINO[1:], "pretrain", "debug", "--run-dir", str(by_torchrun), *rest]),
    ]
    for process in both:
        code, _, error = finish(process)
        assert code == 0, error
    a, b = (checkpoint.sha256(run / "backbone.safetensors") for run in (by_us, by_torchrun))
    assert a == b
    # A mistake that only planning finds: one sentence, exit code 2, no folder.
    wrong = [*XDINO, "pretrain", "debug", "--run", str(tmp_path / "no"), "--processes", "2"]
    code, _, error = finish(begin([*wrong, *options(images, train__batch_size=500)]))
    assert (code, error.count("xdino: ")) == (2, 1), error
    assert "Traceback" not in error
    assert not (tmp_path / "no").exists()


def test_a_signal_to_the_launcher_saves_and_ends_with_75(images, tmp_path):
    run = tmp_path / "run"
    rest = options(images, **LONG | {"runtime__checkpoint_every": 100_000})
    process = begin([*XDINO, "pretrain", "debug", "--run", str(run), "--processes", "2", *rest])
    wait_for(lambda: len(told(run)) >= 3)
    process.send_signal(signal.SIGTERM)
    code, _, error = finish(process)
    assert code == 75, error
    assert "Traceback" not in error
    state = checkpoint.load_state(run / "checkpoints" / "last.pt")
    assert state["iteration"] == told(run)[-1]
    assert "rng" not in state, "nothing in it is a process's own"


def test_a_dead_process_ends_the_others_in_a_sentence(images, tmp_path):
    run = tmp_path / "run"
    command = [*XDINO, "pretrain", "debug", "--run", str(run), *options(images, **LONG)]
    both = ranks(command)
    wait_for(lambda: len(told(run)) >= 3)
    both[1].kill()
    began = time.monotonic()
    code, _, error = finish(both[0])
    assert time.monotonic() - began < 60
    finish(both[1])
    assert code == 1, error
    assert "lost another process" in error
    assert "last good checkpoint" in error
    assert "Traceback" not in error
    assert checkpoint.load_state(run / "checkpoints" / "last.pt")["iteration"] >= 1


def test_orphans_end_with_their_launcher(images, tmp_path):
    run = tmp_path / "run"
    rest = options(images, **LONG)
    process = begin([*TORCHRUN, *XDINO[1:], "pretrain", "debug", "--run-dir", str(run), *rest])
    wait_for(lambda: len(told(run)) >= 2)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), 60)
    assert checkpoint.load_state(run / "checkpoints" / "last.pt")["iteration"] == told(run)[-1]


def test_processes_that_see_different_images_do_not_begin(images, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(images, short)
    (short / "00.png").unlink()
    run = tmp_path / "run"
    one = [*XDINO, "pretrain", "debug", "--run", str(run), *options(tmp_path / "here")]
    (tmp_path / "here").symlink_to(images)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "here").symlink_to(short)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = [clean_environment(**common, RANK=str(rank), LOCAL_RANK="0") for rank in (0, 1)]
    relative = [part.replace(str(tmp_path / "here"), "here") for part in one]
    both = [
        subprocess.Popen(
            relative, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for env, cwd in zip(environment, (tmp_path, tmp_path / "there"), strict=True)
    ]
    ended = [finish(process) for process in both]
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "do not agree on the number of images: process 0 has 20, process 1 has 19" in ended[0][2]
    assert not run.exists()


def test_the_first_process_alone_says_where_a_run_stands(images, tmp_path):
    """Folders of their own, as on nodes without a shared disk: the others' do not count."""
    rest = options(images, runtime__checkpoint_every=1)
    whole = tmp_path / "whole"
    for process in ranks([*XDINO, "pretrain", "debug", "--run", str(whole), *rest]):
        assert finish(process)[0] == 0
    begun = ranks([*XDINO, "pretrain", "debug", "--run", str(tmp_path / "a"), *rest])
    wait_for(lambda: len(told(tmp_path / "a")) >= 1)
    for process in begun:
        process.send_signal(signal.SIGTERM)
    assert {finish(process)[0] for process in begun} <= {75, 0}
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    both = [
        begin(
            [*XDINO, "pretrain", "debug", "--run", str(tmp_path / name), *rest],
            RANK=str(rank), LOCAL_RANK=str(rank), **common,
        )
        for rank, name in enumerate(("a", "elsewhere"))
    ]  # fmt: skip
    ended = [finish(process) for process in both]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert not (tmp_path / "elsewhere").exists()
    a, b = (checkpoint.sha256(run / "backbone.safetensors") for run in (whole, tmp_path / "a"))
    assert a == b


def test_a_process_that_never_comes_is_named(images, tmp_path):
    command = [*XDINO, "pretrain", "debug", "--run", str(tmp_path / "run"), *options(images)]
    process = begin(
        command, RANK="0", WORLD_SIZE="3", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(), XDINO_RENDEZVOUS_SECONDS="2",
    )  # fmt: skip
    code, _, error = finish(process)
    assert code == 1, error
    assert "waited 2 s (XDINO_RENDEZVOUS_SECONDS) for process 1, 2" in error
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = begin(
            command, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port, XDINO_RENDEZVOUS_SECONDS="2",
        )  # fmt: skip
        code, _, error = finish(process)
    assert code == 1, error
    assert f"port {port} of 127.0.0.1 is taken" in error


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number, got ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "-1"}, "whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK 2 of WORLD_SIZE 2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "99999"},
            "ports end at 65535",
        ),
    ],
)
def test_half_a_description_of_a_group_is_refused(environment, message):
    with pytest.raises(UsageError, match=message):
        rendezvous.described(environment)


def test_a_process_on_its_own_needs_no_description():
    assert rendezvous.described({}) is None
    assert rendezvous.described({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_only_lost_processes_become_that_sentence():
    with pytest.raises(RunFailed, match="lost another process"), distributed.heard():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="a defect"), distributed.heard():
        raise RuntimeError("a defect")
