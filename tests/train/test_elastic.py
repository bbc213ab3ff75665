"""A run goes on with another number of processes: the same images, the same losses."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xdino import config
from xdino.data import epoch_order
from xdino.errors import UsageError
from xdino.run_directory import batches
from xdino.runtime.batch_layout import BatchLayout, shared_out
from xdino_transfer.dense_training.segmenting.recipe import Segmentation
from xdino_transfer.finetuning.recipe import FineTuning

WORKER = Path(__file__).with_name("elastic_worker.py")


def moved(folder: Path, **runs: tuple[Any, list]) -> dict[str, Path]:
    """Runs by name: settings, and stages (processes, killed after so many rows or None)."""
    told = [
        {
            "kind": settings.kind,
            "config": config.to_tree(settings),
            "run": str(folder / name),
            "stages": stages,
        }
        for name, (settings, stages) in runs.items()
    ]
    (folder / "runs.json").write_text(json.dumps(told))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "runs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: folder / name for name in runs}


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["iteration"], row["loss"]) for row in rows if "loss" in row]
    assert len(found) == len(dict(found)), "each iteration is told once"
    return dict(found)


def images(run: Path, total: int) -> dict[int, list[int]]:
    """Of every iteration the images of its last, whole going."""
    found = defaultdict(list)
    for line in run.with_suffix(".images").read_text().splitlines():
        told = json.loads(line)
        found[told["iteration"]] += told["indices"]
    return {iteration: sorted(taken[-total:]) for iteration, taken in found.items()}


def expected(iteration: int, n: int, total: int) -> list[int]:
    epoch, step = divmod(iteration - 1, n // total)
    return sorted(epoch_order(n, 0, epoch)[step * total : (step + 1) * total].tolist())


TOTAL = 8


def pretraining(tiny, epochs: int) -> dict[str, tuple[Any, list]]:
    """One run left alone, and one of the same that is killed and moves."""

    def settings(batch_size, every):
        return tiny(
            train__batch_size=batch_size, train__epochs=epochs, model__drop_path=0.3,
            runtime__checkpoint_every=every, train__precision="fp32",
        )  # fmt: skip

    stages = [[2, epochs // 2], [1, epochs], [4, None]]
    return {
        "whole": (settings(TOTAL, 100), [[1, None]]),
        "moved": (settings(TOTAL // 2, 1 + epochs // 20), stages),
    }


def fine_tuning() -> dict[str, tuple[Any, list]]:
    tree = {
        "model": {"arch": "xcit_nano_12_p8", "embed_dim": 32, "depth": 1, "num_heads": 2,
                  "drop_path": 0.3},
        "view": {"size": 16, "repeats": 3, "scale": [0.5, 1.0]},
        "data": {"path": "fashion_mnist_sample", "images_a_class": 30},
        "optim": {"warmup_epochs": 0, "lr": 1e-3, "clip_grad": 1.0},
        "train": {"epochs": 4, "batch_size": 128, "precision": "fp32"},
        "evaluate": {"every": 0},
        "runtime": {"device": "cpu", "workers": 0, "log_every": 1, "keep_every": 0},
    }  # fmt: skip
    settings = config.parse(tree, schema=FineTuning)
    return {
        "classes": (settings, [[2, None]]),
        "moved_classes": (settings, [[2, 1], [1, 2], [4, None]]),
    }


def compare(whole: Path, run: Path, steps: int) -> float:
    """How far apart losses lie, of their value."""
    one, other = losses(whole), losses(run)
    assert [*one] == [*other] == list(range(1, steps + 1))
    return max(abs(other[i] / one[i] - 1) for i in one)


def check_pretraining(runs: dict[str, Path], epochs: int) -> None:
    """0 images lost or doubled, and the losses of the uninterrupted run, drop path included."""
    run, steps = runs["moved"], 2 * epochs
    apart = compare(runs["whole"], run, steps)
    print(f"{steps} losses, at most {apart:.1e} of their value apart")
    assert apart < 1e-5
    assert images(run, TOTAL) == {i: expected(i, 20, TOTAL) for i in range(1, steps + 1)}
    told = run.with_suffix(".told").read_text()
    assert "1 process x 8 images x 1 micro-batch make the run's 8 images a step" in told
    assert "4 processes x 2 images x 1 micro-batch make" in told
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 1, 4]
    assert all(s["batch"] == BatchLayout(4, 1, 2).to_dict() for s in starts)


def test_killed_on_two_processes_then_on_one_then_on_four(tiny, tmp_path):
    check_pretraining(moved(tmp_path, **pretraining(tiny, 4)), 4)


def segmentation(folder: Path) -> dict[str, tuple[Any, list]]:
    """Dropped paths and channels; squares on a ground, sixteen to learn from."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 2)):
        for kind in ("images", "masks"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((40, 40), np.uint8)
            top, left = generator.integers(0, 20, 2)
            mask[top : top + 18, left : left + 18] = 1
            pixels = generator.integers(0, 90, (40, 40, 3)).astype(np.uint8)
            pixels[mask == 1, 0] = 220
            Image.fromarray(pixels).save(folder / "data" / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(folder / "data" / "masks" / split / f"{number}.png")
    (folder / "data" / "classes.txt").write_text("ground\nsquare\n")
    tree = {
        "model": {"arch": "xcit_nano_12_p8", "embed_dim": 16, "depth": 4, "num_heads": 2,
                  "channels": 8, "drop_path": 0.2},
        "view": {"crop": 32, "longer": 128, "shorter": 32},
        "data": {"path": str(folder / "data")},
        "optim": {"lr": 0.01, "warmup": 0},
        "train": {"epochs": 4, "iterations": None, "batch_size": 4, "precision": "fp32"},
        "evaluate": {"every": 0},
        "runtime": {"device": "cpu", "workers": 0, "log_every": 1, "keep_every": 0,
                    "checkpoint_every": 1},
    }  # fmt: skip
    settings = config.parse(tree, "a test", Segmentation)
    return {
        "masks": (settings, [[2, None]]),
        "moved_masks": (settings, [[2, 2], [1, 5], [4, None]]),
    }


@pytest.mark.slow
def test_two_hundred_iterations(tiny, tmp_path):
    check_pretraining(moved(tmp_path, **pretraining(tiny, 100)), 100)


@pytest.mark.slow
def test_a_classifier_and_a_segmenter(tmp_path):
    runs = moved(tmp_path, **fine_tuning(), **segmentation(tmp_path))
    # Mixed are the same images of two processes, on one and on four.
    assert compare(runs["classes"], runs["moved_classes"], 4) < 1e-5
    assert images(runs["moved_classes"], 256) == images(runs["classes"], 256)
    assert compare(runs["masks"], runs["moved_masks"], 8) < 1e-5
    assert images(runs["moved_masks"], 8) == images(runs["masks"], 8)


# --- how a step is shared out ---


@pytest.mark.parametrize(
    ("first", "processes", "most", "found"),
    [
        ((16, 1, 2), 1, None, (32, 1)),
        ((16, 1, 2), 4, None, (8, 1)),
        ((16, 3, 2), 3, None, (8, 4)),  # 96 a step, 24 or 48 at a time: as near to 32 as can be
        ((64, 1, 8), 4, 64, (64, 2)),  # on GPUs no process takes more than it had
        ((64, 2, 8), 16, 64, (32, 2)),
        ((1, 8, 1), 8, None, (1, 1)),
    ],
)
def test_as_many_images_at_a_time_as_before_where_that_can_be(first, processes, most, found):
    layout = BatchLayout(*first)
    now = shared_out(layout.total, processes, layout.micro, most)
    assert (now.batch_size, now.accumulate) == found
    assert now.total == layout.total


@pytest.mark.parametrize(
    ("total", "processes", "pairs", "said"),
    [
        (32, 3, False, "cannot be shared evenly by 3 processes: start 2 or 4"),
        (32, 64, False, "evenly by 64 processes: start 32"),
        (12, 4, True, "cannot be shared into pairs by 4 processes: start 3 or 6"),
        (7, 2, False, "start 1 or 7"),
    ],
)
def test_the_nearest_numbers_of_processes_are_named(total, processes, pairs, said):
    with pytest.raises(UsageError, match=said):
        shared_out(total, processes, total, pairs=pairs)


def test_what_a_person_gives_is_taken_where_it_comes_to_the_same(tiny, tmp_path):
    run, first = tmp_path / "run", BatchLayout(4, 1, 2)

    def start(processes, on_cpu=True, **keys):
        given = tiny(**{"train__batch_size": 4, **keys})
        before = tiny(train__batch_size=4)
        return batches.of_start(run, before, given, first, processes, on_cpu)

    assert start(1, train__batch_size=2, train__accumulate=4) == BatchLayout(2, 4, 1)
    assert start(1) == BatchLayout(8, 1, 1)
    assert start(1, on_cpu=False) == BatchLayout(4, 2, 1)
    with pytest.raises(UsageError) as refused:
        start(2, train__batch_size=2)
    assert "run takes 8 images a step, and 2 processes x 2 images x 1 micro-batch are 4: " in str(
        refused.value
    )
    assert "--train.accumulate 2 makes up for it, or leave" in str(refused.value)
    with pytest.raises(UsageError, match="8 images a step cannot be shared evenly by 3 processes"):
        start(3)
    said = batches.told(first, first, BatchLayout(4, 2, 1), pairs=False)
    assert said is not None
    assert "see 4 at a time, 8 when the run began" in said
    assert batches.told(first, first, first, pairs=True) is None
    said = batches.told(BatchLayout(6, 1, 4), first, BatchLayout(8, 1, 3), pairs=True)
    assert said is not None
    assert said.endswith("Mixed are 8 images at a time, 6 then")


def test_runs_of_before_and_damaged_records_are_understood(tiny):
    before = tiny(train__batch_size=4)
    assert batches.first_of(before, {"processes": 2}) == BatchLayout(4, 1, 2)
    kept = BatchLayout(2, 2, 3).to_dict()
    assert batches.first_of(before, {"processes": 2, "batch": kept}) == BatchLayout(2, 2, 3)
    for damaged in ({}, {"processes": "2"}, {"batch": {"batch_size": 0}}, {"batch": [1]}):
        assert batches.first_of(before, damaged) is None
