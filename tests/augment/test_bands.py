"""Colours of bands: two groups, each with a grey of its own; cropping any number of them."""

import numpy as np
import pytest
import torch

from xdino.augment import cutting, draw_batch, multi_crop
from xdino.augment.multi_crop import LUMA, crop
from xdino.augment.photometric import photometric, photometric_eager

SIZE = 16
EITHER = pytest.mark.parametrize("path", [photometric, photometric_eager])


def spec_of(bands: int, **more: object):
    plain = {"mean": (0.0,) * bands, "std": (1 / 255,) * bands, "flip": 0.0}
    return multi_crop(SIZE, local_count=0, **{**plain, **more})


def pixels(bands: int, images: int = 6) -> torch.Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(40, 200, (images, SIZE, SIZE, bands), np.uint8))


def quiet(spec, images: int = 6) -> np.ndarray:
    """A table of which nothing happens."""
    table = draw_batch(spec, 0, 0, np.arange(images))[0].copy()
    for name in ("flip", "jitter", "gray", "blur", "solarize"):
        table[name] = 0
    table["factor"] = [1, 1, 1, 0]
    return table


@EITHER
@pytest.mark.parametrize("rgb", [(), (3, 2, 1), (0, 1, 2)])
def test_the_declared_colours_are_treated_as_a_photograph(path, rgb):
    spec = spec_of(6, rgb=rgb)
    crops, table = pixels(6), draw_batch(spec, 1, 0, np.arange(6))[0]
    found = path(crops, table, spec)
    rest = [band for band in range(6) if band not in rgb]
    for places, own in ((list(rgb), None), (rest, ())):
        if places:
            alone = path(crops[..., places].contiguous(), table, spec_of(len(places), rgb=own))
            torch.testing.assert_close(found[:, places], alone, rtol=0, atol=0)


@EITHER
def test_grey_of_bands_is_their_mean(path):
    spec = spec_of(5, rgb=(2, 1, 0))
    crops, table = pixels(5), quiet(spec)
    table["gray"] = True
    found = path(crops, table, spec)
    levels = crops.permute(0, 3, 1, 2).float()
    luma = (levels[:, [2, 1, 0]] * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(found[:, :3], luma.expand(-1, 3, -1, -1), rtol=0, atol=1e-3)
    mean = levels[:, 3:].mean(1, keepdim=True)
    torch.testing.assert_close(found[:, 3:], mean.expand(-1, 2, -1, -1), rtol=0, atol=1e-3)


@EITHER
def test_saturation_contrast_brightness_and_hue_of_bands(path):
    spec = spec_of(4)
    crops, levels = pixels(4), pixels(4).permute(0, 3, 1, 2).float()
    mean = levels.mean(1, keepdim=True)
    level = (levels.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    for place, factor, wanted in (
        (0, 1.1, levels * 1.1),
        (1, 0.7, levels * 0.7 + 0.3 * level),
        (2, 0.6, levels * 0.6 + 0.4 * mean),
        (3, 0.1, levels),
    ):
        table = quiet(spec)
        table["jitter"] = True
        table["factor"][:, place] = factor
        found = path(crops, table, spec)
        torch.testing.assert_close(found, wanted.clamp(0, 255), rtol=0, atol=2e-3)


@EITHER
def test_solarise_flip_and_blur_are_of_every_band(path):
    spec = spec_of(4)
    crops, table = pixels(4), quiet(spec)
    table["solarize"] = table["flip"] = True
    found, levels = path(crops, table, spec), crops.permute(0, 3, 1, 2).float().flip(3)
    wanted = torch.where(levels >= 128, 255 - levels, levels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    table = quiet(spec)
    table["blur"] = 1.0
    blurred = path(crops, table, spec)
    for band in range(4):
        alone = path(crops[..., [band]].contiguous(), table, spec_of(1))
        torch.testing.assert_close(blurred[:, [band]], alone, rtol=0, atol=1e-3)


def test_both_paths_agree_on_bands():
    spec = spec_of(7, rgb=(4, 0, 2))
    crops, table = pixels(7, 40), draw_batch(spec, 3, 0, np.arange(40))[0]
    both = [path(crops, table, spec) for path in (photometric, photometric_eager)]
    torch.testing.assert_close(*both, rtol=0, atol=2e-2)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 8, 13, 16])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_cutter_crops_every_band_as_if_it_were_alone(monkeypatch, bands, compiled):
    if not compiled:
        plain = cutting._apart_plainly, cutting._together_plainly
        monkeypatch.setattr(cutting, "_loops", lambda: plain)
    image = np.random.default_rng(0).integers(0, 256, (50, 40, bands), np.uint8)
    cut, box = cutting.cutter(image), (3, 5, 31, 30)
    found = cut(box, 20)
    for band in range(bands):
        alone = crop(np.repeat(image[..., [band]], 4, 2), box, 20)
        np.testing.assert_array_equal(found[..., band], alone[..., 0])
    slot = np.zeros((2, 20, 20, bands), np.uint8)
    cut(box, 20, slot[1])
    np.testing.assert_array_equal(slot[1], found)
    wide = np.zeros((20, 40, bands), np.uint8)[:, ::2]
    np.testing.assert_array_equal(cut(box, 20, wide), found)
