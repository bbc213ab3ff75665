"""Two processes over gloo take the step that one process takes on all the images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("two_processes.py")
BROKEN = Path(__file__).with_name("two_processes_broken.py")


# Biases that a following BatchNorm takes out again, and class attention's key bias: their gradient is
# zero but for noise, of which Adam makes a step.
NO_GRADIENT = (
    "backbone.norm.bias",
    "head.mlp.0.bias",
    "head.mlp.3.bias",
    "cls_attn_blocks.0.attn.qkv.bias",
    "cls_attn_blocks.1.attn.qkv.bias",
)


def launch(out: Path, world_size: int, worker: Path = WORKER) -> None:
    port = 20_000 + os.getpid() % 20_000
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(out)],
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


def test_two_processes_equal_one(tmp_path, agree):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    launch(one, 1)
    launch(two, 2)
    alone, together = (torch.load(path, weights_only=True) for path in (one, two))
    for a, b in zip(alone["losses"], together["losses"], strict=True):
        assert abs(a - b) <= 1e-10 * abs(a)
    agree("centre", together["centre"], alone["centre"], 1e-10)
    for role in ("student", "teacher"):
        for name, value in alone[role].items():
            if name.endswith(NO_GRADIENT):
                continue
            if value.is_floating_point():
                agree(f"{role} {name}", together[role][name], value, 1e-8)


def test_what_breaks_on_one_process_stops_all_with_one_sentence(tmp_path):
    launch(tmp_path / "told", 2, BROKEN)
    one, two = (json.loads((tmp_path / f"told.{rank}").read_text()) for rank in (0, 1))
    assert one == two
    pixel, gradient, statistics = one[0::2]
    assert pixel == "the loss became nan"
    assert gradient.startswith("the gradient of head.mlp.0.weight became nan, at a loss of")
    assert statistics.startswith("alone.running_mean of the student became inf")
    assert one[1::2] == ["nothing moved"] * 3
