"""The evaluation view against torchvision's, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from xdino_eval.transform import EvalTransform

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def theirs(image, size, resize):
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )(picture)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 60),
    resize=st.integers(1, 60), channels=st.sampled_from([1, 3]), seed=st.integers(0, 999),
)  # fmt: skip
def test_pixels_are_torchvisions(height, width, size, resize, channels, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    ours = EvalTransform(size, resize, (0.5,) * channels, (0.5,) * channels).array(image)
    reference = np.asarray(theirs(image, size, resize)).reshape(size, size, channels)
    assert ours.shape == (size, size, channels)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, reference)


def test_normalised_values_are_torchvisions():
    image = np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8)
    transform = EvalTransform(224, 256, *IMAGENET)
    ours = transform.normalise(torch.from_numpy(transform.array(image).copy())[None])
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
    assert torch.equal(ours[0], to_tensor(theirs(image, 224, 256)))


def test_of_a_backbone(frozen):
    assert EvalTransform.of(frozen) == EvalTransform(24, 28, frozen.mean, frozen.std)
    assert EvalTransform.of(frozen, size=48).resize == 56, "the ratio is kept"
    assert EvalTransform.of(frozen, size=48, resize=48).resize == 48
    changed = EvalTransform.of(frozen, mean=(0.1, 0.1, 0.1), std=(1, 1, 1))
    assert changed.mean == (0.1, 0.1, 0.1)
    assert "shorter side 28 (PIL bicubic), centre crop 24" in EvalTransform.of(frozen).describe()


def test_refuses():
    with pytest.raises(ValueError, match="1 or more"):
        EvalTransform(0, 8, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="must match"):
        EvalTransform(8, 8, (0.5,), (0.5, 0.5))
    with pytest.raises(ValueError, match="expected 1 channels, got 3"):
        EvalTransform(8, 8, (0.5,), (0.5,)).array(np.zeros((9, 9, 3), np.uint8))
