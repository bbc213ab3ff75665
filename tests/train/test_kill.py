"""SIGKILL at the worst moments, then the same command again: the same bytes as a run left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from xdino import checkpoint


def command(run: Path) -> list[str]:
    small = {
        "train.epochs": 2, "train.batch_size": 500, "crops.local_count": 0, "crops.global_size": 12,
        "model.drop_path": 0.2, "evaluate.every": 0, "runtime.log_every": 1,
        "runtime.checkpoint_every": 7,
    }  # fmt: skip
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "xdino_launch", "pretrain", "debug", "--run", str(run), *options]


def start(run: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(run), env=environment, stderr=subprocess.DEVNULL)


def told(run: Path) -> int:
    """The last iteration in metrics.jsonl, 0 for none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["iteration"] if whole else 0


def kill_when(run: Path, moment: Callable[[], bool]) -> int:
    """Start or continue the run, kill it at the moment; the last iteration that it told."""
    process = start(run)
    deadline = time.monotonic() + 120
    while not moment():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return told(run)


def test_killed_anywhere_the_run_ends_in_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=300) == 0
    state = broken / "checkpoints"
    killed = [kill_when(broken, lambda: told(broken) >= 10)]  # mid-epoch: it has 20 iterations
    assert 0 < checkpoint.load_state(state / "last.pt")["iteration"] < 20
    # While a checkpoint is written:
    killed.append(kill_when(broken, lambda: any(state.glob(".last.pt.*.tmp"))))
    wait = random.Random(0).uniform(0, 1)
    before = told(broken)
    killed.append(kill_when(broken, lambda: told(broken) != before and not time.sleep(wait)))
    assert start(broken).wait(timeout=300) == 0
    for name in ("backbone.safetensors", "checkpoints/initial.safetensors"):
        assert checkpoint.sha256(whole / name) == checkpoint.sha256(broken / name), name
    starts = json.loads((broken / "environment.json").read_text())["starts"]
    assert len(starts) == 4
    resumed = [s["iteration"] for s in starts]
    assert resumed == sorted(resumed)
    rows = [json.loads(x)["iteration"] for x in (broken / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 41))
    assert not list(state.glob(".*.tmp"))
    print(f"killed after iterations {killed}, started at {resumed}, of {len(rows)}")
