"""Whole pictures through a detector and a segmenter, to rows; and the detector's augmentation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xdino.errors import RunFailed, UsageError
from xdino.xcit import XCiT
from xdino_transfer.detection import detector, scoring
from xdino_transfer.detection.layouts.opening import open_annotated
from xdino_transfer.detection.objects import Detections, Objects
from xdino_transfer.detection.views import Views, cut_out, oriented_order, repeats_of, together
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import scoring as segmentation
from xdino_transfer.segmentation.maps import open_maps
from xdino_transfer.segmentation.segmenter import Segmenter
from xdino_transfer.segmentation.views import TestViews as Whole

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


# Segmentation


class Reds(nn.Module):
    """Logits of "not red" and "red", a cell for four pixels."""

    def __init__(self):
        super().__init__()
        self.conv_seg = nn.Conv2d(3, 2, 1)
        nn.init.zeros_(self.conv_seg.weight)
        nn.init.zeros_(self.conv_seg.bias)
        self.conv_seg.weight.data[1, 0] = 5

    def forward(self, levels):
        return self.conv_seg(nn.functional.avg_pool2d(levels[0], 4))


class Pixels(nn.Module):
    def forward(self, images):
        return [images]


def test_a_segmenter_is_scored(tmp_path):
    for part in ("train", "val"):
        labels = np.zeros((32, 48), np.uint8)
        labels[:, 24:] = 1
        image = np.repeat(labels[..., None] * 255, 3, 2)
        for folder, pixels in (("images", image), ("masks", labels)):
            (tmp_path / folder / part).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / folder / part / "a.png")
    (tmp_path / "classes.txt").write_text("dark\nred\n")
    _, val = open_maps(str(tmp_path))
    model = Segmenter(Pixels(), None, Reds())
    views = Whole(MEAN, STD, longer=96, shorter=64)
    row, scores = segmentation.score(model, val, views)
    assert (row.protocol, row.val_size) == ("semantic segmentation", 1)
    assert row.metrics == {"mIoU": 100, "mAcc": 100, "aAcc": 100}
    assert scores.iou.tolist() == [1, 1]
    row, _ = segmentation.score(model, val, views, (0.5, 1.0), flip=True)
    assert row.metrics["mIoU"] == 100
    assert row.settings == {"classes": 2, "scales": [0.5, 1.0], "flip": True}
    with torch.no_grad():
        model.decode_head.conv_seg.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="the probabilities are not finite"):
        segmentation.score(model, val, views)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match=r"the head tells 2 classes apart and .* has 3"):
        segmentation.score(model, open_maps(str(tmp_path))[1], views)


# Detection


def coco_set(root):
    """A picture of 30 x 20 pixels with two squares."""
    rows = [
        {"id": n, "image_id": 5, "category_id": 9, "bbox": [x, 4, 8, 10], "area": 80, "iscrowd": 0,
         "segmentation": [[x, 4, x + 8, 4, x + 8, 14, x, 14]]}
        for n, x in ((1, 2), (2, 20))
    ]  # fmt: skip
    tree = {
        "images": [{"id": 5, "height": 20, "width": 30, "file_name": "a.png"}],
        "annotations": rows,
        "categories": [{"id": 9, "name": "square"}],
    }
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / f"{split}2017" / "a.png")
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tree))
    return open_annotated(str(root))


def test_a_detector_is_scored(tmp_path):
    _, val = coco_set(tmp_path)
    model = detector.build(Pyramid(XCiT(16, 32, 4, 2)), 1, detector.Shape(8, 16, 8))
    views = Views(MEAN, STD, longer=96, test_side=64)
    found = scoring.score(model, val, views)
    assert found.row.protocol == "detection"
    assert {"box AP", "box AP small", "mask AP", "mask AP50"} <= found.row.metrics.keys()
    assert "box AP large" not in found.row.metrics  # there is nothing large to be found
    assert found.by_kind["box"].per_class.keys() == {9}

    def perfect(image, shown):
        masks = torch.from_numpy(np.stack([val.mask(0, row) for row in val.of(0)])).bool()
        boxes = torch.from_numpy(val.boxes)
        return [Detections(boxes, torch.ones(2), torch.zeros(2, dtype=torch.int64), masks)]

    model.forward = perfect
    metrics = scoring.score(model, val, views).row.metrics
    assert metrics["box AP"] == pytest.approx(100)
    assert metrics["mask AP"] == pytest.approx(100)
    other = detector.build(Pyramid(XCiT(16, 32, 4, 2)), 2, detector.Shape(8, 16, 8))
    with pytest.raises(UsageError, match=r"the heads know 2 classes and .* has 1"):
        scoring.score(other, val, views)


def test_a_whole_picture_is_shown_to_the_detector():
    views = Views(MEAN, STD)
    batch, shown = views.test(np.zeros((480, 640, 3), np.uint8))
    assert batch.shape == (1, 3, 800, 1088)
    assert (shown.size, shown.padded, shown.original) == ((800, 1067), (800, 1088), (480, 640))
    assert shown.scale == (1067 / 640, 800 / 480) * 2
    assert (batch[0, :, 0, 0] == -2).all()
    assert (batch[..., 1067:] == 0).all()


def test_objects_follow_their_picture():
    """The brightest pixels are the object's, whatever was drawn."""
    mask = torch.zeros(60, 90, dtype=torch.uint8)
    mask[10:30, 50:80] = 1
    image = np.repeat(mask.numpy()[..., None] * 255, 3, 2)
    whole = Objects(torch.tensor([[50.0, 10.0, 80.0, 30.0]]), torch.tensor([4]), mask[None])
    views = Views(MEAN, STD, (40, 60), 120, (60, 80), 400, (20, 40))
    seen, ways = set(), []
    for index in range(60):
        drawn = views.draw(0, 0, index)
        pixels, objects = views.training(image, whole, drawn)
        shorter, longer = sorted(pixels.shape[1:])
        assert shorter in (40, 60) or longer == 120
        ways.append((drawn[0] < 0.5, drawn[1] < 0.5))
        seen.add(len(objects))
        if not len(objects):
            continue
        assert objects.masks.shape[1:] == pixels.shape[1:]
        rows, columns = torch.where(objects.masks[0] > 0)
        if len(rows) < 200:  # a sliver at the side of a crop
            continue
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (objects.boxes[0] - torch.tensor(edges)).abs().max() <= 3
        assert (pixels[0] > 0)[objects.masks[0].bool()].float().mean() > 0.8
        assert objects.labels.tolist() == [4]
    assert seen == {0, 1}  # a crop may hold no object
    assert len(set(ways)) == 4
    empty = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), mask[None][:0])
    pixels, objects = views.training(image, empty, views.draw(0, 0, 0))
    assert objects.masks.shape == (0, *pixels.shape[1:])


def test_what_is_cut_off():
    masks = torch.ones(2, 10, 10)
    whole = Objects(torch.tensor([[0.0, 0, 4, 4], [2, 2, 9, 9]]), torch.tensor([1, 2]), masks)
    left = cut_out(whole, 4, 3, (5, 5))
    assert left.labels.tolist() == [2]
    assert left.boxes.tolist() == [[0, 0, 5, 5]]
    assert left.masks.shape == (1, 5, 5)


def test_a_batch_of_pictures():
    own = Objects(torch.tensor([[1.0, 1, 5, 5]]), torch.tensor([0]), torch.ones(1, 33, 40))
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 20, 70))
    images, shown, objects = together([(torch.ones(3, 33, 40), own), (torch.ones(3, 20, 70), none)])
    assert images.shape == (2, 3, 64, 96)
    assert [each.padded for each in shown] == [(64, 64), (32, 96)]
    assert objects[0].masks.shape == (1, 64, 64)
    assert objects[0].masks.sum() == images[0, 0].sum() == 33 * 40
    assert objects[1].masks.shape == (0, 32, 96)


def test_batches_hold_one_orientation():
    portrait = np.arange(23) % 3 == 0  # 8 of 23
    first, second = (oriented_order(portrait, 6, 0, epoch).reshape(-1, 6) for epoch in (0, 1))
    assert len(first) == 5  # 15 are filled up to 18, 8 to 12
    assert all(len(set(portrait[rows])) == 1 for rows in first)
    assert set(first.ravel()) == set(range(23))  # none is lost
    assert np.bincount(first.ravel()).max() == 2
    assert not np.array_equal(first, second)
    assert np.array_equal(oriented_order(portrait, 6, 0, 0).reshape(-1, 6), first)
    alone = oriented_order(portrait[:1], 4, 0, 0)
    assert alone.tolist() == [0] * 4
    assert repeats_of(alone).tolist() == [0, 1, 2, 3]
    repeats = repeats_of(first.ravel())
    assert sorted(zip(first.ravel()[repeats == 0], repeats[repeats == 0], strict=True)) == [
        (n, 0) for n in range(23)
    ]
    assert oriented_order(portrait[:0], 4, 0, 0).size == 0


def test_pictures_are_finished_as_one_by_one():
    """uint8 in a loader's threads, the rest of the view in batches."""
    views = Views(MEAN, STD, (40, 60), 120, (60, 80), 400, (20, 40))
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = torch.ones(1, 60, 90, dtype=torch.uint8)
    whole = Objects(torch.tensor([[10.0, 10.0, 60.0, 50.0]]), torch.tensor([0]), mask)
    drawn = [views.draw(0, 0, index, index % 2) for index in range(6)]
    wanted, _, objects = together([views.training(image, whole, own) for own in drawn])
    pixels, shown, same = together([views.cut(image, whole, own) for own in drawn])
    assert pixels.dtype == torch.uint8
    assert torch.equal(views.finish(pixels, shown), wanted)
    assert torch.equal(same[0].masks, objects[0].masks)
    assert not np.array_equal(views.draw(0, 0, 3), views.draw(0, 0, 3, 1))
