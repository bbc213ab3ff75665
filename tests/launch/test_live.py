"""A run watched: its page while it trains and after it was killed, its film strip, its last words."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_run import configuration

from xdino import checkpoint, config
from xdino.errors import Stopped
from xdino_eval.during_training import Remembering
from xdino_eval.extraction import Options
from xdino_launch import local
from xdino_launch.console import ConsoleListener
from xdino_launch.report import film_strip, live
from xdino_launch.report.film_strip import FilmStrip, frames, thinned


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dark_and_bright):
    return dark_and_bright(tmp_path_factory.mktemp("data") / "it's <b>data")


@pytest.fixture
def tiny(folder):
    return partial(configuration, folder, runtime__device="cpu", runtime__keep_every=0)


@pytest.fixture(scope="module")
def judged(folder, tmp_path_factory):
    """A finished run with evaluations, and what was said of it."""
    run = tmp_path_factory.mktemp("runs") / "a run"
    told: list[str] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(ConsoleListener, "notice", lambda self, sentence: told.append(sentence))
    tree = configuration(folder, runtime__device="cpu", evaluate__every=1, evaluate__limit=20)
    local.run_pretraining(tree, run, command=["pretrain", "debug"])
    patch.undo()
    return SimpleNamespace(path=run, told=told, config=tree)


def test_the_last_words(judged, folder):
    verdict = json.loads((judged.path / "verdict.json").read_text())
    said = judged.told.index(verdict["sentence"])
    rows = [json.loads(line) for line in (judged.path / "metrics.jsonl").read_text().splitlines()]
    scores = [row["knn_top1"] for row in rows if "knn_top1" in row]
    assert (verdict["untrained"], verdict["score"]) == (scores[0], scores[-1])
    assert verdict["best"] == max(scores[1:])
    assert verdict["chance"] == 50
    assert f"k-NN {scores[-1]:.1f}; untrained {scores[0]:.1f}; chance 50.0" in verdict["sentence"]
    last = judged.told[-1]
    assert judged.told.index(last) > said
    assert last.splitlines()[1:] == [f"  {line}" for line in verdict["commands"]]
    assert f"xdino knn '{judged.path}' --data " in last
    assert f"(untrained {scores[0]:.1f}, chance 50.0)" in "\n".join(judged.told)


def test_what_was_said_can_be_typed(judged, xdino):
    import shlex

    for line in json.loads((judged.path / "verdict.json").read_text())["commands"]:
        words = shlex.split(line)
        code, _, error = xdino(*words[1:])
        assert (words[0], code) == ("xdino", 0), (line, error)


def test_the_page_and_the_film_of_a_finished_run(judged):
    page = (judged.path / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page
    assert "finished" in page
    assert "Film strip" in page
    assert "<b>data" not in page
    assert list(frames(judged.path / "film")) == [0, 4, 8]
    for path in frames(judged.path / "film").values():
        with Image.open(path) as frame:
            step = film_strip.TILE + film_strip.GAP
            assert frame.size == (6 * step - film_strip.GAP, 4 * step - film_strip.GAP)
        assert path.stat().st_size < 100_000


def test_neither_page_nor_film_changes_a_bit(judged, tiny, tmp_path):
    plain = tiny(runtime__report=False)
    local.run_pretraining(plain, tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "film").exists()
    assert (tmp_path / "verdict.json").exists()
    sums = [checkpoint.sha256(r / "backbone.safetensors") for r in (judged.path, tmp_path)]
    assert sums[0] == sums[1]
    one, two = (
        checkpoint.load_state(r / "checkpoints" / "last.pt") for r in (judged.path, tmp_path)
    )
    for role in ("student", "teacher"):
        for name, value in one["learner"][role].items():
            assert torch.equal(value, two["learner"][role][name]), name


@pytest.fixture
def hasty(monkeypatch):
    """Pages are drawn whenever they are wanted, whatever they cost."""
    monkeypatch.setattr(live, "FIRST", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)


def test_the_page_of_a_run_that_is_stopped(tiny, tmp_path, monkeypatch, hasty):
    """Under way it loads itself again; stopped, it no longer does, and says how to go on."""
    pages, continued = [], []
    write = live.write_report

    def written(*what, **how):
        path = write(*what, **how)
        pages.append(path.read_text())
        if len(pages) == 2 and not continued:
            os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(live, "write_report", written)
    command = ["pretrain", "debug", "--run", str(tmp_path)]
    with pytest.raises(Stopped):
        local.run_pretraining(tiny(evaluate__every=1), tmp_path, command)
    first, second, last = pages
    assert [page.count('http-equiv="refresh"') for page in pages] == [1, 1, 0]
    assert "before the first step: k-NN" in first
    assert "Under way; drawn at" in second
    assert "so far: " in last
    assert f"xdino pretrain debug --run {tmp_path}" in last
    assert not (tmp_path / "verdict.json").exists(), "nothing is decided yet"
    pages.clear()
    continued.append(True)
    local.run_pretraining(tiny(evaluate__every=1), tmp_path, command)
    assert "so far: " not in pages[-1]
    assert list(frames(tmp_path / "film")) == [0, 4, 8]


def test_a_page_that_cannot_be_drawn_costs_nothing_but_itself(
    tiny, tmp_path, monkeypatch, hasty, capsys
):
    def broken(*_, **__):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(live, "write_report", broken)
    monkeypatch.setattr(FilmStrip, "draw", broken)
    local.run_pretraining(tiny(evaluate__every=1), tmp_path)
    shown = capsys.readouterr().err
    assert shown.count("the page report.html failed") == 1
    assert shown.count("the film strip failed") == 1
    assert "untrained" in shown
    assert (tmp_path / "backbone.safetensors").exists()


def test_how_often_the_page_is_drawn(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def write(*_, **__):
        drawn.append(now[0])
        now[0] += 2.0  # seconds that it takes

    monkeypatch.setattr(live, "write_report", write)

    def watching() -> live.Watcher:
        quiet = ConsoleListener(Console(quiet=True))
        return live.Watcher(config.parse({"data": {"path": "x"}}), tmp_path, quiet, None)

    facts = {"images": 1, "data": "", "iteration": 0, "iterations": 10**6, "steps_per_epoch": 10,
             "total_batch": 1, "peak_lr": 1.0, "precision": "", "device": ""}  # fmt: skip
    with watching() as watcher:
        watcher.started(facts)
        for number in range(1, 2000):
            now[0] += 1.0
            watcher.step({"iteration": number, "epoch": number // 10, "loss": 1.0, "lr": 1.0})
    ends = now[0]
    assert drawn[0] == 10, "the end of the first epoch"
    assert len(drawn[:-1]) * 2.0 <= 0.01 * ends + 2.0
    assert len(drawn) > 8
    drawn.clear()
    with watching() as watcher:
        watcher.started(facts | {"steps_per_epoch": 10**5})
        for number in range(1, 2000):
            now[0] += 1.0
            watcher.step({"iteration": number, "epoch": 1, "loss": 1.0, "lr": 1.0})
    gaps = np.diff(drawn[:-1])
    assert len(gaps) > 3
    assert gaps.max() <= live.OFTEN + 25, "without epochs or evaluations, every few minutes"


def test_frames_are_thinned_evenly(tmp_path):
    assert thinned(range(5), most=16) == []
    kept: list[int] = []
    for iteration in range(0, 1010, 10):
        kept.append(iteration)
        kept = sorted(set(kept) - set(thinned(kept)))
    assert len(kept) == film_strip.MOST
    assert (kept[0], kept[-1]) == (0, 1000)
    assert np.diff(kept).max() <= 4 * np.diff(kept)[:-1].min()
    film = FilmStrip(tmp_path / "film", None, None, None)
    for iteration in range(20):
        film.keep(Image.new("RGB", (4, 4)), iteration)
    assert len(frames(tmp_path / "film")) == film_strip.MOST
    film.forget_after(10)
    assert max(frames(tmp_path / "film")) == 10


class Few:
    """A source of a few images in memory."""

    def __init__(self, images: list[np.ndarray | None], labels=None) -> None:
        self.images, self.labels, self.classes = images, labels, None
        self.name = "few"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        image = self.images[index]
        if image is None:
            raise OSError("damaged")
        return image


@pytest.mark.parametrize("count", [0, 1, 3])
def test_frames_of_few_images_and_of_networks_without_patches(judged, count):
    backbone = checkpoint.load_backbone(judged.path)
    images = [np.full((30, 20 + i, 3), 40 * i, np.uint8) for i in range(count)]
    source = Few([None, *images])
    film = FilmStrip(Path("nowhere"), source, source, None)
    frame = film.draw(backbone, lambda source: None)
    step = film_strip.TILE + film_strip.GAP
    size = (3 * step - film_strip.GAP, count * step - film_strip.GAP)
    assert (frame is None) if not count else (frame.size == size)
    if count:
        found = film_strip.tile(np.zeros((5, 5, 1), np.uint8))
        assert found.shape == (film_strip.TILE, film_strip.TILE, 3), "grey ones, too"


def test_several_evaluators_read_images_once():
    asked: list[str] = []

    class Counting(Options):
        pass

    options = Remembering.like(Counting(limit=5, batch_size=3))
    assert (options.limit, options.batch_size) == (5, 3)
    source, other = Few([]), Few([])

    def compute(self, backbone, split, *_, **__):
        asked.append(split)
        return SimpleNamespace(features=[0] * len(asked))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "features_of", compute)
        for _ in range(2):
            options.features_of(None, "train", source)
            options.features_of(None, "val", other)
            options.features_of(None, "some", source, np.arange(3))
            options.features_of(None, "both", source, tokens=("both",))
    assert asked == ["train", "val", "some", "both"]
    assert len(options.remembered(source).features) == 3, "the most of the class token's"
    assert options.remembered(Few([])) is None
