"""The one view of an image that a frozen network is shown: resize, centre crop, normalise.

DINO's evaluations (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 3.2 and the
published `eval_knn.py`) resize the shorter side to 256 with bicubic interpolation, cut the central
224 x 224 pixels and normalise. The pixels here are those of torchvision's `Resize` + `CenterCrop` on
PIL images, bit for bit.

Letters: B images, H x W pixels, C channels, s the side of the crop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xdino.errors import UsageError
from xdino.runtime import transfer

LARGEST = 2**26  # pixels that are shown to a network at once


def centre_view(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [s, s, C], s = `size`; black where the resized image is smaller."""
    return centre_crop(resize_shorter(image, resize), size)


def whole_view(image: np.ndarray, side: int, patch: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H', W', C]: in its own proportions, the shorter side at `side` pixels.

    Raises:
        UsageError: an image or a side that is smaller than a patch, or more pixels than `LARGEST`.
    """
    height, width = image.shape[:2]
    if min(height, width) < patch:
        raise UsageError(
            f"an image of {width} x {height} pixels is smaller than a patch of {patch} x {patch}"
        )
    if side < patch:
        raise UsageError(f"size must be at least a patch of {patch} pixels, got {side}")
    if height * width * side**2 > LARGEST * min(height, width) ** 2:
        raise UsageError(
            f"{width} x {height} pixels with the shorter side at {side} come to more than the limit "
            f"of {LARGEST / 1e6:,.0f} million pixels: lower --shorter-side"
        )
    return resize_shorter(image, side)


def normalise(batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] on the same device: (x / 255 - mean) / std."""
    shape = (1, -1, 1, 1)
    centre, spread = (
        transfer.to_device(torch.tensor(values), batch.device).view(shape) for values in (mean, std)
    )
    return batch.permute(0, 3, 1, 2).contiguous().float().div(255).sub(centre).div(spread)


def resize_shorter(image: np.ndarray, resize: int) -> np.ndarray:
    """uint8 [H, W, C] -> the same picture with its shorter side at `resize` pixels, bicubic.

    The longer side is int(resize * long / short), torchvision's rounding.
    """
    height, width = image.shape[:2]
    longer = int(resize * max(height, width) / min(height, width))
    size = (resize, longer) if width <= height else (longer, resize)
    return resample(image, size, Image.Resampling.BICUBIC)


def resample(
    image: np.ndarray,
    size: tuple[int, int],
    method: Image.Resampling,
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [height, width, C] for `size` = (width, height), by PIL.

    `box` = (left, top, right, bottom) in pixels is cut out first. (PIL's own `resize(box=)` would
    let pixels from outside the box into its edge.) Three channels go through PIL together; any
    other number one by one in mode L, because PIL has no picture of two channels and weighs the
    colours of four by their alpha.
    """

    def one(picture: Image.Image) -> np.ndarray:
        cut = picture if box is None else picture.crop(box)
        return np.asarray(cut if cut.size == size else cut.resize(size, method))

    if image.shape[2] == 3:
        return one(Image.fromarray(image))
    channels = [one(Image.fromarray(image[..., c])) for c in range(image.shape[2])]
    return np.stack(channels, axis=-1)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> its central [size, size, C], padded with zeros where it is smaller.

    As torchvision rounds: the extra row or column of padding goes right and below, the corner of
    the crop is rounded half to even.
    """
    if min(image.shape[:2]) < size:
        missing = [max(0, size - side) for side in image.shape[:2]]
        pads = [(gap // 2, gap - gap // 2) for gap in missing]
        image = np.pad(image, [*pads, (0, 0)])
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])
