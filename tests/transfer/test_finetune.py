"""`xdino finetune`: runs, what they leave, how they stop and go on, on one process and on two."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from children import awaited, check_printed, child, done, ended_by, losses, pair, told, typed
from PIL import Image

from xdino import checkpoint
from xdino_eval import results
from xdino_eval.during_training import best_of
from xdino_transfer.classification.files import read_classifier
from xdino_transfer.finetuning.recipe import FineTuning

TINY = {
    "model.arch": "xcit_nano_12_p4", "model.embed_dim": 16, "model.depth": 2, "model.num_heads": 2,
    "view.size": 16, "train.batch_size": 8, "train.epochs": 3, "runtime.log_every": 1,
    "runtime.device": "cpu", "runtime.workers": 1, "runtime.report": "false", "train.precision": "fp32",
    "runtime.checkpoint_every": 2, "model.drop_path": 0.1, "model.head_scale": 1, "optim.lr": 0.3,
}  # fmt: skip


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """Three classes of 16 training and 4 val images, told apart by their colour."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (20, 24, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def words(run: Path, data: Path, recipe: str | None = "finetune_small", **keys: object) -> list:
    return typed("finetune", TINY, run, data, recipe, keys)


@pytest.fixture(scope="session")
def finished(classes, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    done(*words(run, classes, train__ema=0.9))
    return run


def test_a_run_leaves_classifier_backbone_scores_and_its_start(finished, classes, xdino):
    found = read_classifier(finished)
    assert found.classes == ("blue", "green", "red")
    assert (found.size, found.facts["iteration"], found.facts["iterations"]) == (16, 18, 18)
    backbone = checkpoint.load_backbone(finished)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(found.classifier.head(backbone(images)), found.classifier(images))
    rows = results.load(finished / "results.json")
    assert {row.settings["weights"] for row in rows} == {"best", "last"}
    (last,) = [row for row in rows if row.settings["weights"] == "last"]
    assert last.checkpoint == checkpoint.sha256(finished / "model.safetensors")
    assert last.settings["init"] == "from scratch"
    assert (last.train_size, last.val_size) == (48, 12)
    scored = [row for row in told(finished) if "val_top1" in row]
    assert [row["iteration"] for row in scored] == [0, 6, 12, 18]
    assert scored[-1]["val_top1"] == pytest.approx(last.top1)
    assert last.top1 > 40
    best = read_classifier(finished / "best.safetensors").facts
    assert best["val_top1"] == pytest.approx(max(row["val_top1"] for row in scored[1:]))
    assert best_of(finished) is None  # that is of pretraining
    (start,) = json.loads((finished / "environment.json").read_text())["starts"]
    assert start["init"] is None
    assert (finished / "config.yaml").read_text().startswith("kind: finetune\n")
    code, out, _ = xdino("runs", finished)
    assert code == 0
    assert "finished" in out
    assert f"{max(row['val_top1'] for row in scored):.1f}" in out
    code, out, error = xdino("report", finished)
    assert code == 0, error
    page = (finished / "report.html").read_text()
    assert "trained to tell classes apart" in page
    assert "top-1 of the classifier" in page


def test_the_report_says_whether_pretraining_paid(finished, tmp_path, xdino):
    page = tmp_path / "page.html"
    code, out, error = xdino("report", finished, "--beside", finished, "--out", page)
    assert (code, out.strip()) == (0, str(page)), error
    assert "Did pretraining pay?" in page.read_text()
    assert "at step 18" in page.read_text()
    assert "<td>from scratch</td><td>all</td>" in page.read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("model: {}\n")
    code, _, error = xdino("report", finished, "--beside", other, "--out", page)
    assert code == 2
    assert "is a run of xdino pretrain" in error


def test_a_finished_run_is_left_alone_and_another_configuration_is_named(finished, classes, xdino):
    before = checkpoint.sha256(finished / "model.safetensors")
    code, out, error = xdino("finetune", "--run", finished)
    assert (code, out.strip()) == (0, str(finished / "model.safetensors")), error
    assert "finished run of 18 iterations: left alone" in error
    kept = (finished / "results.json").read_text()
    (finished / "results.json").unlink()  # its last row comes back
    assert xdino("finetune", "--run", finished)[0] == 0
    (again,) = results.load(finished / "results.json")
    assert json.loads(kept)[-1]["checkpoint"] == again.checkpoint
    (finished / "results.json").write_text(kept)
    code, _, error = xdino(*words(finished, classes, train__ema=0.9, optim__lr=0.5))
    assert code == 2
    assert "optim.lr (0.3 against 0.5)" in error
    assert checkpoint.sha256(finished / "model.safetensors") == before


def test_commands_name_each_other(finished, tmp_path, xdino, classes):
    code, _, error = xdino("pretrain", "finetune_small", "--run", tmp_path / "x")
    assert code == 2
    assert "xdino finetune finetune_small --run DIR" in error
    code, _, error = xdino("finetune", "debug", "--run", tmp_path / "x")
    assert code == 2
    assert "xdino pretrain debug --run DIR" in error
    code, _, error = xdino("pretrain", "debug", "--run", finished)
    assert code == 2
    assert "holds a run of xdino finetune, which xdino pretrain cannot go on with" in error
    code, _, error = xdino("finetune", "finetune_small", "--run", tmp_path / "x", "--loss.koleo", 1)
    assert code == 2
    assert "loss is not a known key" in error
    code, _, error = xdino("finetune", "finetune_small", "--optim.lrr", 1, "--print-config")
    assert code == 2
    assert 'did you mean "lr"' in error
    assert not (tmp_path / "x").exists()


def test_the_printed_configuration_is_a_recipe(tmp_path, xdino):
    check_printed(xdino, FineTuning, tmp_path)


def test_killed_in_an_epoch_it_ends_in_the_same_bytes(finished, classes, tmp_path):
    """Everything that is random takes part: drop path, crops, RandAugment, erasing, mixing."""
    run = tmp_path / "run"
    arguments = words(run, classes, train__ema=0.9)
    for moment in (3, 9):
        ended_by(signal.SIGKILL, [child(*arguments)], run, moment)
    done(*arguments)
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 3
    assert 0 < starts[-1]["iteration"] < 18
    for name in ("model.safetensors", "backbone.safetensors", "best.safetensors"):
        assert checkpoint.sha256(run / name) == checkpoint.sha256(finished / name), name
    assert losses(run) == losses(finished)
    states = [checkpoint.load_state(r / checkpoint.STATE_FILE)["learner"] for r in (run, finished)]
    for name, value in states[0]["ema"].items():
        assert torch.equal(value, states[1]["ema"][name]), name


def test_a_signal_stops_it_and_the_same_command_goes_on(finished, classes, tmp_path):
    arguments = words(tmp_path / "run", classes, train__ema=0.9)
    ended_by(signal.SIGTERM, [child(*arguments)], tmp_path / "run", 4)
    done("finetune", "--run", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished)


def test_two_processes_are_one(classes, tmp_path):
    """With the same total batch; mixing pairs images within a process, so it is off."""
    same = {
        "mixup__probability": 0,
        "model__drop_path": 0,
        "optim__clip_grad": 1.0,
        "optim__name": "sgd",
    }
    alone = child(*words(tmp_path / "one", classes, **same))
    arguments = words(tmp_path / "two", classes, **{**same, "train__batch_size": 4})
    two = pair(*arguments)
    awaited(alone, *two)
    one, two = (read_classifier(tmp_path / name).classifier for name in ("one", "two"))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5), name
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_the_lines_of_the_page_on_clusters_judge_on_two_processes(finished, classes, tmp_path):
    """As torchrun starts them, but for the run, the data and the length of a probe."""
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    lines = [line.split() for line in page.splitlines() if line.startswith("    torchrun ")]
    judging = [line[line.index("xdino_launch") + 1 :] for line in lines if "pretrain" not in line]
    assert [verb for verb, *_ in judging] == ["linear", "score"]
    runs = [shutil.copytree(finished, tmp_path / verb) for verb, *_ in judging]
    processes = []
    for (verb, _, *rest), run in zip(judging, runs, strict=True):
        given = [classes if word == "IMAGENET" else word for word in rest]
        shorter = ["--epochs", 1] if verb == "linear" else []
        processes += pair(verb, run, *given, *shorter, "--device", "cpu")
    awaited(*processes)
    before = results.load(finished / "results.json")
    (probe,), (again,) = (results.load(run / "results.json")[len(before) :] for run in runs)
    assert (probe.protocol, probe.train_size, probe.val_size) == ("linear, SGD", 48, 12)
    assert again.checkpoint == before[-1].checkpoint
    assert (again.top1, again.val_size) == (before[-1].top1, 12)


def test_micro_batches_add_up_and_the_average_can_be_what_is_kept(classes, tmp_path):
    """On frozen features, so that no BatchNorm sees how many images come together."""
    same = {"mixup__probability": 0, "model__frozen": 4, "optim__name": "sgd", "train__epochs": 1,
            "evaluate__every": 0}  # fmt: skip
    parts = {"train__batch_size": 4, "train__accumulate": 2}
    average = {"train__ema": 0.5, "evaluate__weights": "average"}
    runs = [
        child(*words(tmp_path / "one", classes, **same)),
        child(*words(tmp_path / "two", classes, **same, **average, **parts)),
    ]
    awaited(*runs)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    states = [
        checkpoint.load_state(tmp_path / name / checkpoint.STATE_FILE)["learner"]
        for name in ("one", "two")
    ]
    heads = [state["classifier"]["head.weight"] for state in states]
    assert torch.allclose(*heads, rtol=1e-5, atol=1e-6)
    kept = read_classifier(tmp_path / "two").classifier.state_dict()
    assert torch.equal(kept["head.weight"], states[1]["ema"]["head.weight"])
    assert not torch.equal(kept["head.weight"], heads[1])
    last = told(tmp_path / "one")[-1]  # scored at the end alone
    assert (last["iteration"], "val_top1" in last) == (6, True)
