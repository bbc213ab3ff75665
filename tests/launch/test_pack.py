"""`xdino pack`, and that a shrunk pack is named in everything that comes out of it."""

import json

import numpy as np
import pytest
from PIL import Image

from xdino import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for label in ("one", "two"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / label / f"{i}.jpg")
    return root


def test_a_run_on_a_shrunk_pack_says_so_everywhere(xdino, folder, tmp_path):
    out = tmp_path / "small.tar"
    code, printed, told = xdino("pack", folder, "--out", out, "--shorter-side", "24")
    assert (code, printed) == (0, f"{out}\n")
    assert "50 of 50 images shrunk to a shorter side of 24 pixels: results from this pack" in told
    name = f"{out} (shrunk to 24)"
    run = tmp_path / "run"
    command = ["pretrain", "debug", "--run", run, "--data.path", out, "--train.batch_size", "20"]
    code, _, told = xdino(*command, "--crops.mean", "null", "--crops.std", "null")
    assert code == 0, told
    assert f"40 images of {name}" in told.replace("\n", "")
    start = json.loads((run / "environment.json").read_text())["starts"][0]
    assert start["data"] == name
    assert len(start["data_fingerprint"]) == 16
    assert checkpoint.read_weights(run).facts["data"] == name
    code, printed, _ = xdino("knn", run, "--data", out, "--k", "5", "--json")
    assert code == 0
    assert json.loads(printed)[0]["data"] == name


def test_mistakes_of_pack_are_one_sentence(xdino, folder, tmp_path):
    for arguments, sentence in (
        ((folder, "--out", tmp_path / "x"), "must end in .tar"),
        ((tmp_path / "gone", "--out", tmp_path / "x.tar"), "does not exist"),
        ((folder, "--out", tmp_path / "x.tar", "--quality", "0"), "quality"),
    ):
        code, printed, told = xdino("pack", *arguments)
        assert (code, printed, told.count("\n")) == (2, "", 1)
        assert sentence in told
    assert list(tmp_path.iterdir()) == []
    code, _, told = xdino("pack", folder, "--out", "/proc/x.tar")
    assert (code, told.count("\n")) == (1, 1)
    assert "cannot write /proc/x.tar" in told
