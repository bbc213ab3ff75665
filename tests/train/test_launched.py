"""`pretrain` under a launcher's environment: two processes, one run directory, one result."""

import json
import os
import subprocess
import sys

from xdino import checkpoint


def launch(run, images, world_size, batch_size):
    small = {
        "data.path": images, "train.epochs": 2, "train.batch_size": batch_size, "evaluate.every": 0,
        "runtime.log_every": 1, "model.drop_path": 0, "crops.mean": "null", "crops.std": "null",
        "runtime.workers": 1, "train.precision": "fp32",
    }  # fmt: skip
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    command = [
        sys.executable,
        "-m",
        "xdino_launch",
        "pretrain",
        "debug",
        "--run",
        str(run),
        *options,
    ]
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + (os.getpid() + 7) % 20_000),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], errors


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_share_a_run(images, tmp_path):
    assert launch(tmp_path / "one", images, 1, 10)[0] == [0]
    codes, errors = launch(tmp_path / "two", images, 2, 5)
    assert codes == [0, 0], errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    assert all(abs(a - b) < 1e-3 * a for a, b in zip(one, two, strict=True)), (one, two)
    state = checkpoint.load_state(tmp_path / "two" / "checkpoints" / "last.pt")
    assert "rng" not in state, "nothing in it is a process's own"
    assert state["sampler"]["total_batch"] == 10
    # On another number of processes it is the same run, and this one is finished.
    codes, errors = launch(tmp_path / "two", images, 1, 5)
    assert codes == [0], errors
    assert "left alone" in errors[0]


def test_a_finished_run_is_left_alone_by_every_process(images, tmp_path):
    for _ in range(2):
        codes, errors = launch(tmp_path / "run", images, 2, 5)
        assert codes == [0, 0], errors
    assert "left alone" in errors[0] + errors[1]
