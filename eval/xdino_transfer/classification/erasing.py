"""Random erasing (Zhong et al., 2017, arXiv 1708.04896), timm's "pixel" mode: a box of unit noise.

It comes after normalisation, so it works on batches wherever they are. Boxes follow from (seed, epoch,
index, repeat); so does the noise, on one kind of device: it is drawn there, for on a CPU it would keep
a GPU waiting.

Letters: B images, C channels, H x W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xdino.runtime.rng import Stream
from xdino_transfer.draws import uniforms

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

    def draw(
        self, seed: int, places: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of images at `places` (see `draws.counters`) the boxes, int64 [B, 4], zeros for none, and
        the seeds of their noise, int64 [B]."""
        uniform = uniforms(seed, Stream.ERASING, places, 2 * ATTEMPTS + 4)
        area, log_ratio, (down, across, erased, noise) = np.split(
            uniform.T, [ATTEMPTS, 2 * ATTEMPTS]
        )
        low, high = np.log(self.ratio)
        found = boxes(
            self.area[0] + (self.area[1] - self.area[0]) * area.T,
            low + (high - low) * log_ratio.T,
            np.stack([down, across], axis=1),
            height,
            width,
        )
        found[erased >= self.probability] = 0
        return found, (noise * 2**52).astype(np.int64)

    def apply(self, images: Tensor, seed: int, places: np.ndarray) -> Tensor:
        """Erase in place in normalised images [B, C, H, W], which lie at `places`."""
        found, seeds = self.draw(seed, places, *images.shape[2:])
        generator = torch.Generator(images.device)
        for row in np.flatnonzero(found[:, 2]):
            top, left, h, w = found[row].tolist()
            generator.manual_seed(int(seeds[row]))
            shape = (images.shape[1], h, w)
            noise = torch.randn(shape, generator=generator, device=images.device)
            images[row, :, top : top + h, left : left + w] = noise
        return images
