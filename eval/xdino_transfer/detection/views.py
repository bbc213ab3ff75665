"""Pictures as a detector sees them: the published augmentation, and the whole picture in a test.

In training (after DETR): mirrored or not, then with equal chance either resized to a shorter side of
480 to 800 pixels, 32 apart, or first to one of 400, 500 or 600, cropped, and resized so. No longer
side above 1,333 pixels. Objects are cut off at the crop, and those outside of it dropped; a crop
without any is allowed. Masks follow by nearest neighbours.

All random numbers of a picture follow from the seed, the epoch and its number.

Letters: M objects, H x W pixels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colours

from xdino.data import epoch_order
from xdino.runtime.rng import Stream
from xdino_transfer.detection.boxes import Size, clipped
from xdino_transfer.detection.objects import Objects, Shown
from xdino_transfer.draws import counters, uniforms
from xdino_transfer.resizing import fitted, padded, resized_image, resized_labels

MULTIPLE = 32  # pixels: pictures are padded to it
LONGER = 1333
SIDES = tuple(range(480, 801, 32))
BEFORE_CROP = (400, 500, 600)
CROP = (384, 600)  # the least and the largest side of a crop
_DRAWN = 8


@dataclass(frozen=True)
class Views:
    """The published sizes. crop_chance: of the second way."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    sides: tuple[int, ...] = SIDES
    longer: int = LONGER
    before_crop: tuple[int, ...] = BEFORE_CROP
    longer_before_crop: int = 4200
    crop: tuple[int, int] = CROP
    crop_chance: float = 0.5
    flip: float = 0.5
    test_side: int = 800

    def draw(self, seed: int, epoch: int, index: int, repeat: int = 0) -> np.ndarray:
        """The picture's numbers in an epoch, float64 in (0, 1); `repeat`: how often it came before."""
        place = counters(epoch, np.array([index]), repeat)
        return uniforms(seed, Stream.DETECTING, place, _DRAWN)[0]

    def training(
        self, image: np.ndarray, objects: Objects, drawn: np.ndarray
    ) -> tuple[Tensor, Objects]:
        """uint8 [H, W, C] and its objects -> float32 [C, h, w], normalised, and what is left of them."""
        pixels, objects = self.cut(image, objects, drawn)
        return self._normalised(pixels), objects

    def cut(self, image: np.ndarray, objects: Objects, drawn: np.ndarray) -> tuple[Tensor, Objects]:
        """As `training`, to uint8: what a loader's threads do. `finish` does the rest."""
        flip, way, side, first, *cut = drawn.tolist()
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        if flip < self.flip:
            pixels, objects = pixels.flip(2), mirrored(objects, pixels.shape[2])
        if way < self.crop_chance:
            size = _fitted(pixels, self.longer_before_crop, _one(self.before_crop, first))
            pixels, objects = resized(pixels, objects, size)
            pixels, objects = self._cropped(pixels, objects, cut)
        size = _fitted(pixels, self.longer, _one(self.sides, side))
        return resized(pixels, objects, size)

    def finish(self, pixels: Tensor, shown: Sequence[Shown]) -> Tensor:
        """uint8 [B, C, H, W] of `together` -> float32, normalised where they are; around them 0."""
        images = self._normalised(pixels)
        for image, own in zip(images, shown, strict=True):
            image[:, own.size[0] :] = 0
            image[:, :, own.size[1] :] = 0
        return images

    def _cropped(
        self, pixels: Tensor, objects: Objects, drawn: list[float]
    ) -> tuple[Tensor, Objects]:
        H, W = pixels.shape[1:]
        low, high = self.crop
        sizes = [
            min(side, low) + int(u * (min(side, high) - min(side, low) + 1))
            for side, u in zip((H, W), drawn[:2], strict=True)
        ]
        top, left = (
            int(u * (side - own + 1)) for u, side, own in zip(drawn[2:], (H, W), sizes, strict=True)
        )
        rows, columns = slice(top, top + sizes[0]), slice(left, left + sizes[1])
        return pixels[:, rows, columns], cut_out(objects, top, left, (sizes[0], sizes[1]))

    def test(self, image: np.ndarray) -> tuple[Tensor, Shown]:
        """uint8 [H, W, C] -> float32 [1, C, h, w], padded with the mean, and how it lies there."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        size = _fitted(pixels, self.longer, self.test_side)
        batch = padded([self._normalised(resized_image(pixels, size))], MULTIPLE)
        height, width = image.shape[:2]
        return batch, Shown(size, (batch.shape[2], batch.shape[3]), (height, width))

    def _normalised(self, pixels: Tensor) -> Tensor:
        return colours.normalize(pixels.float() / 255, [*self.mean], [*self.std])


def together(
    pictures: Sequence[tuple[Tensor, Objects]],
) -> tuple[Tensor, list[Shown], list[Objects]]:
    """Pictures [C, h_i, w_i] and their objects as one batch: [B, C, H, W], padded with 0, the mean.

    Masks are padded to their own picture's multiples, as boxes may reach there.
    """
    shown, objects = [], []
    for pixels, own in pictures:
        h, w = pixels.shape[1:]
        around = (-(-h // MULTIPLE) * MULTIPLE, -(-w // MULTIPLE) * MULTIPLE)
        masks = own.masks.new_zeros(len(own), *around)
        masks[:, :h, :w] = own.masks
        shown.append(Shown((h, w), around))
        objects.append(dataclasses.replace(own, masks=masks))
    return padded([pixels for pixels, _ in pictures], MULTIPLE), shown, objects


def oriented_order(portrait: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order of pictures where each batch holds one orientation: int64 [n * batch].

    As the published sampler's, no picture is left out: the last batch of each orientation is filled
    up with the first pictures of that orientation, which come once more.

    Args:
        portrait: bool [N]. batch: pictures that are shown together, over all processes, so that the
            pictures of a step are the same however many there are (published: of each process).
    """
    order = epoch_order(len(portrait), seed, epoch)
    place = np.empty(len(portrait), np.int64)
    place[order] = np.arange(len(order))
    batches = []
    for kind in (False, True):
        own = order[portrait[order] == kind]
        if len(own):
            whole = np.resize(own, -(-len(own) // batch) * batch).reshape(-1, batch)
            # A batch comes where its first picture stood in the order.
            batches += [(int(place[rows[0]]), rows) for rows in whole]
    batches.sort(key=lambda pair: pair[0])
    rows = [rows for _, rows in batches]
    return np.concatenate(rows) if rows else np.empty(0, np.int64)


def repeats_of(order: np.ndarray) -> np.ndarray:
    """How often the picture at each place of an order [n] came before it: int64 [n].

    >>> repeats_of(np.array([4, 2, 4, 4]))
    array([0, 0, 1, 2])
    """
    by_picture = np.argsort(order, kind="stable")
    begins = np.flatnonzero(np.diff(order[by_picture], prepend=-1))
    runs = np.diff(begins, append=len(order))
    found = np.empty(len(order), np.int64)
    found[by_picture] = np.arange(len(order)) - np.repeat(begins, runs)
    return found


def _one(values: tuple[int, ...], drawn: float) -> int:
    return values[int(drawn * len(values))]


def _fitted(pixels: Tensor, longer: int, shorter: int) -> Size:
    return fitted(pixels.shape[1], pixels.shape[2], longer, shorter)


def mirrored(objects: Objects, width: int) -> Objects:
    """As they are when left and right of a picture of this width change places."""
    left, top, right, bottom = objects.boxes.unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return dataclasses.replace(objects, boxes=boxes, masks=objects.masks.flip(2))


def resized(pixels: Tensor, objects: Objects, size: Size) -> tuple[Tensor, Objects]:
    """A picture uint8 [C, H, W] and its objects at another size."""
    H, W = pixels.shape[1:]
    factor = torch.tensor([size[1] / W, size[0] / H] * 2)
    masks = [resized_labels(mask, size) for mask in objects.masks]
    found = Objects(
        clipped(objects.boxes * factor, size),
        objects.labels,
        torch.stack(masks) if masks else objects.masks.new_zeros(0, *size),
    )
    return resized_image(pixels, size), found


def cut_out(objects: Objects, top: int, left: int, size: Size) -> Objects:
    """What is left of them in a crop; those with nothing left of their box are dropped."""
    boxes = clipped(objects.boxes - objects.boxes.new_tensor([left, top] * 2), size)
    stay = (boxes[:, 2:] > boxes[:, :2]).all(1)
    masks = objects.masks[stay, top : top + size[0], left : left + size[1]]
    return Objects(boxes[stay], objects.labels[stay], masks)
