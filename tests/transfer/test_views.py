"""A training image's view: the published crops and small shifts, then RandAugment, then erasing."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from xdino.augment.multi_crop import boxes
from xdino.errors import UsageError
from xdino_transfer.classification.views import TrainingView, shifted

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = TrainingView(64, MEAN, STD)
PLAIN = TrainingView(64, MEAN, STD, randaugment=None, erasing=None)


def image(height: int = 90, width: int = 120, channels: int = 3) -> np.ndarray:
    """Smooth, as photographs are."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (9, 12, channels), np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height)) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def test_a_view_follows_from_its_place():
    drawn = PUBLISHED.draw(3, 1, np.arange(10))
    alone = PUBLISHED.draw(3, 1, np.array([7]))
    assert np.array_equal(PUBLISHED.cut(image(), drawn, 7), PUBLISHED.cut(image(), alone, 0))
    views = [PUBLISHED.cut(image(), PUBLISHED.draw(3, 1, np.array([7]), r), 0) for r in range(3)]
    assert len({view.tobytes() for view in views}) == 3, "repeats are cut differently"
    crops = torch.from_numpy(np.stack([PUBLISHED.cut(image(), drawn, i) for i in range(10)]))
    whole = PUBLISHED.finish(crops, drawn, 3)
    assert torch.equal(whole[7], PUBLISHED.finish(crops[7:8], alone, 3)[0])
    assert (whole.shape, whole.dtype) == ((10, 3, 64, 64), torch.float32)


def test_a_crop_is_pillows_but_for_rounding():
    drawn = PLAIN.draw(0, 0, np.arange(50))
    differences = []
    for row in range(50):
        top, left, h, w = boxes(drawn.crops[row], 90, 120).tolist()
        part = Image.fromarray(image()).crop((left, top, left + w, top + h))
        theirs = np.asarray(part.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        theirs = theirs[:, ::-1] if drawn.crops[row]["flip"] else theirs
        differences.append(np.abs(PLAIN.cut(image(), drawn, row) - theirs))
    assert np.max(differences) <= 3
    assert np.mean(differences) < 0.5


def test_boxes_are_distributed_as_torchvisions():
    drawn = PLAIN.draw(0, 0, np.arange(3000))
    ours = boxes(drawn.crops, 90, 120)
    torch.manual_seed(0)
    picture = torch.zeros(3, 90, 120)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, column
    assert drawn.crops["flip"].mean() == pytest.approx(0.5, abs=0.03)


def test_small_images_are_shifted():
    small = image(28, 28, 1)
    view = TrainingView(28, (0.5,), (0.5,), flip=0.0, randaugment=None, erasing=None)
    drawn = view.draw(0, 0, np.arange(400))
    padded = np.pad(small, ((4, 4), (4, 4), (0, 0)))
    every = {
        padded[top : top + 28, left : left + 28].tobytes(): (top, left)
        for top in range(9)
        for left in range(9)
    }
    found = [every[view.cut(small, drawn, row).tobytes()] for row in range(400)]
    assert {top for top, _ in found} == {left for _, left in found} == set(range(9))
    with pytest.raises(
        UsageError, match=r"an image of 10 x 40 pixels is too small for crops of 32"
    ):
        shifted(np.zeros((10, 40, 3), np.uint8), np.zeros(2), 32)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_channels_and_sizes(size, channels):
    view = TrainingView(size, MEAN[:channels], STD[:channels])
    drawn = view.draw(0, 0, np.arange(20))
    crops = np.stack([view.cut(image(40, 50, channels), drawn, row) for row in range(20)])
    assert (crops.dtype, crops.shape) == (np.uint8, (20, size, size, channels))
    assert view.finish(torch.from_numpy(crops), drawn, 0).isfinite().all()


def test_pixels_are_normalised():
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    out = PLAIN.finish(crops, PLAIN.draw(0, 0, np.arange(2)), 0)
    wanted = (crops.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    assert torch.allclose(out, wanted, atol=1e-6)
