"""The picture of the first batch: originals beside their crops, frames where these were cut."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.augment import boxes, draw_batch, multi_crop, picture
from xdino.augment.picture import save_views
from xdino.errors import RunFailed


def drawn(path, *arguments, **how) -> np.ndarray:
    save_views(path, *arguments, **how)
    return np.asarray(Image.open(path))


def test_one_that_cannot_be_written(tmp_path):
    group = torch.zeros(2, 3, 3, 16, 16)
    (tmp_path / "views.png").mkdir()
    with pytest.raises(RunFailed, match=r"cannot write .*views\.png"):
        save_views(tmp_path / "views.png", [group], [0.5] * 3, [0.25] * 3)
    assert os.listdir(tmp_path) == ["views.png"], "nothing is left beside it"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("local", [1, 4, 5, 6, 8])
def test_no_cell_is_empty(tmp_path, channels, local):
    """Between the gaps, below the words, nothing is white."""
    groups = [torch.zeros(2, 3, channels, 16, 16), torch.ones(local, 3, channels, 8, 8)]
    originals = np.full((3, 20, 30, channels), 60, np.uint8)
    found = drawn(
        tmp_path / "a.png", groups, [0.5] * channels, [0.25] * channels, originals.__getitem__
    )
    rows = found[picture.HEAD :]
    assert len(rows) == 3 * (128 + picture.GAP)
    first = rows[:128]
    white = (first == 255).all(2)
    columns = white.all(0).sum()
    assert columns <= picture.GAP * 4 + 4 * 10 + 60, "only gaps, and what words need"
    sides = {tuple(pixel) for pixel in rows[20, ::3]}
    assert {(60, 60, 60), (128, 128, 128), (191, 191, 191)} <= sides, "zero is the mean"


def test_crops_are_framed_where_they_were_cut(tmp_path):
    crops = multi_crop(global_size=16, local_count=2, local_size=8)
    table = draw_batch(crops, 3, 0, np.arange(2))
    image = np.full((64, 64, 3), 10, np.uint8)
    groups = [torch.zeros(2, 2, 3, 16, 16), torch.zeros(2, 2, 3, 8, 8)]
    found = drawn(
        tmp_path / "a.png", groups, crops.mean, crops.std, lambda _: image, table, crops.ratio
    )
    left = picture.GAP + (found[picture.HEAD, picture.GAP :] != 255).any(1).argmax()
    original = found[picture.HEAD : picture.HEAD + 128, left : left + 128]
    last = boxes(table[:, 0], 64, 64, crops.ratio)[3] * 2  # drawn above the others
    top, left, height, width = last
    assert tuple(original[top, left]) == picture.COLOURS[3]
    assert tuple(original[top + height - 1, left + width - 1]) == picture.COLOURS[3]
    assert any((found == colour).all(2).sum() > 100 for colour in picture.COLOURS[:4])


def test_images_that_cannot_be_had_again_are_left_out(tmp_path):
    groups = [torch.zeros(2, 4, 3, 16, 16)]
    image = np.zeros((20, 20, 3), np.uint8)
    sizes = [
        len(drawn(tmp_path / "a.png", groups, [0.5] * 3, [0.25] * 3, originals))
        for originals in (lambda b: image if b % 2 else None, lambda b: None)
    ]
    assert [size - picture.HEAD for size in sizes] == [2 * 136, 4 * 136], "crops alone, if none can"


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (5, 7)])
def test_images_of_any_shape(tmp_path, shape):
    crops = multi_crop(global_size=224, local_count=8, local_size=96)
    table = draw_batch(crops, 0, 0, np.arange(1))
    groups = [torch.zeros(2, 1, 3, 224, 224), torch.zeros(8, 1, 3, 96, 96)]
    image = np.zeros((*shape, 3), np.uint8)
    found = drawn(tmp_path / "a.png", groups, crops.mean, crops.std, lambda _: image, table)
    assert found.shape[0] == picture.HEAD + 224 + picture.GAP
    assert found.shape[1] < 1400


def test_columns_are_called_as_asked(tmp_path, monkeypatch):
    told: list[str] = []
    together = picture._together
    monkeypatch.setattr(
        picture, "_together", lambda c, h: told.extend(name for name, _ in c) or together(c, h)
    )
    group = torch.zeros(1, 2, 3, 16, 16)
    named = {"crops": group, "with their labels": group}
    for groups in (named, [group, group]):
        drawn(tmp_path / "a.png", groups, [0.5] * 3, [0.25] * 3)
    assert told == ["crops, 16 px", "with their labels, 16 px", "1 crop, 16 px", "1 crop, 16 px"]
