"""Segmenters and detectors of images of bands: learned, scored and used as of photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from xdino_transfer.dense_files import read_dense
from xdino_transfer.segmentation.views import recoloured

SMALL = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": 16, "model.depth": 4, "model.num_heads": 2,
    "train.batch_size": 2, "train.epochs": 1, "train.precision": "fp32", "runtime.device": "cpu",
    "runtime.workers": 0, "runtime.report": "false", "evaluate.every": 0, "optim.warmup": 0,
}  # fmt: skip
SEGMENT = {"model.channels": 8, "view.crop": 32, "view.longer": 64, "view.shorter": 32}
DETECT = {
    "view.sides": 48, "view.longer": 64, "view.before_crop": 48, "view.crop": "32,48",
    "view.test_side": 48, "heads.width": 16, "heads.hidden": 16, "heads.mask_width": 8,
    "heads.anchors": 32, "heads.candidates": 60, "heads.proposals": 30, "heads.regions": 16,
}  # fmt: skip
SENSOR = {"data.range": "0,4095", "data.rgb": "3,2,1"}
H, W, SIDE = 40, 48, 18


def written(path: Path, bands: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, bands)
    else:
        tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")


def fields(root: Path, bands: int, suffix: str) -> Path:
    """ROOT with images/, masks/ and COCO's layout of the same: a bright square in faint noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        images, boxes = [], []
        for number in range(1, count + 1):
            pixels, labels = (
                rng.integers(0, 900, (H, W, bands), np.uint16),
                np.zeros((H, W), np.uint8),
            )
            top, left = (int(x) for x in rng.integers(0, H - SIDE, 2))
            square = slice(top, top + SIDE), slice(left, left + SIDE)
            pixels[(*square, 0)], labels[square] = 3600, 1
            written(root / "images" / split / f"{number}{suffix}", pixels)
            written(root / f"{split}2017" / f"{number}{suffix}", pixels)
            (root / "masks" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(root / "masks" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}{suffix}", "width": W, "height": H})
            box = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0}
            boxes.append({**box, "bbox": [left, top, SIDE, SIDE], "area": SIDE * SIDE})
        tree = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "car"}]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tree))
    (root / "classes.txt").write_text("field\nroof\n")
    return root


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    return fields(tmp_path_factory.mktemp("bands") / "five", 5, ".tif")


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return fields(tmp_path_factory.mktemp("bands") / "four", 4, ".npy")


def words(kind: str, run: Path, data: Path, **more: object) -> list[object]:
    own = {**SMALL, **(SEGMENT if kind == "segment" else DETECT), "data.path": data}
    own |= {key.replace("__", "."): value for key, value in more.items()}
    return [
        kind,
        f"{kind}_small",
        "--run",
        run,
        *(w for k, v in own.items() for w in (f"--{k}", v)),
    ]


@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_bands_are_learned_scored_and_used(kind, five, four, tmp_path, xdino):
    run = tmp_path / "run"
    sensor = {key.replace(".", "__"): value for key, value in SENSOR.items()}
    code, out, error = xdino(*words(kind, run, five, **sensor))
    assert (code, out.strip()) == (0, str(run / "model.safetensors")), error
    found = read_dense(run)
    assert repr(found.channels) == "Bands(5, ((0.0, 4095.0),), (2, 1, 0))"
    assert 0.15 < found.mean[0] < 0.35
    assert found.mean[1:] == pytest.approx([450 / 4095] * 4, abs=0.01)
    assert Image.open(run / "views.png").getcolors(1 << 20) is not None
    # The same command, which does not say what was worked out, is of the same run.
    code, _, error = xdino(*words(kind, run, five, **sensor))
    assert (code, "left alone" in error) == (0, True), error
    last = json.loads((run / "results.json").read_text())[-1]["metrics"]
    code, out, error = xdino("score", run, "--data", five, "--json")
    assert code == 0, error
    assert json.loads(out)[0]["metrics"] == pytest.approx(last)
    images = five / "images" / "val"
    code, _, error = xdino("predict", run, images, "--out", tmp_path / "seen")
    assert code == 0, error
    overlay = np.asarray(Image.open(tmp_path / "seen" / "1-overlay.png"))
    assert overlay.shape[1:] == (W, 3) or kind == "segment"  # which has a legend
    # Others are refused, each in a sentence.
    code, _, error = xdino("score", run, "--data", four)
    assert code == 1
    assert "(it has 4 bands, and 5 are read of all images)" in error
    code, _, error = xdino("predict", run, four / "images" / "val", "--out", tmp_path / "none")
    assert code == 2
    assert "it has 4 bands, and 5 are read of all images" in error
    begin = words(kind, tmp_path / "other", four)
    for key in ("--model.arch", "--model.embed_dim", "--model.depth", "--model.num_heads"):
        begin[begin.index(key) + 1] = "null"
    code, _, error = xdino(*begin, "--init", run)
    assert code == 2
    assert "that were tried can be read as 5 bands: it has 4 bands, and 5 are read" in error
    code, _, error = xdino(*begin, "--init", run, "--data.range", "0,4095")
    assert code == 2
    assert "have 4 bands, and the network takes 5: start from other weights" in error
    assert not (tmp_path / "other").exists()


def test_arrays_are_learned_from_and_a_run_on_them_is_begun_with(four, tmp_path, xdino):
    """Bands without colours; a second run takes range, colours and statistics from the first."""
    first = tmp_path / "first"
    code, _, error = xdino(*words("segment", first, four, data__range="0,4095"))
    assert code == 0, error
    second = words("segment", tmp_path / "second", four)
    for key in ("--model.arch", "--model.embed_dim", "--model.depth", "--model.num_heads"):
        second[second.index(key) + 1] = "null"
    code, _, error = xdino(*second, "--init", first)
    assert code == 0, error
    one, two = (read_dense(tmp_path / name) for name in ("first", "second"))
    assert repr(two.channels) == "Bands(4, ((0.0, 4095.0),), ())"
    assert (one.spec.mean, one.spec.std) == (two.spec.mean, two.spec.std)
    odd = four.parent / "odd"
    fields(odd, 4, ".tif")
    written(odd / "images" / "train" / "2.tif", np.zeros((H, W, 7), np.uint16))
    code, _, error = xdino(*words("segment", tmp_path / "third", odd, data__range="0,4095"))
    assert code == 2
    assert "1 of the 4 pictures" in error
    assert "2.tif: it has 7 bands, and 4 are read of all images" in error


def test_colours_of_bands():
    """Red, green and blue as of a photograph; the others are blended with their mean, and not turned."""
    image = torch.rand(6, 4, 5) * 255
    before, rgb = image.clone(), (4, 0, 2)
    others = [1, 3, 5]
    for seed in range(30):
        drawn = np.random.default_rng(seed).uniform(0, 1, 9)
        found = recoloured(image, drawn, rgb)
        assert torch.equal(image, before)
        assert torch.equal(found[[*rgb]], recoloured(image[[*rgb]], drawn))
        alone = recoloured(image[others], drawn, ())
        torch.testing.assert_close(found[others], alone)
    never = np.full(9, 0.9)
    duller = recoloured(image, np.array([*never[:5], 0.1, 0.0, *never[7:]]), ())
    torch.testing.assert_close(duller, (image + image.mean(0)) / 2)
    assert torch.equal(recoloured(image, np.array([*never[:7], 0.1, 0.0]), ()), image)
    assert torch.equal(recoloured(image[:3], never, (2, 1, 0)), image[:3])
