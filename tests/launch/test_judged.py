"""Evaluation during and after pretraining: what it leaves, and that it disturbs nothing."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from PIL import Image

from xdino import checkpoint, config
from xdino.config import QUALITY_VIEWS
from xdino.errors import RunFailed, Stopped, UsageError
from xdino.pretraining import pretrain
from xdino_eval import evaluators, extraction, results
from xdino_launch import local


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dark_and_bright):
    return dark_and_bright(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(folder):
    def make(**evaluate) -> config.Config:
        return config.parse(
            {
                "model": {
                    "arch": "xcit_nano_12_p8",
                    "embed_dim": 32,
                    "depth": 1,
                    "num_heads": 2,
                    "drop_path": 0.3,  # training draws from torch's generator
                },
                "head": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 8},
                "crops": {"global_size": 24, "local_size": 16, "local_count": 2},
                "data": {"path": str(folder)},
                "optim": {"warmup_epochs": 1},
                "train": {"epochs": 2, "batch_size": 8},
                "evaluate": evaluate,
                "runtime": {
                    "device": "cpu",
                    "workers": 1,
                    "log_every": 1,
                    "keep_every": 0,
                    "wandb": "offline",
                },
            }
        )

    return make


@pytest.fixture(autouse=True)
def wandb(monkeypatch):
    """A stand-in for wandb: the rows that reach it, in order."""
    rows: list[dict] = []
    run = SimpleNamespace(log=rows.append, finish=lambda: None, define_metric=lambda *a, **k: None)

    class Settings(SimpleNamespace):
        model_fields: ClassVar = {}

    stub = SimpleNamespace(init=lambda **how: run, Settings=Settings)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return rows


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def of_last(run, sha256):
    """The results of the last teacher, and not of the best."""
    rows = json.loads((run / "results.json").read_text())
    return [row for row in rows if row["checkpoint"] == sha256]


def test_evaluation_leaves_numbers_and_the_same_bits(tiny, tmp_path, wandb, capsys):
    plain, judged = tmp_path / "plain", tmp_path / "judged"
    local.run_pretraining(tiny(), plain)
    assert not (plain / "results.json").exists()
    wandb.clear()
    local.run_pretraining(tiny(every=1, linear="logistic", limit=20), judged)
    one, two = (checkpoint.load_state(r / "checkpoints" / "last.pt") for r in (plain, judged))
    for role in ("student", "teacher"):
        assert one["learner"][role].keys() == two["learner"][role].keys()
        for name, value in one["learner"][role].items():
            assert torch.equal(value, two["learner"][role][name]), name
    sums = [checkpoint.sha256(r / "backbone.safetensors") for r in (plain, judged)]
    assert sums[0] == sums[1]

    (row,) = of_last(judged, sums[1])
    assert row["protocol"] == "linear, logistic regression"
    assert (row["train_size"], row["val_size"]) == (20, 12)
    assert row["features"] == "teacher, iteration 6"
    assert row["settings"][local.AT_END] == 20
    told = metrics(judged)
    assert [r["iteration"] for r in told if "knn_top1" in r] == [0, 3, 6]
    assert told[-1] == {
        "iteration": 6,
        "epoch": 2,
        "linear_top1": pytest.approx(row["top1"]),
        "linear_top5": 100.0,
    }
    assert wandb == told, "k-NN and the probe reach wandb too"
    assert "linear_top1" in capsys.readouterr().err


def test_a_run_killed_before_its_probe_comes_back_to_it(tiny, tmp_path, monkeypatch):
    configuration = tiny(linear="grid")

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(evaluators.EVALUATORS, "grid", kill)
        with pytest.raises(KeyboardInterrupt):
            local.run_pretraining(configuration, tmp_path)
    before = checkpoint.sha256(tmp_path / "backbone.safetensors")
    for _ in range(2):
        local.run_pretraining(configuration, tmp_path)
        (row,) = of_last(tmp_path, before)
        assert row["protocol"] == "linear, SGD grid on features"
        assert sum("linear_top1" in r for r in metrics(tmp_path)) == 1
    assert checkpoint.sha256(tmp_path / "backbone.safetensors") == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RunFailed("3 features are not finite"), MemoryError()]
)
def test_an_evaluation_that_fails_costs_its_number_alone(
    tiny, tmp_path, monkeypatch, capsys, error
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(extraction, "extract", fail)
    path = local.run_pretraining(tiny(every=1, linear="logistic"), tmp_path)
    assert checkpoint.load_backbone(path).origin.facts["iteration"] == 6
    shown = capsys.readouterr().err
    assert shown.count("the evaluation after epoch") == 2
    assert shown.count("the evaluation before the first step failed, training goes on") == 1
    assert "training goes on" in shown
    assert "the linear probe at the end failed" in shown
    assert [r["iteration"] for r in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "results.json").exists()


def test_a_defect_is_not_hidden(tiny, tmp_path):
    def evaluator(_):
        raise TypeError("a mistake of ours")

    with pytest.raises(TypeError, match="of ours"):
        pretrain(tiny(every=1), tmp_path, evaluator=evaluator)


def test_damaged_results_are_left_alone_and_the_run_is_whole(tiny, tmp_path, capsys):
    local.run_pretraining(tiny(linear="logistic"), tmp_path)
    (tmp_path / "results.json").write_text("[1, 2")
    local.run_pretraining(tiny(linear="logistic"), tmp_path)
    assert "does not hold result rows" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "[1, 2"


def test_a_probe_needs_labels_before_anything_is_trained(tiny, folder, tmp_path):
    flat = str(folder / "train" / "dark")
    with pytest.raises(UsageError, match=r"evaluate.linear asks for a probe.*--evaluate.linear"):
        local.run_pretraining(tiny(linear="grid", data=flat), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"evaluate.linear cannot be 'svm'"):
        tiny(linear="svm")


def test_several_protocols_at_once_say_what_the_commands_say(tiny, folder, tmp_path, xdino):
    plain, judged = tmp_path / "plain", tmp_path / "judged"
    local.run_pretraining(tiny(), plain)
    protocols = ["knn", "quality", "logistic"]
    local.run_pretraining(tiny(every=2, protocols=protocols, limit=30), judged)
    sums = [checkpoint.sha256(r / "backbone.safetensors") for r in (plain, judged)]
    assert sums[0] == sums[1], "training is not disturbed"
    before, after = [row for row in metrics(judged) if "knn_top1" in row]
    for told, weights, found in (
        (before, judged / "checkpoints" / "initial.safetensors", {"iteration": 0, "epoch": 0}),
        (after, judged, {"iteration": 6, "epoch": 2}),
    ):
        for name, *command in (
            ("knn", "knn", "--k", "20", "--json"),
            ("quality", "quality", "--limit", "30", "--views", str(QUALITY_VIEWS), "--json"),
            ("logistic", "linear", "--json"),
        ):
            code, out, error = xdino(command[0], weights, "--data", folder, *command[1:])
            assert code == 0, error
            (row,) = json.loads(out)
            scores = {"top1": row["top1"], "top5": row["top5"], **row["metrics"]}
            found |= {f"{name}_{n}": value for n, value in scores.items() if value is not None}
        found |= {"chance_top1": 50.0, "val_images": 12}
        assert told == found | {"chance_agreement": pytest.approx(100 / 24)}
    assert [r.checkpoint for r in results.load(judged / "results.json")][-3:] == [sums[1]] * 3


def test_the_untrained_network_is_scored_once(tiny, tmp_path, monkeypatch):
    """Stopped while it is scored, the run saves iteration 0 and comes back to it; later starts do
    not, nor does a run whose first steps were made without evaluations."""
    whole, broken, older = (tmp_path / name for name in ("whole", "broken", "older"))
    local.run_pretraining(tiny(every=1), whole)

    def stopping(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the signal ends this at once

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "extract", stopping)
        with pytest.raises(Stopped, match="after iteration 0 of 6"):
            local.run_pretraining(tiny(every=1), broken)
    local.run_pretraining(tiny(every=1), broken)
    assert [r["iteration"] for r in metrics(broken) if "knn_top1" in r] == [0, 3, 6]
    sums = [checkpoint.sha256(r / "backbone.safetensors") for r in (whole, broken)]
    assert sums[0] == sums[1]
    local.run_pretraining(tiny(every=1), broken)
    assert [r["iteration"] for r in metrics(broken) if "knn_top1" in r] == [0, 3, 6]

    local.run_pretraining(tiny(), older)
    local.run_pretraining(tiny(every=1), older)
    assert [r["iteration"] for r in metrics(older) if "knn_top1" in r] == [6]


def test_quality_alone_needs_no_labels(tiny, folder, tmp_path, capsys):
    flat = str(folder / "train" / "dark")
    local.run_pretraining(tiny(every=2, protocols=["quality"], limit=5, data=flat), tmp_path)
    told = [row for row in metrics(tmp_path) if "quality_rankme" in row]
    assert [row["iteration"] for row in told] == [0, 6]
    assert all(0 <= row["quality_agreement"] <= 100 for row in told)
    assert told[0]["chance_agreement"] == 20
    shown = capsys.readouterr().err
    assert "agreement of two views" in shown
    assert "xdino quality" in shown
    assert "xdino knn" not in shown, "there are no labels to type it for"
    assert "failed" not in shown
    with Image.open(tmp_path / "film" / "0000000006.webp") as frame:
        assert frame.width > 550, "image, attention, patches, and neighbours among the same images"
    with pytest.raises(UsageError, match=r"evaluate.every asks for k-NN during training.*--evalu"):
        local.run_pretraining(tiny(every=2, data=flat), tmp_path / "other")
