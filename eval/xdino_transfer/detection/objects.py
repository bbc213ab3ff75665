"""What is known of a picture in a detector: its sizes, its objects, and what was found.

Letters: M objects, N detections, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xdino_transfer.detection.boxes import Size


@dataclass(frozen=True)
class Shown:
    """How a picture lies in a batch.

    size: of its own pixels. padded: of itself with what was added to it alone (multiples of 32).
    original: of the picture before it was resized, None where it was not.
    """

    size: Size
    padded: Size
    original: Size | None = None

    @property
    def scale(self) -> tuple[float, float, float, float]:
        """Pixels here of one pixel in the original: across, down, across, down."""
        H, W = self.original or self.size
        across, down = self.size[1] / W, self.size[0] / H
        return across, down, across, down


@dataclass(frozen=True)
class Objects:
    """Of one picture: boxes float32 [M, 4], labels int64 [M] from 0, masks uint8 or bool [M, H, W]."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device) -> "Objects":
        return Objects(self.boxes.to(device), self.labels.to(device), self.masks.to(device))


@dataclass(frozen=True)
class Detections:
    """Of one picture, best first, in the original's pixels: boxes [N, 4], scores [N], labels int64
    [N] from 0, masks bool [N, H, W]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
