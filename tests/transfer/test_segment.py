"""`xdino segment`: runs, what they leave, how they stop and go on, on one process and on two."""

import csv
import json
import math
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from children import awaited, check_printed, child, done, ended_by, losses, pair, told, typed
from PIL import Image

from xdino import checkpoint
from xdino.errors import UsageError
from xdino_eval import results
from xdino_transfer.dense_files import read_dense
from xdino_transfer.dense_training.segmenting.recipe import Segmentation

TINY = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": 16, "model.depth": 4, "model.num_heads": 2,
    "model.channels": 8, "model.drop_path": 0.1, "view.crop": 32, "view.longer": 128,
    "view.shorter": 32, "train.batch_size": 4, "train.epochs": 3, "train.precision": "fp32",
    "runtime.log_every": 1, "runtime.device": "cpu", "runtime.workers": 1, "runtime.report": "false",
    "runtime.checkpoint_every": 2, "optim.lr": 0.01,
}  # fmt: skip
STEPS = 12
NAMES = ("ground", "red", "green")


def paint(root: Path, split: str, count: int, seed: int) -> None:
    """Squares of two colours on a dark ground: images/, masks/ by a palette, classes.txt."""
    rng = np.random.default_rng(seed)
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    for number in range(count):
        pixels = rng.integers(0, 90, (40, 48, 3)).astype(np.uint8)
        labels = np.zeros((40, 48), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, 22, 2)
            labels[top : top + 18, left : left + 18] = label
            pixels[top : top + 18, left : left + 18, label - 1] = 220
        labels[:2] = 255
        Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
        mask = Image.fromarray(labels, "P")
        mask.putpalette(rng.integers(0, 255, 768, np.uint8).tobytes())
        mask.save(root / "masks" / split / f"{number}.png")


@pytest.fixture(scope="session")
def painted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("painted")
    paint(root, "train", 16, 0)
    paint(root, "val", 4, 1)
    return root


def words(run: Path, data: Path, recipe: str | None = "segment_small", **keys: object) -> list:
    return typed("segment", TINY, run, data, recipe, keys)


@pytest.fixture(scope="session")
def finished(painted, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    done(*words(run, painted, model__head="upernet"))
    return run


def test_a_run_leaves_segmenter_backbone_scores_and_its_start(finished, painted, xdino):
    found = read_dense(finished)
    assert (found.task, found.classes) == ("segmentation", NAMES)
    assert (found.facts["iteration"], found.facts["iterations"]) == (STEPS, STEPS)
    assert found.facts["init"] is None
    with torch.no_grad():
        assert found.network(torch.randn(1, 3, 40, 48)).shape[:2] == (1, 3)
    rows = results.load(finished / "results.json")
    assert {row.settings["weights"] for row in rows} == {"best", "last"}
    (last,) = [row for row in rows if row.settings["weights"] == "last"]
    assert last.protocol == "semantic segmentation"
    assert last.checkpoint == checkpoint.sha256(finished / "model.safetensors")
    assert (last.settings["init"], last.settings["head"]) == ("from scratch", "upernet")
    assert (last.train_size, last.val_size) == (16, 4)
    scored = [row for row in told(finished) if "val_miou" in row]
    assert [row["iteration"] for row in scored] == [0, 4, 8, 12]
    assert scored[-1]["val_miou"] == pytest.approx(last.metrics["mIoU"])
    with open(finished / "per_class.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == [*NAMES]
    mean = np.mean([float(line["IoU"]) for line in lines])
    assert mean == pytest.approx(last.metrics["mIoU"], abs=1e-3)
    logged = [row for row in told(finished) if "loss" in row]
    assert logged[-1]["loss"] == pytest.approx(
        logged[-1]["loss_decode"] + logged[-1]["loss_auxiliary"], rel=1e-5
    )
    assert "accuracy" in logged[-1]
    assert (finished / "views.png").stat().st_size > 1000
    assert (finished / "config.yaml").read_text().startswith("kind: segment\n")
    code, out, error = xdino("runs", finished)
    assert (code, "finished" in out) == (0, True), error
    assert f"{max(row['val_miou'] for row in scored):.1f}" in out
    assert "mIoU" in out.splitlines()[0]
    table = (finished / "per_class.csv").read_bytes()
    code, out, error = xdino("score", finished, "--data", painted, "--json")
    assert (finished / "per_class.csv").read_bytes() == table
    assert code == 0, error  # by the file alone, which says how pictures are shown
    assert json.loads(out)[0]["metrics"]["mIoU"] == pytest.approx(last.metrics["mIoU"])
    state = finished / "checkpoints" / "last.pt"
    for command in (("predict", state, painted / "images"), ("knn", state, "--data", painted)):
        code, _, error = xdino(*command, *(["--out", "x"] if command[0] == "predict" else []))
        assert code == 2
        assert f"{state} is what a run of xdino segment goes on with" in error
    code, _, error = xdino("finetune", "--run", finished)
    assert code == 2
    assert f"holds a run of xdino segment: xdino segment --run {finished}" in error
    code, _, error = xdino("report", finished)
    assert code == 0, error
    page = (finished / "report.html").read_text()
    assert "trained to tell the class of every pixel" in page
    assert "mIoU of the segmenter" in page
    assert f"mIoU <b>{last.metrics['mIoU']:.4g}</b>" in page


def test_a_finished_run_is_left_alone_and_another_configuration_is_named(
    finished, painted, xdino, tmp_path
):
    before = checkpoint.sha256(finished / "model.safetensors")
    code, out, error = xdino("segment", "--run", finished)
    assert (code, out.strip()) == (0, str(finished / "model.safetensors")), error
    assert f"finished run of {STEPS} iterations: left alone" in error
    assert "--extend" not in error
    code, _, error = xdino(*words(finished, painted, model__head="upernet", optim__lr=0.5))
    assert (code, "optim.lr (0.01 against 0.5)" in error) == (2, True), error
    code, _, error = xdino(*words(finished, painted, model__head="upernet", train__epochs=5))
    assert (code, "another folder for a run of 5" in error) == (2, True), error
    assert "--extend" not in error
    code, _, error = xdino("finetune", "finetune_small", "--run", finished)
    assert (code, "holds a run of xdino segment, which xdino finetune" in error) == (2, True), error
    code, _, error = xdino("pretrain", "segment_small", "--run", tmp_path / "x")
    assert (code, "xdino segment segment_small --run DIR" in error) == (2, True), error
    assert checkpoint.sha256(finished / "model.safetensors") == before


def test_the_printed_configuration_is_a_recipe(tmp_path, xdino):
    check_printed(xdino, Segmentation, tmp_path)


def test_killed_and_stopped_in_an_epoch_it_ends_in_the_same_bytes(finished, painted, tmp_path):
    """Everything that is random takes part: dropped paths and channels, crops, colours."""
    run = tmp_path / "run"
    arguments = words(run, painted, model__head="upernet")
    for moment, how in ((3, signal.SIGKILL), (7, signal.SIGTERM)):
        ended_by(how, [child(*arguments)], run, moment)
    done("segment", "--run", run)
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 3
    assert 0 < starts[-1]["iteration"] < STEPS
    assert losses(run) == losses(finished)
    for name in ("model.safetensors", "backbone.safetensors", "best.safetensors"):
        assert checkpoint.sha256(run / name) == checkpoint.sha256(finished / name), name


def test_two_processes_are_one(painted, tmp_path):
    """With the same total batch: BatchNorms see both processes' pictures."""
    same = {"evaluate__every": 3, "optim__lr": 0.001}  # paths and channels are dropped alike
    alone = child(*words(tmp_path / "one", painted, **same))
    arguments = words(tmp_path / "two", painted, **{**same, "train__batch_size": 2})
    two = pair(*arguments)
    awaited(alone, *two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    scores = [
        [row["val_miou"] for row in told(tmp_path / name) if "val_miou" in row]
        for name in ("one", "two")
    ]
    assert len(scores[1]) == 2  # each process looked at half of the pictures
    assert scores[1] == pytest.approx(scores[0], abs=0.1)
    one, two = (read_dense(tmp_path / name).network for name in ("one", "two"))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        # On a level of one cell a bias before a BatchNorm has no gradient but rounding, of which Adam
        # makes a whole step, and which that BatchNorm's mean takes away again.
        if name not in (
            "neck.net.layer_blocks.3.0.bias",
            "decode_head.scale_heads.3.0.bn.running_mean",
        ):
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5), name


def test_two_processes_score_as_one(finished, painted, tmp_path, xdino):
    """To the digit, and the masks of both lie in one zip."""
    words = {
        name: ("score", finished, "--data", painted, "--results", tmp_path / name / "results.json",
               "--submission", tmp_path / name / "s.zip")
        for name in ("one", "two")
    }  # fmt: skip
    awaited(*pair(*words["two"]))
    code, _, error = xdino(*words["one"])
    assert code == 0, error
    one, two = (results.load(tmp_path / name / "results.json") for name in ("one", "two"))
    assert len(one) == len(two) == 1
    assert two[0].metrics == one[0].metrics
    held = []
    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / name / "s.zip") as archive:
            held.append({file: archive.read(file) for file in archive.namelist()})
    assert held[0] == held[1]
    assert [*held[1]] == [f"{n}.png" for n in range(4)]


def test_from_weights_with_resting_statistics(finished, painted, tmp_path):
    """And the head comes along where the classes are the same; a resting trunk stays as it is."""
    same = {"model__drop_path": 0, "model__dropout": 0, "train__iterations": 3, "train__epochs": "null",
            "train__init": finished, "model__norm": "frozen", "model__head": "upernet",
            "evaluate__every": 0, "model__frozen": "true", "optim__warmup": 0, "optim__lr": 1e-4,
            "runtime__activation_checkpointing": "true"}  # fmt: skip
    for key in ("model__embed_dim", "model__depth", "model__num_heads", "model__channels"):
        same[key] = "null"
    same["model__channels"] = 8
    run = tmp_path / "run"
    done(*words(run, painted, **same))
    begun = checkpoint.read_weights(run / "checkpoints" / "initial.safetensors").tensors
    before, after = (read_dense(path).network.state_dict() for path in (finished, run))
    assert len(begun) > 20
    for name, value in begun.items():
        assert torch.equal(value, before[f"backbone.{name}"]), name
        assert torch.equal(value, after[f"backbone.{name}"]), name
    head, learned = (state["decode_head.conv_seg.weight"] for state in (before, after))
    assert not torch.equal(head, learned)
    assert torch.allclose(head, learned, atol=2e-4)  # three steps of it; a new one differs by 1e-2
    assert len(losses(run)) == 3
    assert told(run)[-1]["epoch"] == 1
    rows = results.load(run / "results.json")
    assert rows[-1].settings["init"].endswith("model.safetensors")
    assert rows[-1].settings["frozen"] is True


def test_a_linear_map_on_frozen_features(painted, tmp_path):
    """A step of two micro-batches is not one of a larger batch: its BatchNorm sees each by itself."""
    run = tmp_path / "run"
    done(*words(run, painted, model__frozen="true", train__epochs=1, train__accumulate=2))
    found = read_dense(run)
    frozen = checkpoint.load_backbone(run)  # whole, as it was: every verb reads it
    inner = found.network.backbone.network.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in frozen.state_dict().items())
    initial = checkpoint.read_weights(run / "checkpoints" / "initial.safetensors").tensors
    assert all(torch.equal(value, inner[name]) for name, value in initial.items())
    assert math.isfinite(losses(run)[-1])
    assert results.load(run / "results.json")[-1].settings["head"] == "linear_map"


def test_a_pyramid_gives_no_vector(finished):
    with pytest.raises(
        UsageError,
        match="stem and blocks of a network for pixels or boxes",
    ):
        checkpoint.load_backbone(finished)
