"""Features, logits and labels to other sizes, and images to where a network's grid fits.

Letters: B images, C channels, H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, ., .] -> [B, C, *size], as all published heads resize (corners are not aligned)."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=[*size], mode="bilinear", align_corners=False)


def fitted(height: int, width: int, longer: float, shorter: float) -> tuple[int, int]:
    """The size (height, width) of an image scaled as large as fits into `longer` x `shorter`.

    In its own proportions, each side rounded half up, as mmcv's `imrescale` does.
    """
    long_side, short_side = max(height, width), min(height, width)
    most, least = max(longer, shorter), min(longer, shorter)
    scale = min(most / long_side, least / short_side)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def padded(images: Sequence[Tensor], multiple: int = 1, value: float = 0) -> Tensor:
    """[C, H_i, W_i] each -> [B, C, H, W] of the largest sides, rounded up to `multiple`.

    What is added lies right and below.
    """
    sides = (max(image.shape[-2] for image in images), max(image.shape[-1] for image in images))
    H, W = (-(-side // multiple) * multiple for side in sides)
    batch = images[0].new_full((len(images), *images[0].shape[:-2], H, W), value)
    for row, image in zip(batch, images, strict=True):
        row[..., : image.shape[-2], : image.shape[-1]] = image
    return batch


def resized_image(image: Tensor, size: Sequence[int]) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, *size], bilinear without a filter before it (OpenCV's way)."""
    shown = bilinear(image[None].float(), size)[0]
    return shown.round_().clamp_(0, 255).to(torch.uint8)


def resized_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """[H, W] of whole numbers -> [*size], each the nearest one's."""
    if tuple(labels.shape) == tuple(size):
        return labels
    rows, columns = (
        (torch.arange(new, dtype=torch.float64) * (old / new)).long().clamp_(max=old - 1)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
