"""Patch tokens of pictures, the shares of classes that they see, and classes of patches to pixels.

Letters: N patches of a picture, K classes, D width, (h, w) patch grid, H x W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from xdino.backbone import Backbone
from xdino.errors import RunFailed
from xdino_transfer.segmentation.losses import VOID

_STRIP = 1 << 24  # numbers of a strip of pixels' votes


@dataclass(frozen=True)
class Patches:
    """Of one picture: unit tokens float32 [N, D] on their grid, and where it lies in the picture.

    scale: patches a pixel of the original, down and across. start: of the first patch, in patches
    from the picture's edge.
    """

    tokens: np.ndarray
    grid: tuple[int, int]
    scale: tuple[float, float]
    start: float

    def places(self, axis: int, side: int) -> np.ndarray:
        """Where the centres of `side` pixels lie on the grid: patch i reaches from i to i + 1."""
        return (np.arange(side) + 0.5) * self.scale[axis] - self.start

    def shares(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Shares of classes among the labelled pixels of each patch, float32 [N, K]; 0 without any."""
        h, w = self.grid
        rows, columns = (
            np.clip(np.floor(self.places(axis, side)).astype(int), 0, cells - 1)
            for axis, (side, cells) in enumerate(zip(labels.shape, self.grid, strict=True))
        )
        patch = rows[:, None] * w + columns[None]
        there = labels != VOID
        flat = patch[there] * classes + labels[there]
        counts = np.bincount(flat, minlength=h * w * classes).reshape(h * w, classes)
        return (counts / np.maximum(counts.sum(1, keepdims=True), 1)).astype(np.float32)

    def pixels(self, votes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Votes [N, K] -> the class of each pixel of the original picture, int64 [H, W]."""
        (h, w), (H, W) = self.grid, size
        maps = torch.from_numpy(votes).T.reshape(1, -1, h, w)
        y, x = (
            torch.from_numpy(self.places(axis, side) / cells * 2 - 1).float()
            for axis, (side, cells) in enumerate(zip(size, self.grid, strict=True))
        )
        strip = max(1, _STRIP // (maps.shape[1] * W))
        found = []
        for rows in y.split(strip):
            grid = torch.stack(torch.meshgrid(rows, x, indexing="ij")[::-1], dim=-1)[None]
            sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
            found.append(sampled[0].argmax(0))
        return torch.cat(found).numpy().reshape(H, W)


def patches_of(backbone: Backbone, image: np.ndarray, size: int | None = None) -> Patches:
    """The patch tokens of a picture uint8 [H, W, 3] as a frozen backbone gives them last.

    Raises:
        RunFailed: they are not finite.
    """
    patch = backbone.require_patches()
    if backbone.in_chans == 1:  # luma, as decoding gives it
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    shown = backbone.whole(image, size)
    (found, _), *_ = backbone.forward_intermediates(backbone.fitting(shown))
    if not found.isfinite().all():
        raise RunFailed("the features are not finite: the weights are damaged")
    tokens = F.normalize(found[0].float().flatten(1).T, dim=1)
    (H, W), (h, w) = image.shape[:2], found.shape[2:]
    scale = (shown.shape[2] / H / patch, shown.shape[3] / W / patch)
    start = backbone.patch_start / patch
    return Patches(tokens.cpu().contiguous().numpy(), (h, w), scale, start)
