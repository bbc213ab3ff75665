"""`xdino look`, typed."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from xdino import config
from xdino.errors import RunFailed, UsageError
from xdino_launch.forecasting import candidates, trials


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "my images #1"
    root.mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 255, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    (root / "raw.cr2").write_bytes(b"?")
    (root / "39.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


@pytest.fixture
def quick(monkeypatch):
    """Few steps, in this process: starting another takes seconds."""
    monkeypatch.setattr(trials, "STEPS", 4)
    monkeypatch.setattr(trials, "SECONDS", 0.1)
    monkeypatch.setattr(trials, "in_a_process", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(candidates, "TRIED", 1)


def test_a_look_says_what_is_there_in_eighty_columns(folder, xdino):
    code, out, err = xdino("look", folder, "--survey-only")
    assert (code, err) == (0, "")
    for text in ("40 to train on", ".cr2", "rawpy", "39.png", "grey", "duplicates  none"):
        assert text in " ".join(out.split("\n")), text
    # But for the names of files, which are not broken.
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 80


def test_a_look_forecasts_and_writes_a_recipe_that_pretrain_takes(folder, tmp_path, xdino, quick):
    recipe = tmp_path / "mine.yaml"
    code, out, err = xdino("look", folder, "--minutes", 5, "--out", recipe)
    assert code == 0, err
    assert "In 5 min this machine trains:" in out
    assert "xdino pretrain" in out
    assert "a few steps" in err
    chosen = config.load(str(recipe))
    assert chosen.data.path == str(folder)
    assert chosen.model.in_chans == 1, "every image is grey"
    header = recipe.read_text().split("\n\n")[0]
    for word in ("command:", "hardware:", "hours:", "expected:"):
        assert word in header
    assert "  # " in recipe.read_text().split("\n\n", 1)[1], "each choice has its reason"
    code, _, err = xdino("look", folder, "--out", recipe)
    assert (code, "is there already" in err) == (2, True)


@pytest.mark.parametrize("what", ["nothing", "empty", "file"])
def test_what_cannot_be_looked_at_is_a_sentence(tmp_path, xdino, what):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "file":
        path.write_bytes(b"\0\1\2")
    code, out, err = xdino("look", path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_one_image_is_enough(tmp_path, xdino, quick):
    Image.new("RGB", (50, 40)).save(tmp_path / "only.png")  # black: grey by its pixels
    code, out, err = xdino("look", tmp_path, "--minutes", 0.1, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["survey"]["images"] == 1
    assert told["candidates"][told["chosen"]]["outlook"]["seconds"] > 0
    assert told["recipe"].startswith("# Chosen by")


def test_a_trial_runs_in_a_process_of_its_own():
    """Its memory is its own; what it raises comes back, and so does its death."""
    assert trials.in_a_process(os.getpid) != os.getpid()
    with pytest.raises(UsageError, match="no recipe is called"):
        trials.in_a_process(config.load, "debugg")
    with pytest.raises(RunFailed, match="want of memory"):
        trials.in_a_process(os.abort)
