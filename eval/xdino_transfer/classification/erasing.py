"""Random erasing (Zhong et al., 2017, arXiv 1708.04896), timm's "pixel" mode: a box of unit noise.

It comes after normalisation, so it works on whole batches, wherever they are. Boxes and noise follow
from (seed, epoch, index, repeat).

Letters: B images, C channels, H x W pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from xdino.runtime import transfer
from xdino_transfer.draws import ERASING, NOISE, counters, uniforms

ATTEMPTS = 10  # boxes tried for an image; where none fits, nothing is erased


def boxes(
    area: np.ndarray, log_ratio: np.ndarray, position: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Top, left, height, width in pixels, int64 [B, 4]: the first candidate that fits, else zeros.

    Args:
        area, log_ratio: float64 [B, attempts]: parts of the image, and log(height / width).
        position: float64 [B, 2] in [0, 1): down and across.
    """
    size, ratio = area * (height * width), np.exp(log_ratio)
    h = np.rint(np.sqrt(size * ratio)).astype(np.int64)
    w = np.rint(np.sqrt(size / ratio)).astype(np.int64)
    fits = (h < height) & (w < width)  # a box as high or as wide as the image counts as too large
    first = fits.argmax(axis=1)[:, None]
    h, w = (np.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    top = (position[:, 0] * (height - h + 1)).astype(np.int64)
    left = (position[:, 1] * (width - w + 1)).astype(np.int64)
    return np.where(fits.any(axis=1)[:, None], np.stack([top, left, h, w], axis=1), 0)


@dataclass(frozen=True)
class Erasing:
    """The distribution; the defaults are the published ones. `ratio` is that of height to width."""

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def draw(self, seed: int, places: np.ndarray, height: int, width: int) -> np.ndarray:
        """The boxes int64 [B, 4] of images at `places` (see `draws.counters`), zeros for none."""
        uniform = uniforms(seed, ERASING, places, 2 * ATTEMPTS + 3)
        low, high = np.log(self.ratio)
        found = boxes(
            self.area[0] + (self.area[1] - self.area[0]) * uniform[:, :ATTEMPTS],
            low + (high - low) * uniform[:, ATTEMPTS : 2 * ATTEMPTS],
            uniform[:, -3:-1],
            height,
            width,
        )
        return np.where(uniform[:, -1:] < self.probability, found, 0)

    def apply(
        self,
        images: Tensor,
        seed: int,
        epoch: int,
        indices: np.ndarray,
        repeats: np.ndarray | int = 0,
    ) -> Tensor:
        """Erase in place in normalised images [B, C, H, W], those of `indices` in an epoch."""
        places = counters(epoch, indices, repeats)
        found = self.draw(seed, places, *images.shape[2:])
        for row in np.flatnonzero(found[:, 2]):
            top, left, h, w = found[row].tolist()
            pixels = noise(seed, places[row], (images.shape[1], h, w)).to(images.dtype)
            images[row, :, top : top + h, left : left + w] = transfer.to_device(
                pixels, images.device
            )
        return images


def noise(seed: int, place: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """float32 `shape` from N(0, 1), of the image at one place uint64 [3]."""
    uniform = uniforms(seed, NOISE, place[None], math.prod(shape))
    return torch.from_numpy(ndtri(uniform).astype(np.float32)).view(shape)
