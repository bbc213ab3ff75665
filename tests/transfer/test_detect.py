"""`xdino detect`: runs, what they leave, how they stop and go on, on one process and on two."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from children import awaited, check_printed, child, done, ended_by, losses, pair, told, typed

from xdino import checkpoint, config
from xdino.runtime.batch_layout import BatchLayout
from xdino_eval import results
from xdino_transfer.dense_files import read_dense
from xdino_transfer.dense_training.detecting import plan as planning
from xdino_transfer.dense_training.detecting.recipe import Detection
from xdino_transfer.detection import scoring

TINY = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": 16, "model.depth": 4, "model.num_heads": 2,
    "model.drop_path": 0.1, "view.sides": "48,64", "view.longer": 64, "view.before_crop": 48,
    "view.crop": "32,48", "view.test_side": 48, "heads.width": 16, "heads.hidden": 16,
    "heads.mask_width": 8, "heads.anchors": 32, "heads.candidates": 60, "heads.proposals": 30,
    "heads.regions": 16, "train.epochs": 3, "train.batch_size": 2, "train.precision": "fp32",
    "runtime.log_every": 1, "runtime.device": "cpu", "runtime.workers": 1,
    "runtime.report": "false", "runtime.checkpoint_every": 2, "evaluate.every": 0, "optim.lr": 0.01,
}  # fmt: skip


@pytest.fixture(scope="session")
def coco(tmp_path_factory, detection_data) -> Path:
    """Seven pictures to learn from, of which two stand upright, and two that score."""
    return detection_data.make(tmp_path_factory.mktemp("coco"), 7, 2, (48, 64))


def words(run: Path, data: Path, recipe: str | None = "detect_small", **keys: object) -> list:
    return typed("detect", TINY, run, data, recipe, keys)


@pytest.fixture(scope="session")
def finished(coco, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    done(*words(run, coco, evaluate__every=3))
    return run


def test_a_run_leaves_a_detector_its_scores_and_its_start(finished, coco, xdino, tmp_path):
    found = read_dense(finished)
    assert (found.task, found.classes) == ("detection", ("trouser", "sandal", "bag"))
    assert (found.facts["iteration"], found.facts["iterations"]) == (12, 12)  # 3 and 1 a step
    assert (found.views.test_side, found.views.longer) == (48, 64)
    rows = results.load(finished / "results.json")
    assert {row.settings["weights"] for row in rows} == {"best", "last"}
    (last,) = [row for row in rows if row.settings["weights"] == "last"]
    assert last.checkpoint == checkpoint.sha256(finished / "model.safetensors")
    assert (last.settings["init"], last.train_size, last.val_size) == ("from scratch", 7, 2)
    assert {"box AP", "box AP50", "box AR 100", "mask AP", "mask AP75"} <= last.metrics.keys()
    # The file alone finds the same as the run did.
    plan = planning.make_plan(config.load(str(finished / "config.yaml"), None, Detection))
    again = scoring.score(found.network, plan.val, found.views).row
    assert again.metrics == pytest.approx(last.metrics)
    scored = [row for row in told(finished) if "val_box_ap" in row]
    assert [row["iteration"] for row in scored] == [0, 12]
    assert scored[-1]["val_mask_ap"] == pytest.approx(last.metrics["mask AP"], rel=1e-5)
    parts = told(finished)[1]
    names = {"loss_rpn_class", "loss_rpn_box", "loss_class", "loss_box", "loss_mask"}
    assert parts["loss"] == pytest.approx(sum(parts[name] for name in names), rel=1e-4)
    with open(finished / "per_class.csv") as file:
        lines = [*csv.DictReader(file)]
    assert [line["class"] for line in lines] == [*found.classes]
    assert sum(int(line["objects"]) for line in lines) == len(plan.val.labels)
    # `score` writes the same table of classes.
    told_to = tmp_path / "results.json"
    assert xdino("score", finished, "--data", coco, "--results", told_to)[0] == 0
    table = told_to.with_name("per_class.csv").read_bytes()
    assert table == (finished / "per_class.csv").read_bytes()
    (start,) = json.loads((finished / "environment.json").read_text())["starts"]
    assert start["init"] is None
    assert (finished / "config.yaml").read_text().startswith("kind: detect\n")
    assert (finished / "views.png").stat().st_size > 1000
    annotated = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    image = next((coco / "val2017").iterdir())
    code, out, error = xdino("predict", finished, image, "--json")
    assert code == 0, error
    numbers = [[c["id"] for c in tree["categories"]] for tree in (json.loads(out), annotated)]
    assert numbers == [[3, 7, 90]] * 2  # predictions are of the data's own numbers
    code, out, _ = xdino("runs", finished)
    assert code == 0
    assert "finished" in out
    assert f"{max(row['val_box_ap'] for row in scored):.1f}" in out
    code, out, error = xdino("report", finished)
    assert code == 0, error
    page = (finished / "report.html").read_text()
    assert "trained to find objects" in page
    assert "Of the detector on the val images" in page
    assert "average precision of the detector" in page


def test_a_finished_run_is_left_alone_and_another_configuration_is_named(finished, coco, xdino):
    before = checkpoint.sha256(finished / "model.safetensors")
    code, out, error = xdino("detect", "--run", finished)
    assert (code, out.strip()) == (0, str(finished / "model.safetensors")), error
    assert "finished run of 12 iterations: left alone" in error
    kept = json.loads((finished / "results.json").read_text())
    (finished / "per_class.csv").unlink()  # as if it had been killed before
    (finished / "results.json").unlink()
    assert xdino("detect", "--run", finished)[0] == 0
    assert (finished / "per_class.csv").exists()
    (again,) = results.load(finished / "results.json")
    assert again.checkpoint == kept[-1]["checkpoint"]
    (finished / "results.json").write_text(json.dumps(kept))
    code, _, error = xdino(*words(finished, coco, optim__lr=0.5))
    assert code == 2
    assert "optim.lr (0.01 against 0.5)" in error
    assert checkpoint.sha256(finished / "model.safetensors") == before


def test_commands_name_each_other(finished, tmp_path, xdino):
    code, _, error = xdino("pretrain", "detect_small", "--run", tmp_path / "x")
    assert code == 2
    assert "xdino detect detect_small --run DIR" in error
    code, _, error = xdino("detect", "debug", "--run", tmp_path / "x")
    assert code == 2
    assert "xdino pretrain debug --run DIR" in error
    code, _, error = xdino("finetune", "finetune_small", "--run", finished)
    assert code == 2
    assert "holds a run of xdino detect, which xdino finetune cannot go on with" in error
    code, _, error = xdino("detect", "detect_smal", "--run", tmp_path / "x")
    assert code == 2
    assert 'did you mean "detect_small"?' in error
    code, _, error = xdino("detect", "detect_small", "--heads.widht", 1, "--print-config")
    assert code == 2
    assert 'did you mean "width"' in error
    assert not (tmp_path / "x").exists()


def test_the_printed_configuration_is_a_recipe(tmp_path, xdino):
    check_printed(xdino, Detection, tmp_path)


def test_stopped_and_killed_in_an_epoch_it_ends_in_the_same_bytes(finished, coco, tmp_path):
    """Everything that is random takes part: drop path, views, and what is sampled of them."""
    run = tmp_path / "run"
    arguments = words(run, coco, evaluate__every=3)
    for moment, sent in ((3, signal.SIGTERM), (7, signal.SIGKILL)):
        ended_by(sent, [child(*arguments)], run, moment)
    done("detect", "--run", run)
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 3
    assert 0 < starts[-1]["iteration"] < 12
    assert losses(run) == losses(finished)
    for name in ("model.safetensors", "backbone.safetensors", "best.safetensors", "per_class.csv"):
        assert checkpoint.sha256(run / name) == checkpoint.sha256(finished / name), name


def test_two_processes_are_one_and_one_goes_on_alone(coco, tmp_path):
    """With the same total batch, on pictures that are padded alike; losses by all processes' counts."""
    same = {"view__sides": 48, "view__crop_chance": 0, "evaluate__every": 3}
    alone = child(*words(tmp_path / "one", coco, **same))
    arguments = words(tmp_path / "two", coco, **same, train__batch_size=1)
    two = pair(*arguments)
    ended_by(signal.SIGTERM, two, tmp_path / "two", 6)
    last = child(*words(tmp_path / "two", coco, **same))
    awaited(alone, last)
    one, two = (read_dense(tmp_path / name).network for name in ("one", "two"))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5), name
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    before = [
        next(row for row in told(tmp_path / name) if "val_box_ap" in row) for name in ("one", "two")
    ]
    for key in ("iteration", "val_images", "val_box_ap", "val_mask_ap"):
        assert before[0][key] == before[1][key]
    assert before[0]["val_box_ap"] > 0


def test_two_processes_score_as_one(finished, coco, tmp_path, xdino):
    """To the digit, and each picture by one of them; one row is written."""
    words = {
        name: ("score", finished, "--data", coco, "--split", "train", "--shorter-side", "64",
               "--results", tmp_path / name / "results.json", "--submission", tmp_path / name / "d.json")
        for name in ("one", "two")
    }  # fmt: skip
    awaited(*pair(*words["two"]))
    code, _, error = xdino(*words["one"])
    assert code == 0, error
    one, two = (results.load(tmp_path / name / "results.json") for name in ("one", "two"))
    assert len(one) == len(two) == 1
    assert two[0].metrics == one[0].metrics
    assert two[0].val_size == 7
    for name in ("per_class.csv", "d.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    found = json.loads((tmp_path / "two" / "d.json").read_text())
    assert len({row["image_id"] for row in found}) > 1
    assert {row["category_id"] for row in found} <= {3, 7, 90}
    assert read_dense(finished).facts["category_ids"] == [3, 7, 90]


def test_statistics_can_rest_and_blocks_be_computed_again(finished, coco, tmp_path):
    """From weights with their heads, two micro-batches a step: BatchNorms do not move."""
    shape = dict.fromkeys(("model__embed_dim", "model__depth", "model__num_heads"), "null")
    keys = {
        **shape, "model__arch": "null", "model__norm": "frozen", "model__drop_path": 0,
        "train__epochs": 1, "train__accumulate": 2, "optim__warmup": 0,
    }  # fmt: skip
    again = {"runtime__activation_checkpointing": "true"}
    runs = [
        child(*words(tmp_path / "one", coco, **keys), "--init", finished),
        child(*words(tmp_path / "two", coco, **keys, **again), "--init", finished),
    ]
    awaited(*runs)
    before = read_dense(finished).network.state_dict()
    one, two = (read_dense(tmp_path / name).network.state_dict() for name in ("one", "two"))
    moved = 0
    for name, value in before.items():
        assert torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6), name
        moved += not torch.equal(value, one[name])
        if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(value, one[name]), name
    assert moved > 50
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    (start,) = json.loads((tmp_path / "one" / "environment.json").read_text())["starts"]
    assert start["init"] == str(finished / "model.safetensors")


def test_every_picture_comes_in_an_epoch_and_the_portraits_together(coco):
    def recipe(**keys: object) -> Detection:
        given = {**TINY, "data.path": coco, "train.accumulate": 3, **keys}
        return config.load("detect_small", {k: str(v) for k, v in given.items()}, Detection)

    plan = planning.make_plan(recipe())
    loader = planning.loader_of(plan.config, plan.train, plan.views, 0, 1, workers=0)
    assert (plan.steps_per_epoch, loader.steps_per_epoch) == (
        2,
        2,
    )  # 3 + 1 micro-batches, filled up
    seen, kept = [], {}
    for batch in loader.iterate(0, 2):
        assert len(set(plan.train.portrait[batch.indices])) == 1
        pixels, shown, objects = batch.together()
        assert pixels.dtype == torch.uint8
        assert all(
            own.masks.shape[1:] == lies.padded for own, lies in zip(objects, shown, strict=True)
        )
        seen += zip(batch.indices.tolist(), batch.repeats.tolist(), strict=True)
        kept[batch.iteration, len(seen)] = pixels
    assert {index for index, _ in seen} == set(range(7))
    assert len(set(seen)) == len(seen) == 12  # a picture that comes again is cut otherwise
    resumed = [batch.together()[0] for batch in loader.iterate(1, 2)]
    assert all(torch.equal(*pair) for pair in zip(resumed, [*kept.values()][3:], strict=True))
    one_each = recipe(**{"train.batch_size": 1})
    halves = [
        planning.loader_of(one_each, plan.train, plan.views, rank, 2, workers=0) for rank in (0, 1)
    ]
    for step in (0, 1):
        for micro in range(3):
            both = [half.images_at(step, micro)[1] for half in halves]
            assert np.array_equal(np.concatenate(both), loader.images_at(step, micro)[1])
    # A run that was begun so keeps its steps where a process takes another number at a time.
    given = {"train.batch_size": 3, "train.accumulate": 2}
    first = BatchLayout(2, 3, 1)
    other = planning.loader_of(
        recipe(**given), plan.train, plan.views, 0, 1, workers=0, first=first
    )
    assert other.steps_per_epoch == 2
    for step in (0, 1):
        both = [
            np.concatenate([x.images_at(step, i)[1] for i in range(x.accumulate)])
            for x in (loader, other)
        ]
        assert np.array_equal(*both)
