"""Pictures of any size, whole or in tiles: what is seen, what it takes, and what is found twice."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from xdino.backbone import Origin
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino.xcit import XCiT
from xdino_transfer.dense_files import LoadedDense
from xdino_transfer.detection import detector
from xdino_transfer.detection.objects import Detections
from xdino_transfer.detection.roi import RegionSettings
from xdino_transfer.detection.views import Views
from xdino_transfer.judging import overlays, seeing
from xdino_transfer.judging.memory import Estimate
from xdino_transfer.judging.seeing import Instance, Seeing
from xdino_transfer.judging.windows import cut, shown_size
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.resizing import bilinear
from xdino_transfer.segmentation import segmenter
from xdino_transfer.segmentation.scoring import segmented
from xdino_transfer.segmentation.views import TestViews as Whole

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def loaded(network, task, classes, views):
    spec = BackboneSpec("xcit_nano_12_p16", mean=MEAN, std=STD)
    origin = Origin()
    return LoadedDense(network.eval(), task, classes, MEAN, STD, spec, {}, views, origin)


class Pixels(nn.Module):
    def forward(self, images):
        return [images]


class Reds(nn.Module):
    """Logits of "not red" and "red", a cell for four pixels: what is near decides, and nothing else."""

    def __init__(self):
        super().__init__()
        self.conv_seg = nn.Conv2d(3, 2, 1)
        nn.init.zeros_(self.conv_seg.weight)
        nn.init.zeros_(self.conv_seg.bias)
        self.conv_seg.weight.data[1, 0] = 5

    def forward(self, levels):
        return self.conv_seg(nn.functional.avg_pool2d(levels[0], 4))


def blobs(height, width):
    y, x = np.mgrid[:height, :width]
    red = (np.sin(x / 17) + np.cos(y / 23) > 0.4) * 255
    return np.stack([red, 0 * red, 0 * red], 2).astype(np.uint8)


# Cutting


@pytest.mark.parametrize("size", [(500, 700), (97, 2000), (300, 300), (201, 1290)])
def test_the_inner_parts_of_tiles_are_the_picture(size):
    found = cut(size, size, lambda shown, _: shown[0] * shown[1], 200 * 200)
    assert found.estimate <= 200 * 200 < found.whole
    covered = np.zeros(size, int)
    for window in found.windows:
        top, left, bottom, right = window.inner
        assert window.top <= top < bottom <= window.top + window.height <= size[0]
        assert window.left <= left < right <= window.left + window.width <= size[1]
        covered[top:bottom, left:right] += 1
        # Inner parts keep away from edges that are not the picture's.
        margins = (top - window.top, left - window.left)
        assert all(m > 0 for m, edge in zip(margins, window.edges[:2], strict=True) if edge)
    assert (covered == 1).all()
    assert "tiles of" in found.told


def test_whole_where_it_fits_and_in_its_own_pixels():
    found = cut((400, 600), (400, 600), lambda shown, _: 10**9, 2 * 10**9)
    assert len(found.windows) == 1
    assert found.told == "600 x 400 pixels whole: about 1.0 GB of the 2.0 GB that may be taken"
    with pytest.raises(UsageError, match=r"a tile of 128 x 128 pixels takes about 1.0 GB, and 5"):
        cut((400, 600), (400, 600), lambda shown, _: 10**9, 5 * 10**7)
    assert len(cut((400, 600), (400, 600), lambda shown, _: 1, 10, tile=1000).windows) == 1
    assert shown_size((400, 600), 900, 300) == (400, 600)  # large enough for a test
    assert shown_size((400, 600), 1333, 800) == (800, 1200)  # small: as in a test
    assert shown_size((400, 600), 900, 200, exactly=True) == (200, 300)  # as a person asked
    assert shown_size((1, 3000), 1333, 800) == (
        1,
        3000,
    )  # a strip is not made a million pixels long
    one = cut((1, 3), (500, 1500), lambda shown, _: shown[0] * shown[1], 1 << 30, tile=128)
    assert [(w.height, w.width) for w in one.windows] == [(1, 1)] * 3  # never less than a pixel
    small = cut((400, 600), (800, 1200), lambda shown, _: shown[0] * shown[1], 300 * 300)
    assert all(max(small.seen(window)) <= 300 for window in small.windows)


def test_the_estimate_is_what_lives_at_once():
    """Of a convolution its input and output; it grows with the pixels, and with the answer."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.decode_head = Reds()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, images):
            for _ in range(3):
                out = self.conv(images)
            return out

    estimate = Estimate(One())
    pixels = 64 * 32
    forward = estimate((64, 32), (64, 32)) - 9 * pixels - 12 * 2 * pixels
    # The input, an output, and the next one before that goes.
    assert forward == round(1.3 * 4 * pixels * (3 + 8 + 8))
    model = segmenter.build(Pyramid(XCiT(16, 32, 4, 2)), "upernet", 3, 8)
    estimate = Estimate(model)
    small, large = estimate((64, 64), (64, 64)), estimate((128, 128), (128, 128))
    assert 3 < large / small < 4.5
    assert all(not p.is_meta for p in model.parameters())
    boxes = Estimate(detector.build(Pyramid(XCiT(16, 32, 4, 2)), 2, detector.Shape(8, 16, 8)))
    assert boxes((64, 64), (128, 128)) - boxes((64, 64), (64, 64)) == 17 * 100 * 3 * 64 * 64


# Segmentation


def test_strips_are_resized_twice_as_in_a_test(monkeypatch):
    logits = torch.randn(1, 3, 11, 7, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(seeing, "STRIP", 3 * 40 * 4)  # four rows a strip
    for seen, original in (((44, 28), (44, 28)), ((44, 28), (61, 40)), ((44, 28), (20, 13))):
        votes = bilinear(bilinear(logits, seen), original)[0]
        found = seeing.likeliest(logits, seen, original)
        best = votes.sort(0, descending=True).values
        clear = (best[0] - best[1] > 1e-5).numpy()
        assert clear.mean() > 0.98
        assert (found == votes.argmax(0).numpy())[clear].all()


def test_a_segmenter_sees_whole_pictures_as_in_a_test_and_in_tiles():
    network = segmenter.Segmenter(Pixels(), None, Reds())
    told = []
    own = loaded(network, "segmentation", ("dark", "red"), Whole(MEAN, STD, 256, 64))
    image = blobs(200, 312)
    whole = Seeing(own, notice=told.append).classes(image)
    expected = segmented(network, image, Whole(MEAN, STD, 312, 200)).argmax(0).numpy()
    assert np.array_equal(whole, expected)
    assert 0.2 < whole.mean() < 0.8
    looking = Seeing(own, tile=128, notice=told.append)
    assert len(looking.cut(image).windows) == 6
    assert np.array_equal(looking.classes(image), whole)
    # Less memory than the whole takes: tiles; each sentence once a size.
    needs = looking._estimate((200, 312), (200, 312))
    assert np.array_equal(Seeing(own, bound=needs // 2, notice=told.append).classes(image), whole)
    assert [sentence.split(":")[0] for sentence in told] == [
        "312 x 200 pixels whole",
        "312 x 200 pixels in 6 tiles of 128 x 128, about 1 MB each, as asked",
        told[2].split(":")[0],
    ]
    assert "whole it would take" in told[2]


# Detection


class OneSquare(nn.Module):
    """Finds every white square by its pixels; what a tile cuts off it finds in part."""

    def __init__(self):
        super().__init__()
        self.roi = nn.Module()
        self.roi.settings, self.roi.classes = RegionSettings(), 1

    def forward(self, images, shown):
        from scipy import ndimage

        h, w = shown[0].size
        numbered, count = ndimage.label(images[0, 0, :h, :w].numpy() > 0)
        boxes, masks = [], []
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
            boxes.append([columns.start, rows.start, columns.stop, rows.stop])
            masks.append(torch.from_numpy(numbered == number))
        scores = torch.linspace(0.9, 0.6, count) if count else torch.zeros(0)
        return [
            Detections(
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                scores,
                torch.zeros(count, dtype=torch.int64),
                torch.stack(masks) if masks else torch.zeros(0, h, w, dtype=torch.bool),
            )
        ]


def test_objects_of_tiles_are_those_of_the_whole_picture(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setattr(seeing, "Detector", OneSquare)
    monkeypatch.setattr(seeing, "Estimate", lambda network: lambda shown, original: 1)
    monkeypatch.setattr(seeing, "device_of", lambda network: torch.device("cpu"))
    image = np.zeros((400, 600, 3), np.uint8)
    squares = [(x, y) for x in range(5, 560, 65) for y in range(9, 360, 70)]
    for x, y in squares:
        image[y : y + 30, x : x + 26] = 255
    own = loaded(OneSquare(), "detection", ("square",), Views(MEAN, STD, test_side=100))
    expected = {(float(x), float(y), x + 26.0, y + 30.0) for x, y in squares}
    whole = Seeing(own, bound=10, tile=None).objects(image)
    assert {one.box for one in whole} == expected
    tiles = Seeing(own, bound=10, tile=160).objects(image)
    assert {one.box for one in tiles} == expected
    assert len(tiles) == len(squares)  # none twice, none in part
    assert [one.score for one in tiles] == sorted((one.score for one in tiles), reverse=True)
    assert tiles[0].mask.shape == (30, 26)
    mask = tiles[0].whole_mask((400, 600))
    assert mask.sum() == 30 * 26 == tiles[0].mask.sum()
    assert mask[round(tiles[0].box[1]), round(tiles[0].box[0])]


def instance(box, score, label=0, cut=False):
    left, top, right, bottom = box
    mask = np.ones((bottom - top, right - left), bool)
    return Instance(label, score, tuple(map(float, box)), top, left, mask, cut)


def test_what_is_found_twice_is_kept_once():
    whole, part = instance((0, 0, 10, 10), 0.6), instance((0, 0, 10, 3), 0.9, cut=True)
    again = instance((1, 0, 10, 10), 0.5)
    other, beside = instance((0, 0, 10, 10), 0.4, label=1), instance((9, 9, 20, 20), 0.3)
    found = seeing.merged([part, again, whole, other, beside], 0.5)
    assert [one.score for one in found] == [0.6, 0.4, 0.3]


def test_a_real_detector_from_a_threshold_on():
    network = detector.build(
        Pyramid(XCiT(16, 32, 4, 2)), 2, detector.Shape(8, 16, 8), None, RegionSettings(score=0.01)
    )
    own = loaded(network, "detection", ("a", "b"), Views(MEAN, STD, longer=200, test_side=64))
    image = blobs(96, 128)
    every = Seeing(own, threshold=0.0).objects(image)
    assert every
    limit = every[len(every) // 2].score
    some = Seeing(own, threshold=limit).objects(image)
    assert [one.score for one in some] == [one.score for one in every if one.score > limit]
    assert network.roi.settings.score == 0.01
    assert all(0 <= one.box[0] <= one.box[2] <= 128 for one in every)


@pytest.mark.parametrize("count", [1, 5])
def test_other_channels_than_a_photograph_has(count):
    own = loaded(
        segmenter.build(Pyramid(XCiT(16, 32, 4, 2, in_chans=count)), "upernet", 3, 8),
        "segmentation", ("a", "b", "c"), Whole((0.5,) * count, (0.5,) * count),
    )  # fmt: skip
    own = dataclasses.replace(own, mean=(0.5,) * count, std=(0.5,) * count)
    image = np.zeros((48, 64, count), np.uint8)
    assert Seeing(own).classes(image).shape == (48, 64)


# Pictures


def test_overlays_are_legible_at_any_size():
    names = ("background", "a" * 90, "c\ud800", *(f"class {i}" for i in range(40)))
    for size in ((3, 5), (40, 600), (900, 30)):
        classes = np.arange(size[0] * size[1], dtype=np.int64).reshape(size) % len(names)
        photograph = np.full((*size, 3), 128, np.uint8)
        picture = overlays.segmented(photograph, classes.astype(np.uint8), names)
        assert picture.width >= size[1]
        assert picture.height > size[0]
        assert (
            overlays.segmented(photograph, classes.astype(np.uint8), names, False).size
            == size[::-1]
        )
        objects = [instance((0, 0, size[1], size[0]), 0.9, 2), instance((1, 1, 1, 1), 0.5)]
        assert overlays.detected(photograph, objects, names).size == size[::-1]
    classes = np.array([[0, 1], [2, 2]], np.uint8)
    mask = overlays.palette_mask(classes)
    assert mask.mode == "P"
    assert np.array_equal(np.asarray(mask), classes)
    assert overlays.shares(classes, ("x", "y", "z", "w")) == {"z": 0.5, "x": 0.25, "y": 0.25}
