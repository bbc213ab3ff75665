"""Fashion-MNIST scattered: each garment at a random place, scale and turn on a random texture.

In the plain images every garment stands upright in the middle, so that two of a kind agree pixel by
pixel, and raw pixels are hard to beat. Here they say little, and what a network has learned shows.

Letters: N images, S pixels of a side.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xdino.runtime import rng

SIZE = 40  # pixels of a side
SCALE = (0.6, 1.0)  # of the frame, for the 28 pixels of the plain image
TURN = 30.0  # degrees at most, either way
_OPAQUE = 1 / 6  # a garment's pixel from this value on hides the ground
_GRAIN = (3, 6, 12)  # values a side of the noises that a texture is made of
_DRAWS = (4, 5, *(k * k for k in _GRAIN))  # an image's: place, shade of the texture, its noises
_AT_ONCE = 1000  # images


def scattered(images: np.ndarray, seed: int) -> np.ndarray:
    """The garments of `images` on textures of their own.

    What an image becomes follows from `seed` and its place alone.

    Args:
        images: uint8 `[N, 28, 28]`, a garment on black.

    Returns:
        uint8 `[N, S, S]`.
    """
    done = [np.zeros((0, SIZE, SIZE), np.uint8)]
    for start in range(0, len(images), _AT_ONCE):
        garments = torch.from_numpy(images[start : start + _AT_ONCE]).float() / 255
        places = np.arange(start, start + len(garments))
        raw = rng.raw_of_images(rng.Stream.SCATTERING, seed, 0, places, sum(_DRAWS))
        draws = torch.from_numpy((raw >> 40).astype(np.float32) / 2**24)  # in 0..1
        place, shade, *grains = draws.split(_DRAWS, dim=1)
        placed = _placed(garments, place)
        alpha = (placed / _OPAQUE).clamp(max=1)
        mixed = _textures(grains, shade) * (1 - alpha) + placed * alpha
        done.append((mixed.clamp(0, 1) * 255).round().byte().numpy())
    return np.concatenate(done)


def _placed(garments: Tensor, draws: Tensor) -> Tensor:
    """`[N, 28, 28]` and `[N, 4]` in 0..1 (scale, turn, place) -> `[N, S, S]` on black.

    The place is drawn among those where all of the garment is in the frame.
    """
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * draws[:, 0]
    turn = math.radians(TURN) * (2 * draws[:, 1] - 1)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    # Frames reach from -1 to 1. Forward: place = R * garment + offset; grid_sample asks backwards.
    low, high = _boxes(garments)  # [N, 2], x and y
    x = torch.stack([low[:, 0], low[:, 0], high[:, 0], high[:, 0]], 1)  # of the four corners
    y = torch.stack([low[:, 1], high[:, 1], low[:, 1], high[:, 1]], 1)
    turned = torch.stack(
        [x * cos[:, None] - y * sin[:, None], x * sin[:, None] + y * cos[:, None]], -1
    )  # [N, 4, 2]
    first, last = -1 - turned.amin(1), 1 - turned.amax(1)  # offsets that keep it in the frame
    offset = first + (last - first) * draws[:, 2:4]
    square = scale.square()
    back = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    back = back / square[:, None, None]
    theta = torch.cat([back, -(back @ offset[:, :, None])], 2)
    grid = F.affine_grid(theta, [len(garments), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(garments[:, None], grid, align_corners=False)[:, 0]


def _boxes(garments: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of what is not black, each `[N, 2]` (x, y) in -1..1."""
    side = garments.shape[-1]
    used = torch.stack([(garments > 0).any(1), (garments > 0).any(2)], 1).int()  # [N, 2, 28]
    low, high = used.argmax(2), side - used.flip(2).argmax(2)
    return 2 * low / side - 1, 2 * high / side - 1


def _textures(grains: Sequence[Tensor], draws: Tensor) -> Tensor:
    """Smooth noise: `[N, k * k]` for each k and `[N, 5]` -> `[N, S, S]` in 0..1."""
    layers = [
        F.interpolate(grain.view(-1, 1, k, k), (SIZE, SIZE), mode="bicubic", align_corners=False)
        for k, grain in zip(_GRAIN, grains, strict=True)
    ]
    noise = torch.cat(layers, 1)  # [N, 3, S, S]
    noise = (noise * draws[:, :3, None, None]).sum(1)
    least, most = noise.amin((1, 2), keepdim=True), noise.amax((1, 2), keepdim=True)
    noise = (noise - least) / (most - least).clamp(min=1e-6)
    level, contrast = 0.5 * draws[:, 3], 0.1 + 0.3 * draws[:, 4]
    return level[:, None, None] + contrast[:, None, None] * noise
