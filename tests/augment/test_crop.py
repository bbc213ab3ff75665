"""Boxes by torchvision's rule, for any image; the resize against Pillow's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from xdino.augment.multi_crop import ATTEMPTS, boxes, crop, draw, draw_batch, multi_crop

CROPS = multi_crop()

sizes = st.one_of(
    st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    st.tuples(st.integers(1, 400), st.integers(1, 50)).map(lambda t: (t[0], t[0] * t[1])),
    st.tuples(st.integers(1, 400), st.integers(1, 50)).map(lambda t: (t[0] * t[1], t[0])),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)


def by_the_rule(row: np.ndarray, H: int, W: int, ratio: tuple[float, float]) -> list[int]:
    """torchvision's get_params, written out for one view on the same numbers."""
    down, across = row["position"]
    for attempt in range(ATTEMPTS):
        area, aspect = row["area"][attempt] * H * W, math.exp(row["log_ratio"][attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            return [int(down * (H - h + 1)), int(across * (W - w + 1)), h, w]
    w, h = W, H
    if ratio[0] > W / H:
        h = round(W / ratio[0])
    elif ratio[1] < W / H:
        w = round(H * ratio[1])
    return [(H - h) // 2, (W - w) // 2, h, w]


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(0, 2**32))
def test_boxes_follow_torchvisions_rule_and_lie_inside(size, index):
    H, W = size
    row = draw(CROPS, 0, 0, index)
    found = boxes(row, H, W)
    assert found.dtype == np.int64
    top, left, h, w = found.T
    assert (h > 0).all()
    assert (w > 0).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= H).all()
    assert (left + w <= W).all()
    assert found.tolist() == [by_the_rule(view, H, W, (3 / 4, 4 / 3)) for view in row]


def test_a_ratio_that_no_box_of_a_square_has_still_gives_a_pixel():
    narrow = multi_crop(ratio=(0.2, 0.3), global_scale=(1.0, 1.0))
    found = boxes(draw(narrow, 0, 0, 0), 1, 1, (0.2, 0.3))
    assert (found[:, 2:] == 1).all()


def test_boxes_of_many_images_at_once_are_those_of_each():
    table = draw_batch(CROPS, 0, 1, np.arange(7))
    heights, widths = np.arange(7) * 40 + 1, np.arange(7)[::-1] * 90 + 1
    together = boxes(table, heights, widths)
    for column in range(7):
        one = boxes(table[:, column], int(heights[column]), int(widths[column]))
        assert (together[:, column] == one).all()


# Mean and 99.9th percentile of the absolute difference, in levels. Both kernels work in fixed
# point; the widest part of the difference is their choice of precision.
RESIZE_BOUND = (0.05, 2.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_against_pillow(channels):
    differences = []
    table = draw_batch(CROPS, 1, 0, np.arange(12))
    for column in range(12):
        image = load_sample_image(("china.jpg", "flower.jpg")[column % 2])[..., :channels].copy()
        for view, box in zip(CROPS.views, boxes(table[:, column], *image.shape[:2]), strict=True):
            top, left, h, w = box
            part = np.ascontiguousarray(image[top : top + h, left : left + w])
            pillow = Image.fromarray(part if channels == 3 else part[..., 0])
            pillow = pillow.resize((view.size, view.size), Image.Resampling.BICUBIC)
            theirs = np.asarray(pillow).reshape(view.size, view.size, channels)
            ours = crop(image, box, view.size)
            assert ours.dtype == np.uint8
            assert ours.shape == theirs.shape
            differences.append(np.abs(ours.astype(int) - theirs).ravel())
    difference = np.concatenate(differences)
    assert difference.mean() <= RESIZE_BOUND[0]
    assert np.percentile(difference, 99.9) <= RESIZE_BOUND[1]


def test_resize_never_reads_past_the_box():
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:20, 10:20] = 200
    assert (crop(image, np.array([10, 10, 10, 10]), 32) == 200).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_crop_writes_into_its_place(channels):
    image = np.random.default_rng(0).integers(0, 256, (31, 47, channels), dtype=np.uint8)
    batch = np.zeros((3, 16, 16, channels), np.uint8)
    box = np.array([2, 3, 20, 30])
    part = torch.from_numpy(image)[None, 2:22, 3:33].permute(0, 3, 1, 2)
    expected = F.interpolate(part, (16, 16), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    crop(image, box, 16, batch[1])
    assert (batch[1] == expected.numpy()).all()
    assert (crop(image, box, 16) == batch[1]).all()
    assert not batch[[0, 2]].any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crop_writes_between_other_columns(channels):
    image = np.random.default_rng(0).integers(0, 256, (31, 47, channels), dtype=np.uint8)
    wide = np.zeros((16, 20, channels), np.uint8)
    crop(image, np.array([2, 3, 20, 30]), 16, wide[:, 2:18])
    assert (wide[:, 2:18] == crop(image, np.array([2, 3, 20, 30]), 16)).all()
    assert not wide[:, [0, 1, 18, 19]].any()
