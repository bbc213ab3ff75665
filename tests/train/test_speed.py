"""What a run tells of its gradient and its speed, and a trace of its steps: for no bit of the result."""

import gzip
import json

import pytest
import torch

from xdino import checkpoint
from xdino.forecast.machines import GPUS, known_gpu
from xdino.pretraining import Watching, pretrain

from .listening import rows


@pytest.fixture
def both(tiny, tmp_path):
    """(folder of a run that nobody watched, folder of one with a trace and a known peak)."""
    configuration = tiny(model__drop_path=0.3)
    pretrain(configuration, tmp_path / "plain")
    watching = Watching(profile=2, capacity=lambda plan: (1e9, 4e12))
    pretrain(configuration, tmp_path / "watched", watching=watching)
    return tmp_path / "plain", tmp_path / "watched"


def test_watching_changes_no_bit_and_tells_speed(both):
    plain, watched = both
    one, two = (checkpoint.load_state(run / "checkpoints" / "last.pt") for run in both)
    for name, value in one["learner"]["student"].items():
        assert torch.equal(value, two["learner"]["student"][name])
    clocks = {"images_per_second", "tokens_per_second", "mfu", "wait_share", "resident_mb"}
    told = [{k: v for k, v in row.items() if k not in clocks} for row in rows(watched)]
    assert told == [{k: v for k, v in row.items() if k not in clocks} for row in rows(plain)]
    last = rows(watched)[-1]
    assert last["gradient_norm"] > 0
    # 2 views of 24 pixels and the local ones, in patches.
    network = checkpoint.load_backbone(watched)
    sizes = [24, 24] + [last["local_size"]] * _local_views(watched)
    tokens = sum((size // network.patch_size) ** 2 for size in sizes)
    speed = last["images_per_second"]
    assert last["tokens_per_second"] == pytest.approx(tokens * speed, rel=1e-4)
    batch = checkpoint.load_state(watched / "checkpoints" / "last.pt")["sampler"]["total_batch"]
    assert last["mfu"] == pytest.approx(1e9 * speed / batch / 4e12, rel=1e-4)
    assert "mfu" not in rows(plain)[-1]
    steps = [row for row in rows(plain) if "loss" in row]
    assert {row["epoch"] for row in steps} >= {1, 2}
    # After states and scores as well, which are no part of it; of the first step nothing is known.
    assert ["images_per_second" in row for row in steps] == [False] + [True] * (len(steps) - 1)


def _local_views(run) -> int:
    return checkpoint.load_state(run / "checkpoints" / "last.pt")["config"]["crops"]["local_count"]


def test_a_trace_is_written_whole(both):
    plain, watched = both
    with gzip.open(watched / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert any("aten::" in str(name) for name in names)
    assert not (plain / "profile.json.gz").exists()


def test_gpus_are_known_by_their_drivers_names():
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert known_gpu("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert known_gpu("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]
    assert known_gpu("Tesla V100-SXM2-32GB") is GPUS["v100"]
    assert known_gpu("Radeon") is None


def test_the_command_line_takes_it(xdino, tmp_path):
    code, _, error = xdino("pretrain", "auto", "--run", tmp_path, "--profile", 2)
    assert (code, "--profile is for a recipe" in error) == (2, True)
    assert xdino("pretrain", "debug", "--run", tmp_path, "--profile", 0)[0] == 2
