"""RUN/best.safetensors of whole runs: after stops and kills the same, and usable as weights."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
from tiny_run import configuration

from xdino import checkpoint
from xdino.errors import Stopped
from xdino.pretraining import pretrain
from xdino_eval import knn, results
from xdino_eval.during_training import BestTeacher, best_of
from xdino_launch.local import evaluated_splits, evaluator_of

from .listening import Ear, rows

SCORES = [30.0, 40.0, 60.0, 60.0, 50.0]  # before the first step, and of the four epochs


@pytest.fixture(scope="module")
def labelled(images, tmp_path_factory):
    """The twenty images as train/ and four of them as val/, of two classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, several in (("train", range(20)), ("val", range(8, 12))):
        for i in several:
            place = folder / split / "ab"[i // 10]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / f"{i:02}.png", place)
    return folder


@pytest.fixture
def scored(monkeypatch):
    """k-NN whose scores are `SCORES`, whatever it sees; a list of how often it was asked."""
    asked, plain = [], knn.evaluate

    def evaluate(*arguments, **options):
        (row,) = plain(*arguments, **options)
        asked.append(len(asked))
        return [replace(row, top1=SCORES[min(len(asked) - 1, 4)])]

    monkeypatch.setattr(knn, "evaluate", evaluate)
    return asked


@pytest.fixture
def train(labelled):
    """train(run, **overrides): four epochs of three iterations, each judged."""

    def run_there(run, listener=None, **overrides):
        common = {"train__epochs": 4, "evaluate__every": 1}
        settings = configuration(labelled, **(common | overrides))
        ear = listener or Ear()
        best = BestTeacher(run, settings.evaluate.limit, ear.notice)
        judge = evaluator_of(settings, evaluated_splits(settings), best)
        pretrain(settings, run, judge, ear)

    return run_there


def test_the_best_is_kept_beside_the_last(train, scored, labelled, tmp_path, xdino):
    train(tmp_path / "run")
    best = best_of(tmp_path / "run")
    assert (best.iteration, best.top1, best.last) == (6, 60.0, False)
    path = str(best.path)
    (row,) = results.load(tmp_path / "run" / "results.json")
    assert (row.settings["weights"], row.features, row.top1) == ("best", "teacher, iteration 6", 60)
    assert row.checkpoint == checkpoint.sha256(best.path)
    # WEIGHTS: the folder means the last, the file itself.
    for weights, iteration in ((tmp_path / "run", 12), (path, 6)):
        code, out, error = xdino("knn", weights, "--data", labelled, "--k", 5,
                                 "--json", "--out", tmp_path / "out.json")  # fmt: skip
        assert code == 0, error
        assert json.loads(out)[0]["features"] == f"teacher, iteration {iteration}"
    code, _, error = xdino("export", path, "--role", "student", "--out", tmp_path / "x.safetensors")
    assert (code, error.count("\n")) == (2, 1)
    assert "last.pt" in error


def test_a_stop_at_the_best_changes_nothing(train, scored, tmp_path):
    def stop():
        os.kill(os.getpid(), signal.SIGUSR2)

    train(tmp_path / "whole")
    scored.clear()
    with pytest.raises(Stopped):
        train(tmp_path / "broken", Ear(at=8, act=stop))
    train(tmp_path / "broken")
    one, two = (
        checkpoint.sha256(tmp_path / run / "best.safetensors") for run in ("whole", "broken")
    )
    assert one == two
    assert [r["iteration"] for r in rows(tmp_path / "broken") if "knn_top1" in r] == [
        0,
        3,
        6,
        9,
        12,
    ]


def test_a_kill_after_the_weights_ends_in_the_same_bytes(train, scored, tmp_path, monkeypatch):
    train(tmp_path / "whole")
    scored.clear()
    with monkeypatch.context() as patch:
        plain = results.append

        def killed(path, new, **options):
            if len(scored) == 3:
                raise KeyboardInterrupt
            plain(path, new, **options)

        patch.setattr(results, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken")
    assert best_of(tmp_path / "broken").iteration == 6
    scored.pop()  # the third evaluation is made again, and scores the same
    train(tmp_path / "broken")
    for name in ("best.safetensors", "backbone.safetensors"):
        one, two = (checkpoint.sha256(tmp_path / run / name) for run in ("whole", "broken"))
        assert one == two, name
    (row,) = results.load(tmp_path / "broken" / "results.json")
    assert row.checkpoint == checkpoint.sha256(tmp_path / "broken" / "best.safetensors")


def test_without_knn_there_is_none(train, tmp_path):
    train(tmp_path, evaluate__protocols=["quality"], train__epochs=1)
    assert best_of(tmp_path) is None
    assert not (tmp_path / "best.safetensors").exists()


def test_a_run_whose_states_are_gone_is_known_by_its_best(train, scored, tmp_path):
    train(tmp_path, train__epochs=1)
    for path in [*(tmp_path / "checkpoints").iterdir(), tmp_path / "backbone.safetensors"]:
        path.unlink()
    with pytest.raises(ValueError, match=r"is missing: its weights in best\.safetensors can start"):
        train(tmp_path, train__epochs=1)
