"""Every photometric stage against torchvision and Pillow on the same pixels and parameters.

Everything here runs on both paths, the compiled and the eager one; test_photometric_cpu.py compares
the two with each other.
"""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

from xdino.augment import photometric as room
from xdino.augment.multi_crop import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    boxes,
    crop,
    draw_batch,
    multi_crop,
)
from xdino.augment.photometric import blur_kernels

#: Stage -> (mean, 99.9th percentile) of the absolute difference from Pillow, in levels of 0..255.
#: Pillow truncates to whole levels after each operation (0.5 on average), keeps hues in 256 steps,
#: and repeats the edge in each of three box blurs, where ours repeats it once.
BOUNDS = {
    "flip": (0.0, 0.0),
    "brightness": (0.55, 1.0),
    "contrast": (0.55, 1.0),
    "saturation": (0.6, 1.2),
    "hue": (0.7, 8.0),
    "gray": (0.3, 0.51),
    "blur": (0.7, 4.0),
    "solarize": (0.0, 0.0),
    "all": (1.5, 12.0),
}
FACTORS = {
    "brightness": (BRIGHTNESS, tvf.adjust_brightness),
    "contrast": (CONTRAST, tvf.adjust_contrast),
    "saturation": (SATURATION, tvf.adjust_saturation),
    "hue": (HUE, tvf.adjust_hue),
}
PLAIN = multi_crop(mean=(0,) * 3, std=(1,) * 3)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["compiled", "eager"])
def photometric(request):
    """The same function on either path; no falling back in silence."""
    if request.param == "eager":
        return room.photometric_eager
    assert room._compiled() is not None
    return room.photometric


@pytest.fixture(scope="module")
def batch():
    """uint8 [32, 96, 96, 3] of two photographs and their table [32]: 16 of each global view."""
    table = draw_batch(PLAIN, 1, 0, np.arange(16))[:2].reshape(-1)
    images = [load_sample_image(name).copy() for name in ("china.jpg", "flower.jpg")]
    crops = [
        crop(images[i % 2], boxes(row, *images[i % 2].shape[:2]), 96) for i, row in enumerate(table)
    ]
    return torch.from_numpy(np.stack(crops)), table


def only(table: np.ndarray, stage: str) -> np.ndarray:
    """The table with every other stage switched off, and this one on."""
    table = table.copy()
    for name in ("flip", "jitter", "gray", "solarize"):
        table[name] = name == stage or (name == "jitter" and stage in FACTORS)
    if stage != "blur":
        table["blur"] = 0
    elif stage == "blur":
        table["blur"] = np.linspace(0.1, 2.0, len(table))
    if stage in FACTORS:
        column = FACTORS[stage][0]
        kept = table["factor"][:, column].copy()
        table["factor"] = [1, 1, 1, 0]
        table["factor"][:, column] = kept
    return table


def by_pillow(pixels: np.ndarray, row: np.void, stages: tuple[str, ...]) -> np.ndarray:
    image = Image.fromarray(pixels)
    if row["flip"]:
        image = tvf.hflip(image)
    if row["jitter"]:
        for operation in row["order"]:
            name = list(FACTORS)[operation]
            if name in stages:
                image = FACTORS[name][1](image, float(row["factor"][operation]))
    if row["gray"]:
        image = tvf.rgb_to_grayscale(image, 3)
    if row["blur"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(row["blur"])))
    if row["solarize"]:
        image = ImageOps.solarize(image)
    return np.asarray(image)


@pytest.mark.parametrize("stage", BOUNDS)
def test_stage_against_pillow(photometric, batch, stage):
    crops, table = batch
    if stage != "all":
        table = only(table, stage)
    ours = photometric(crops, table, PLAIN).permute(0, 2, 3, 1).numpy() * 255
    stages = tuple(FACTORS) if stage == "all" else (stage,)
    theirs = [by_pillow(c.numpy(), row, stages) for c, row in zip(crops, table, strict=True)]
    difference = np.abs(ours - np.stack(theirs))
    mean, high = BOUNDS[stage]
    # 2e-4 levels: what float32 leaves of 255 * (x / 255).
    assert difference.mean() <= mean + 2e-4
    assert np.percentile(difference, 99.9) <= high + 2e-4


def test_jitter_is_torchvisions_in_floating_point(photometric, batch):
    """Without Pillow's rounding there is no difference left but the contrast's whole mean."""
    crops, table = batch
    for stage, (column, operation) in FACTORS.items():
        chosen = only(table, stage)
        ours = photometric(crops, chosen, PLAIN)
        floats = crops.permute(0, 3, 1, 2).float() / 255
        theirs = torch.stack(
            [
                operation(image, float(row["factor"][column]))
                for image, row in zip(floats, chosen, strict=True)
            ]
        )
        bound = 0.21 if stage == "contrast" else 0.05  # levels; their luma weights sum to 0.9999
        assert (ours - theirs).abs().max() * 255 <= bound, stage


def test_order_of_the_jitter_matters_and_is_kept(photometric, batch):
    crops, table = batch
    table = only(table, "jitter")
    table["factor"] = [1.4, 0.6, 1.2, 0.1]
    first = photometric(crops, table, PLAIN)
    table["order"] = table["order"][:, ::-1]
    assert (first - photometric(crops, table, PLAIN)).abs().mean() * 255 > 0.5


def test_normalisation_and_type(photometric, batch):
    crops, table = batch
    off = only(table, "none")
    spec = multi_crop()
    result = photometric(crops, off, spec)
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    torch.testing.assert_close(
        result, (crops.permute(0, 3, 1, 2) / 255 - mean) / std, atol=1e-5, rtol=0
    )
    half = photometric(crops, off, spec, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, result.bfloat16())


def test_the_same_bits_for_any_number_of_threads_and_nearly_for_any_batch(
    photometric, batch, monkeypatch
):
    crops, table = batch
    monkeypatch.setattr(room, "_BLOCK_FLOATS", 4 * 96 * 96 * 3)  # 8 blocks
    whole = photometric(crops, table, PLAIN)
    assert torch.equal(whole, photometric(crops, table, PLAIN))
    torch.set_num_threads(2)
    assert torch.equal(whole, photometric(crops, table, PLAIN))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    some = np.array([30, 3, 17, 4])
    part = photometric(crops[torch.from_numpy(some)], table[some], PLAIN)
    torch.testing.assert_close(part, whole[torch.from_numpy(some)], atol=2e-6, rtol=0)


def test_works_under_inference_mode_with_threads(photometric, batch, monkeypatch):
    crops, table = batch
    monkeypatch.setattr(room, "_BLOCK_FLOATS", 4 * 96 * 96 * 3)
    expected = photometric(crops, table, PLAIN)
    torch.set_num_threads(2)
    with torch.inference_mode():
        assert torch.equal(expected, photometric(crops.clone(), table, PLAIN))


def test_one_channel_takes_what_is_defined_for_it(photometric, batch):
    crops, table = batch
    spec = multi_crop(mean=(0,), std=(1,))
    gray = crops[..., :1].contiguous()
    for name in ("saturation", "hue", "gray"):
        assert torch.equal(
            photometric(gray, only(table, name), spec), photometric(gray, only(table, ""), spec)
        )
    for name in ("flip", "brightness", "contrast", "blur", "solarize"):
        chosen = only(table, name)
        ours = photometric(gray, chosen, spec).permute(0, 2, 3, 1).numpy()[..., 0] * 255
        theirs = np.stack(
            [by_pillow(c[..., 0].numpy(), r, (name,)) for c, r in zip(gray, chosen, strict=True)]
        )
        difference = np.abs(ours - theirs)
        assert difference.mean() <= BOUNDS[name][0] + 2e-4, name
        assert np.percentile(difference, 99.9) <= BOUNDS[name][1] + 2e-4, name


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_run(photometric, batch, channels):
    crops, table = batch
    spec = multi_crop(mean=(0.5,) * channels, std=(1,) * channels)
    many = crops[..., [0, 1, 2, 0][:channels]].contiguous()
    assert photometric(many, table, spec).isfinite().all()


def test_crops_smaller_than_the_blur(photometric, batch):
    crops, table = batch
    tiny = crops[:, :2, :3].contiguous()
    result = photometric(tiny, only(table, "blur"), PLAIN)
    assert result.shape == (32, 3, 2, 3)
    assert result.isfinite().all()


def test_blur_kernels_sum_to_one_and_have_the_right_width():
    radius = np.array([0.1, 0.7, 1.3, 1.9, 5.0])
    kernels = blur_kernels(radius)
    distance = np.arange(kernels.shape[1])
    total = kernels[:, 0] + 2 * kernels[:, 1:].sum(axis=1)
    variance = 2 * (kernels * distance**2).sum(axis=1)
    np.testing.assert_allclose(total, 1, atol=1e-12)
    np.testing.assert_allclose(variance, radius**2, rtol=1e-9)


def test_shapes_that_disagree_are_named(photometric, batch):
    crops, table = batch
    with pytest.raises(ValueError, match="one entry per crop"):
        photometric(crops, table[:3], PLAIN)
    with pytest.raises(ValueError, match="3 channels, mean and std have 1"):
        photometric(crops, table, multi_crop(mean=(0,), std=(1,)))
