"""How a training image is shown: crop, flip, RandAugment on the CPU; normalised and erased in batches.

The published pipeline (timm's create_transform) in two halves. `TrainingView.cut` makes a uint8 crop in
a loader's thread, from a row of `draw`; `TrainingView.finish` takes a batch of crops wherever it is. An
image's view follows from (seed, epoch, index, repeat).

Crops come from `augment.crop`, the antialiased bicubic kernel of pretraining. On photographs it differs
from Pillow's by 0.02 levels of 255 on average and by 6 at most; boxes and all else are as published.

Letters: B images, H x W pixels, C channels, s side of a crop.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xdino.augment.cutting import cutter
from xdino.augment.multi_crop import ATTEMPTS, boxes
from xdino.errors import UsageError
from xdino.runtime import transfer
from xdino.runtime.rng import Stream
from xdino_transfer.classification.erasing import Erasing
from xdino_transfer.classification.randaugment import RandAugment
from xdino_transfer.draws import counters, uniforms

SMALL, PADDING = 32, 4  # up to this size, images are shifted by as many pixels instead of resized

#: What is drawn for the crop of one image.
CROP_DTYPE = np.dtype(
    [
        ("area", np.float64, (ATTEMPTS,)),
        ("log_ratio", np.float64, (ATTEMPTS,)),
        ("position", np.float64, (2,)),  # down and across, in [0, 1)
        ("flip", np.bool_),
    ]
)


@dataclass(frozen=True)
class Draws:
    """What is drawn for B images: `crops` [B] of CROP_DTYPE, `layers` [B, L] of RandAugment or None.

    places: uint64 [B, 3], where erasing draws. See `draws.counters`.
    """

    crops: np.ndarray
    layers: np.ndarray | None
    places: np.ndarray


@dataclass(frozen=True)
class TrainingView:
    """The distribution; the defaults are the published ones. Sizes in pixels.

    mean, std: one entry a channel, for pixels in 0..1. randaugment, erasing: None for none.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment: RandAugment | None = field(default_factory=RandAugment)
    erasing: Erasing | None = field(default_factory=Erasing)

    def draw(
        self, seed: int, epoch: int, indices: np.ndarray, repeats: np.ndarray | int = 0
    ) -> Draws:
        """What happens to images `indices` [B] in an epoch."""
        places = counters(epoch, indices, repeats)
        uniform = uniforms(seed, Stream.CROPPING, places, 2 * ATTEMPTS + 3)
        table = np.empty(len(places), CROP_DTYPE)
        low, high = self.scale
        table["area"] = low + (high - low) * uniform[:, :ATTEMPTS]
        low, high = np.log(self.ratio)
        table["log_ratio"] = low + (high - low) * uniform[:, ATTEMPTS : 2 * ATTEMPTS]
        table["position"] = uniform[:, -3:-1]
        table["flip"] = uniform[:, -1] < self.flip
        layers = None
        if self.randaugment is not None:
            layers = self.randaugment.draw(seed, epoch, indices, repeats)
        return Draws(table, layers, places)

    def cut(self, image: np.ndarray, drawn: Draws, row: int) -> np.ndarray:
        """uint8 [H, W, C] -> uint8 [s, s, C], by one row of what was drawn."""
        table = drawn.crops[row]
        if self.size <= SMALL:
            view = shifted(image, table["position"], self.size)
        else:
            box = boxes(table, image.shape[0], image.shape[1], self.ratio)
            view = cutter(image)(box, self.size)
        if table["flip"]:
            view = view[:, ::-1]
        view = np.ascontiguousarray(view)
        if self.randaugment is None or drawn.layers is None:
            return view
        return self.randaugment.apply(view, drawn.layers[row])

    def finish(self, crops: Tensor, drawn: Draws, seed: int) -> Tensor:
        """uint8 [B, s, s, C] -> float32 [B, C, s, s] on the same device, normalised and erased."""
        mean, std = (
            transfer.to_device(torch.tensor(values), crops.device).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        images = crops.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(mean).div_(std)
        if self.erasing is not None:
            self.erasing.apply(images, seed, drawn.places)
        return images


def shifted(image: np.ndarray, position: np.ndarray, size: int) -> np.ndarray:
    """A square of `size` pixels out of an image with a black rim: torchvision's RandomCrop(padding).

    Raises:
        UsageError: the image is smaller than that even with its rim.
    """
    check_room(image, size)
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    room = [side - size + 1 for side in padded.shape[:2]]
    top, left = (int(part * free) for part, free in zip(position, room, strict=True))
    return padded[top : top + size, left : left + size]


def check_room(image: np.ndarray, size: int) -> None:
    """Raises UsageError for an image that is smaller than a crop even with its rim."""
    if min(image.shape[:2]) + 2 * PADDING < size:
        raise UsageError(
            f"an image of {image.shape[0]} x {image.shape[1]} pixels is too small for crops of "
            f"{size}, which are not enlarged up to {SMALL} pixels"
        )
