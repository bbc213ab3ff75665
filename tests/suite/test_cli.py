"""`xdino retrieval`, `copydetection` and `davis` with an XCiT, from files to a row of results."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from xdino_eval.results import load


def picture(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def oxford(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"image_{i}" for i in range(5)]
    for name in names:
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        picture(tmp_path / "roxford5k/jpg" / f"{name}.jpg", image)
    entry = {"bbx": [0, 0, 20, 20], "easy": [0], "hard": [2], "junk": []}
    truth = {"imlist": names, "qimlist": names[:1], "gnd": [entry]}
    (tmp_path / "roxford5k/gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    return tmp_path


def test_retrieval(xdino, oxford, small_xcit):
    out = oxford / "results.json"
    code, text, err = xdino("retrieval", small_xcit, "--data", oxford, "--size", 32, "--multiscale",
        "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    (row,) = load(out)
    assert row.metrics["mAP easy"] == 100, "the query is one of the images"
    assert (row.features, row.top1) == ("teacher, iteration 7", None)
    assert f"mAP medium    {row.metrics['mAP medium']:5.2f}" in text
    assert len(row.checkpoint) == 64


def test_a_ground_truth_that_runs_code(xdino, oxford, small_xcit):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(oxford / "trace"),)

    path = oxford / "roxford5k/gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps({"imlist": Evil(), "qimlist": [], "gnd": []}))
    code, text, err = xdino("retrieval", small_xcit, "--data", oxford)
    assert (code, text) == (1, "")
    assert "mkdir, which plain values have no need of: refused, nothing of it ran" in err
    assert err.count("\n") == 1
    assert not (oxford / "trace").exists()


def test_copydetection(xdino, tmp_path, small_xcit):
    rng = np.random.default_rng(0)
    for name in ("2000", "2001", "2002"):
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        picture(tmp_path / f"original/{name}00.png", image)
        picture(tmp_path / f"strong/{name}01.png", image)
        picture(tmp_path / f"others/{name}.png", image[::-1])
    code, text, err = xdino("copydetection", small_xcit, "--data", tmp_path, "--size", 24, "--json",
        "--whitening", tmp_path / "others", "--distractors", tmp_path / "others",
    )  # fmt: skip
    assert code == 0, err
    (row,) = json.loads(text)
    assert row["metrics"]["mAP strong"] == 100, "copies that are equal to their originals"
    assert row["settings"]["whitening"] == 3


def test_davis(xdino, tmp_path, small_xcit):
    for number in range(3):
        mask = np.zeros((64, 64), np.uint8)
        mask[16:40, 8 + 4 * number : 32 + 4 * number] = 1
        picture(tmp_path / f"Annotations/480p/v/{number:05}.png", mask)
        image = np.repeat(mask[..., None] * 200, 3, 2)
        picture(tmp_path / f"JPEGImages/480p/v/{number:05}.jpg", image)
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("v\n")
    arguments = ["davis", small_xcit, "--data", tmp_path, "--size", 64]
    code, text, err = xdino(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    (row,) = json.loads(text)
    assert 0 < row["metrics"]["J mean"] <= 100
    with Image.open(tmp_path / "out/v/00002.png") as mask:
        assert (mask.mode, mask.size) == ("P", (64, 64))
    code, _, err = xdino(*arguments, "--out", tmp_path / "out", "--split", "train")
    assert code == 2
    assert "ImageSets/2017/train.txt is missing" in err
    assert err.count("\n") == 1
    # What is more than everything is everything.
    large = ("--context", 10_000, "--radius", 10_000, "--topk", 10_000)
    code, text, err = xdino(*arguments, *large, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    for option, words in (
        (("--size", 10**30), "64<=x<=8192"),
        (("--temperature", "inf"), "--temperature"),
        (("--temperature", "nan"), "--temperature"),
    ):
        code, _, err = xdino(*arguments, *option, "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err


def test_a_size_that_no_memory_holds(xdino, tmp_path, small_xcit):
    for name in ("original/200000.png", "strong/200001.png"):
        picture(tmp_path / name, np.zeros((30, 40, 3), np.uint8))
    code, _, err = xdino("copydetection", small_xcit, "--data", tmp_path, "--size", 10**30)
    assert (code, err.count("\n")) == (2, 1)
    assert "1<=x<=8192" in err
