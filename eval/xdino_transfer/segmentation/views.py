"""Pictures as a segmenter sees them: the published augmentation, and the whole picture in a test.

In training (mmsegmentation 0.11): fitted into 2048 x 512 pixels times a factor from 0.5 to 2, cropped
to 512 x 512 (again, up to ten times, while one class holds three quarters of the labelled pixels),
mirrored, changed in brightness, contrast, saturation and hue; padded with the mean colour and VOID
where the picture is smaller than the crop. Colours are changed in floating point; OpenCV rounds to
256 levels, and to 180 hues, after each change.

All random numbers of a picture follow from the seed, the epoch and its number.

Letters: C channels, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colours

from xdino.runtime.rng import Stream
from xdino_transfer.draws import counters, uniforms
from xdino_transfer.resizing import fitted, padded, resized_image, resized_labels
from xdino_transfer.segmentation.losses import VOID

LONGER, SHORTER = 2048, 512  # pixels that a whole picture is fitted into
_BOXES = 11  # the first crop, and ten more
_COLOURS = 9


def normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours 0 to 255 [C, H, W] -> float32 [C, H, W], (x / 255 - mean) / std."""
    return colours.normalize(image.float() / 255, [*mean], [*std])


@dataclass(frozen=True)
class TrainViews:
    """Random crops; the defaults are the published ones.

    Args:
        crop: pixels a side of what comes out. longer, shorter: what a picture is fitted into.
        scales: the least and the largest factor of it.
        most_of_one: share of the labelled pixels that one class may hold.
        colour: whether colours are changed. rgb: of bands the places of red, green and blue, () for
            none; None for a photograph's channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 512
    longer: float = LONGER
    shorter: float = SHORTER
    scales: tuple[float, float] = (0.5, 2.0)
    most_of_one: float = 0.75
    flip: float = 0.5
    colour: bool = True
    rgb: tuple[int, ...] | None = None

    def draw(self, seed: int, epoch: int, index: int) -> np.ndarray:
        """The picture's numbers in an epoch, float64 in (0, 1)."""
        place = counters(epoch, np.array([index]))
        return uniforms(seed, Stream.SEGMENTING, place, 2 + 2 * _BOXES + _COLOURS)[0]

    def __call__(
        self, image: np.ndarray, labels: np.ndarray, drawn: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """uint8 [H, W, C] and [H, W] -> float32 [C, crop, crop] and uint8 [crop, crop]."""
        low, high = self.scales
        factor = low + (high - low) * drawn[0]
        # Whole numbers, as the published code makes them before it fits.
        height, width = labels.shape
        size = fitted(height, width, int(self.longer * factor), int(self.shorter * factor))
        shown = resized_image(torch.from_numpy(image).permute(2, 0, 1), size)
        wanted = resized_labels(torch.from_numpy(labels), size)
        top, left = self._corner(wanted, drawn[2 : 2 + 2 * _BOXES].reshape(_BOXES, 2))
        rows, columns = slice(top, top + self.crop), slice(left, left + self.crop)
        shown, wanted = shown[:, rows, columns], wanted[rows, columns]
        if drawn[1] < self.flip:
            shown, wanted = shown.flip(2), wanted.flip(1)
        shown = shown.float()
        if self.colour:
            shown = recoloured(shown, drawn[-_COLOURS:], self.rgb)
        shown = normalised(shown, self.mean, self.std)
        return self._filled(shown, 0), self._filled(wanted, VOID)

    def _corner(self, labels: Tensor, drawn: np.ndarray) -> tuple[int, int]:
        """Where the crop begins, from the top and the left."""
        spare = [max(side - self.crop, 0) for side in labels.shape]
        corners = [
            tuple(int(u * (s + 1)) for u, s in zip(two, spare, strict=True)) for two in drawn
        ]
        for top, left in corners[:-1]:
            part = labels[top : top + self.crop, left : left + self.crop]
            counts = torch.bincount(part.flatten().long(), minlength=VOID + 1)[:VOID]
            several = int((counts > 0).sum()) > 1
            if several and counts.max() / counts.sum() < self.most_of_one:
                return top, left
        return corners[-1][0], corners[-1][1]

    def _filled(self, x: Tensor, value: float) -> Tensor:
        out = x.new_full((*x.shape[:-2], self.crop, self.crop), value)
        out[..., : x.shape[-2], : x.shape[-1]] = x
        return out


def recoloured(image: Tensor, drawn: np.ndarray, rgb: Sequence[int] | None = None) -> Tensor:
    """Colours 0 to 255 [C, H, W], each change with a chance of one half; nine numbers drawn.

    Brightness up to 32 levels, contrast 0.5 to 1.5 before or after the two that follow, saturation
    0.5 to 1.5, hue up to a tenth of the circle.

    Bands (`rgb`: places of red, green and blue among them, () for none) go through what pretraining
    has for them (docs/bands.md): brightness and contrast are one number for all; saturation and hue
    are of red, green and blue as of a photograph, and all other bands are blended with their mean.
    """
    bright, shift, late, contrast, factor, saturated, saturation, turned, hue = drawn.tolist()
    if bright < 0.5:
        image = (image + (2 * shift - 1) * 32).clamp(0, 255)
    first = late < 0.5

    def contrasted(x: Tensor) -> Tensor:
        return (x * (0.5 + factor)).clamp(0, 255) if contrast < 0.5 else x

    image = contrasted(image) if first else image
    change = (
        0.5 + saturation if saturated < 0.5 else None,
        (int(hue * 36) - 18) / 180 if turned < 0.5 else None,
    )
    if rgb is None:
        image = _tinted(image, *change)
    else:
        places, image = [*rgb], image.clone()
        others = [place for place in range(len(image)) if place not in rgb]
        if places:
            image[places] = _tinted(image[places], *change)
        if others and change[0] is not None:
            grey = image[others].mean(0)
            image[others] = (grey + (image[others] - grey) * change[0]).clamp(0, 255)
    return image if first else contrasted(image)


def _tinted(image: Tensor, factor: float | None, turn: float | None) -> Tensor:
    """Red, green and blue [3, H, W] with saturation and hue changed; None leaves them."""
    if factor is not None:
        # HSV with S times a factor, at most 1: what each channel lacks to the brightest is scaled.
        brightest = image.max(0).values
        lacking = brightest - image
        most = brightest / lacking.max(0).values.clamp(min=1e-6)
        image = (brightest - lacking * most.clamp(max=factor)).clamp(0, 255)
    return image if turn is None else colours.adjust_hue(image / 255, turn) * 255


@dataclass(frozen=True)
class TestViews:
    """A whole picture, fitted into `longer` x `shorter` times `scale`; mirrored or not."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    longer: float = LONGER
    shorter: float = SHORTER

    def __call__(self, image: np.ndarray, scale: float = 1.0, flipped: bool = False) -> Tensor:
        """uint8 [H, W, C] -> float32 [1, C, h, w]."""
        height, width = image.shape[:2]
        size = fitted(height, width, int(self.longer * scale), int(self.shorter * scale))
        shown = resized_image(torch.from_numpy(image).permute(2, 0, 1), size)
        shown = shown.flip(2) if flipped else shown
        return padded([normalised(shown, self.mean, self.std)])
