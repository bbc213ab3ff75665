"""COCO's average precision: the published numbers, a second implementation's, and cases known by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from xdino.errors import UsageError
from xdino_transfer.detection.average_precision import NAMES, results_of, score
from xdino_transfer.detection.objects import Detections

from .conftest import FOLDER


@pytest.fixture(scope="module")
def published():
    told = json.loads((FOLDER / "golden-downstream.json").read_text())["coco_ap"]
    truth, results = (json.loads((FOLDER / name).read_text()) for name in told["files"])
    return truth, results, told


@pytest.mark.parametrize(("kind", "key"), [("box", "bbox"), ("mask", "segm")])
def test_the_published_figures(published, kind, key):
    truth, results, told = published
    found = score(truth, results, kind)
    assert list(found.values) == told["names"]
    np.testing.assert_allclose([*found.values.values()], told[key], rtol=1e-12)
    assert [*found.per_class] == told["categories"]
    np.testing.assert_allclose([*found.per_class.values()], told["per_class_AP"][key], rtol=1e-12)


def second_opinion(truth, results, kind):
    from faster_coco_eval import COCO, COCOeval_faster

    other = {"box": "segmentation", "mask": "bbox"}[kind]
    rows = [{key: value for key, value in row.items() if key != other} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        evaluation = COCOeval_faster(
            coco, coco.loadRes(rows), {"box": "bbox", "mask": "segm"}[kind]
        )
        evaluation.run()
    return evaluation.stats[:12]


def made(rng, boxes):
    """Pictures with a crowd, without objects, and with more than 100 detections of tied scores."""
    images = [{"id": n, "height": 60, "width": 80} for n in (5, 9, 700)]
    truth, results = [], []
    for image, count in ((5, 12), (9, 0)):
        for _ in range(count):
            left, top = rng.integers(0, 50, 2).tolist()
            width, height = rng.integers(4, 10, 2).tolist()
            truth.append((image, [left, top, width, height], rng.integers(0, 2)))
    for image in (5, 9, 700):
        for n in range(boxes):
            left, top, width, height = truth[n % 12][1] if truth else (1, 2, 5, 6)
            jitter = rng.integers(-1, 2, 4)
            box = np.maximum(np.add([left, top, width, height], jitter), 1).astype(float)
            mask = np.zeros((60, 80), bool)
            x, y, w, h = box.astype(int)
            mask[y : y + h, x : x + w] = True
            found = Detections(
                torch.tensor([[x, y, x + w, y + h]]).float(),
                torch.tensor([rng.integers(1, 5) / 5.0]),
                torch.tensor([n % 2]),
                torch.from_numpy(mask)[None],
            )
            results += results_of(image, found, [3, 44])
    rows = []
    for number, (image, (x, y, w, h), label) in enumerate(truth, start=1):
        rows.append(
            {
                "id": number,
                "image_id": image,
                "category_id": [3, 44][label],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": int(number % 5 == 0),
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    categories = [{"id": 3, "name": "a"}, {"id": 44, "name": "b"}, {"id": 90, "name": "absent"}]
    return {"images": images, "annotations": rows, "categories": categories}, results


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_a_second_implementation_gives_the_same_digits(published, kind):
    truth, results = made(np.random.default_rng(0), 130)
    for whole, found in ((truth, results), published[:2]):
        before = json.dumps([whole, found])
        ours = score(whole, found, kind)
        assert json.dumps([whole, found]) == before
        theirs = second_opinion(json.loads(json.dumps(whole)), found, kind)
        told = [-1 if ours.values[name] is None else ours.values[name] for name in NAMES]
        np.testing.assert_allclose(told, theirs, rtol=1e-12, atol=1e-15)


def test_cases_that_are_known():
    rng = np.random.default_rng(1)
    truth, _ = made(rng, 0)
    nothing = score(truth, [], "box")
    assert (nothing.values["AP"], nothing.values["AR 100"]) == (0, 0)
    assert nothing.per_class == {3: 0, 44: 0, 90: None}
    perfect = [
        {**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for row in truth["annotations"]
        if not row["iscrowd"]
    ]
    found = score(truth, perfect, "box")
    assert found.values["AP"] == found.values["AP75"] == 1
    assert found.values["AP large"] is None
    with pytest.raises(UsageError, match="results of image 12, which is not among"):
        score(truth, [{**perfect[0], "image_id": 12}], "box")
