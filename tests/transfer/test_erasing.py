"""Random erasing: the published boxes, unit noise in them, draws by place."""

import numpy as np
import pytest
import torch

from xdino_transfer.classification.erasing import ATTEMPTS, Erasing, boxes
from xdino_transfer.draws import counters


def test_boxes_are_the_published_ones(downstream):
    _, told = downstream("classification")
    for case in told["erasing"]["cases"]:
        drawn = np.array(case["area_and_log_aspect_drawn"])[None]
        top, left, h, w = case["box"]
        H, W = case["height"], case["width"]
        position = [(top + 0.5) / (H - h + 1), (left + 0.5) / (W - w + 1)]
        found = boxes(drawn[..., 0], drawn[..., 1], np.array([position]), H, W)
        assert found[0].tolist() == case["box"], case


def test_erased_images_are_the_published_ones(downstream):
    tensors, told = downstream("classification")
    for i in range(3):
        image, result = tensors[f"erase/{i}/image"], tensors[f"erase/{i}/result"]
        top, left, h, w = told["erasing"]["cases"][i]["box"]
        changed = (image != result).any(0).nonzero()
        assert changed.min(0).values.tolist() == [top, left]
        assert changed.max(0).values.tolist() == [top + h - 1, left + w - 1]


def test_only_the_box_changes_and_it_is_unit_noise():
    always = Erasing(probability=1.0)
    images = torch.full((40, 3, 48, 64), 7.0)
    out = always.apply(images.clone(), 5, counters(2, np.arange(40)))
    drawn, _ = always.draw(5, counters(2, np.arange(40)), 48, 64)
    inside = []
    for image, (top, left, h, w) in zip(out, drawn.tolist(), strict=True):
        assert 0 < h < 48
        assert 0 < w < 64
        inside.append(image[:, top : top + h, left : left + w].flatten())
        image[:, top : top + h, left : left + w] = 7.0
    assert torch.equal(out, images)
    values = torch.cat(inside)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert len(values) / (40 * 3 * 48 * 64) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.04)


def test_a_quarter_of_the_images_and_those_of_the_place():
    published = Erasing()
    drawn, _ = published.draw(0, counters(0, np.arange(4000)), 224, 224)
    assert abs((drawn[:, 2] > 0).mean() - 0.25) < 0.02
    images = torch.zeros(6, 3, 32, 32)
    whole = published.apply(images.clone(), 0, counters(1, np.arange(6)))
    alone = published.apply(images[:1].clone(), 0, counters(1, np.array([4])))
    assert torch.equal(whole[4], alone[0])
    assert not torch.equal(whole, published.apply(images.clone(), 0, counters(1, np.arange(6), 1)))


def test_where_nothing_fits_nothing_is_erased():
    area, ratio = np.full((1, ATTEMPTS), 0.3), np.full((1, ATTEMPTS), 1.2)
    assert not boxes(area, ratio, np.zeros((1, 2)), 2, 40).any()
    images = torch.ones(3, 1, 1, 1)
    assert torch.equal(
        Erasing(probability=1.0).apply(images, 0, counters(0, np.arange(3))), torch.ones(3, 1, 1, 1)
    )
