"""Two processes over gloo take the step that one process takes on all the images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import two_processes

WORKER = Path(__file__).with_name("two_processes.py")
BROKEN = Path(__file__).with_name("two_processes_broken.py")


# With class attention's key bias, whose gradient is zero but for noise, of which Adam makes a step.
NO_GRADIENT = (
    "cls_attn_blocks.0.attn.qkv.bias",
    "cls_attn_blocks.1.attn.qkv.bias",
)


def launch(out: Path, world_size: int, worker: Path = WORKER, *names: str) -> None:
    port = 20_000 + os.getpid() % 20_000
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(out), *names],
            env=os.environ
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(world_size)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * world_size


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes found, by objective."""
    out = tmp_path_factory.mktemp("together") / "two.pt"
    launch(out, 2, WORKER, *two_processes.MADE)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", two_processes.MADE)
def test_two_processes_equal_one(name, together, agree):
    alone, two = two_processes.steps(name), together[name]
    for a, b in zip(alone["losses"], two["losses"], strict=True):
        assert abs(a - b) <= 1e-10 * abs(a)
    for a, b in zip(alone["diagnostics"], two["diagnostics"], strict=True):
        assert a == pytest.approx(b, rel=1e-8)
    if "centre" in alone:
        agree("centre", two["centre"], alone["centre"], 1e-10)
    assert alone.get("steps") == two.get("steps")
    # What sets images against each other divides by how near they are, and so magnifies rounding.
    tolerance = 1e-8 if name == "dino" else 1e-6
    for role in ("student", "teacher"):
        for key, value in alone[role].items():
            if key.endswith(NO_GRADIENT):
                continue
            if value.is_floating_point():
                agree(f"{role} {key}", two[role][key], value, tolerance)


def test_what_breaks_on_one_process_stops_all_with_one_sentence(tmp_path):
    launch(tmp_path / "told", 2, BROKEN)
    one, two = (json.loads((tmp_path / f"told.{rank}").read_text()) for rank in (0, 1))
    assert one == two
    pixel, gradient, statistics = one[0::2]
    assert pixel == "the loss became nan"
    assert gradient.startswith("the gradient of head.mlp.0.weight became nan, at a loss of")
    assert statistics.startswith("alone.running_mean of the student became inf")
    assert one[1::2] == ["nothing moved"] * 3
