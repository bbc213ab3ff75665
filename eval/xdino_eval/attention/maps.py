"""What the class token looks at: maps over the patches, and masks of where most of it lies.

The maps are softmax weights of the class token over the patches, one a head: of an XCiT's
class-attention layers, or of a vision transformer's last block (`Backbone` says where they
come from). A mask keeps the fewest patches that hold a given mass of the attention, 60 % as in DINO
(https://arxiv.org/abs/2104.14294, section 4.2.2 and figure 4).

Letters: H x W pixels, C channels, h x w patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xdino.backbone import Backbone
from xdino.errors import RunFailed
from xdino_eval.backbone_tokens import Lattice, attention_on_patches, lattice
from xdino_eval.features import evaluating

MASS = 0.6  # of the attention inside a mask, as published


@dataclass(frozen=True)
class Maps:
    """Class-attention maps, one float32 [heads, h, w] a layer, the last layer last.

    The weights are the softmax's, without those of the class token and of registers: they sum to
    less than 1. `names`: "layer2" of an XCiT's class attention, "block12" of a vision transformer.
    `lattice`: where the patches lie on the image; None = spread over the whole of it.
    """

    layers: tuple[np.ndarray, ...]
    names: tuple[str, ...] = ()
    lattice: Lattice | None = None

    def name(self, index: int) -> str:
        return self.names[index] if self.names else f"layer{index + 1}"


def network_input(
    backbone: Backbone, image: np.ndarray, size: int | None = None
) -> tuple[Tensor, Lattice]:
    """uint8 [H, W, C] -> float32 [1, C, H', W'] on the backbone's device, and where patches lie.

    The whole image in its own proportions, its shorter side resized to `size` pixels (bicubic; None
    = the backbone's input size), less what fills no patch of a vision transformer.

    Raises:
        UsageError: an image, or a `size`, that is smaller than a patch, or a `size` that makes it
            larger than memory holds; a backbone without patches.
    """
    inputs = backbone.whole(image, size)
    return backbone.fitting(inputs), lattice(backbone, *inputs.shape[2:])


def class_attention_maps(
    backbone: Backbone,
    image: np.ndarray,
    size: int | None = None,
    layers: Sequence[int] | None = None,
) -> Maps:
    """The class-attention maps of one image, whole and in its own proportions.

    Args:
        backbone: an XCiT, or a vision transformer of timm with a class token.
        image: uint8 [H, W, C].
        size: the shorter side, in pixels, that the image is resized to (bicubic); None = the
            backbone's input size. It need not be a multiple of the patch.
        layers: numbers from 1; None = all class-attention layers of an XCiT, the last block of a
            vision transformer.

    Raises:
        UsageError: the backbone has no class attention, or not that layer; the image is smaller
            than a patch.
        RunFailed: a weight is not finite.
    """
    inputs, where = network_input(backbone, image, size)
    with evaluating(backbone), torch.inference_mode():
        found = attention_on_patches(backbone, inputs, layers)
    h, w = backbone.grid(*inputs.shape[2:])
    kind = backbone.attention_layer
    numbers = sorted(found)
    for i in numbers:
        if not found[i].isfinite().all():
            raise RunFailed(f"the attention of {kind} {i} is not finite: the weights are damaged")
    return Maps(
        tuple(found[i][0].reshape(-1, h, w).cpu().numpy() for i in numbers),
        tuple(f"{kind}{i}" for i in numbers),
        where,
    )


def mass_threshold(attention: np.ndarray, mass: float = MASS) -> np.ndarray:
    """bool [h, w]: the fewest patches that together hold at least `mass` of the attention.

    Among equal patches the first in reading order is kept.

    Args:
        attention: float [h, w], none negative, not all zero.
        mass: a fraction, 0 < mass <= 1.

    Raises:
        ValueError: anything else.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must lie in (0, 1], got {mass}")
    flat = attention.astype(np.float64).ravel()
    if not (np.isfinite(flat).all() and (flat >= 0).all() and flat.any()):
        raise ValueError("attention must be finite, not negative and not all zero")
    order = np.argsort(-flat, kind="stable")
    held = np.cumsum(flat[order])
    keep = np.zeros(flat.shape, dtype=bool)
    keep[order[: int(np.searchsorted(held, mass * held[-1])) + 1]] = True
    return keep.reshape(attention.shape)


def patch_of_pixel(
    lattice: Lattice | None, h: int, w: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row and column of the patch under each pixel row and column, and whether there is one.

    Returns int64 [height] in 0..h-1, int64 [width] in 0..w-1, bool [height, width]: False for the
    edge that a vision transformer does not see. Past the first and the last patch of an XCiT,
    whose receptive fields overlap the edge, the nearest patch counts.
    """
    lattice = lattice or Lattice((0.0, 0.0), (1 / h, 1 / w))
    found, seen = [], []
    for axis, (patches, pixels) in enumerate(((h, height), (w, width))):
        at = ((np.arange(pixels) + 0.5) / pixels - lattice.start[axis]) / lattice.step[axis]
        found.append(np.clip(np.floor(at).astype(np.int64), 0, patches - 1))
        # A lattice that begins outside of the image is an XCiT's, and covers all of it.
        seen.append((at < patches) | (lattice.start[axis] < 0))
    return found[0], found[1], seen[0][:, None] & seen[1]


def mask(
    attention: np.ndarray, lattice: Lattice | None, height: int, width: int, mass: float = MASS
) -> np.ndarray:
    """bool [height, width]: `mass_threshold` at the image's own resolution, by nearest patch.

    Nothing where no patch has any attention: the class token may have kept all of it.

    Args:
        attention: float [h, w] of one head, or their mean.
        height, width: of the image in pixels.
    """
    if not attention.any():
        return np.zeros((height, width), dtype=bool)
    keep = mass_threshold(attention, mass)
    h, w = keep.shape
    rows, columns, seen = patch_of_pixel(lattice, h, w, height, width)
    return keep[rows[:, None], columns] & seen
