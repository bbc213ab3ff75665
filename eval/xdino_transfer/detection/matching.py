"""Which box is to find which object, and which boxes are learned from.

Golden vectors `detector_rpn` (`assigned`), `detector_roi` (`image/*/assigned`): `Matcher`.

Letters: N boxes, M objects, P positives, Q negatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xdino_transfer.detection.boxes import overlaps

IGNORED, BACKGROUND = -1, 0  # of a box; 1 + m is object m


@dataclass(frozen=True)
class Matcher:
    """Overlaps to objects: mmdetection's MaxIoUAssigner.

    Args:
        positive: a box that overlaps its best object by as much finds it.
        negative: one that overlaps all by less is background; those between are left out.
        least: the boxes that overlap an object best find it, if by as much; None = they need not.
        own_best: such a box finds the object that it overlaps best (torchvision), instead of the
            one whose best it is (published; of several the last).
    """

    positive: float
    negative: float
    least: float | None
    own_best: bool = False

    def __call__(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """Boxes [N, 4] and objects [M, 4] -> int64 [N]: IGNORED, BACKGROUND or 1 + the object."""
        if not len(objects) or not len(boxes):
            return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
        shared = overlaps(objects, boxes)  # [M, N]
        best, whose = shared.max(dim=0)
        found = torch.full_like(whose, IGNORED)
        found[best < self.negative] = BACKGROUND
        found[best >= self.positive] = whose[best >= self.positive] + 1
        if self.least is not None:
            most = shared.max(dim=1, keepdim=True).values  # of each object
            chosen = (shared == most) & (most >= self.least)
            numbers = torch.arange(1, len(objects) + 1, device=boxes.device)[:, None]
            last = (chosen * numbers).max(dim=0).values
            found = torch.where(last > 0, whose + 1 if self.own_best else last, found)
        return found


@dataclass(frozen=True)
class Sample:
    """What is learned from in one image.

    positive: int64 [P], numbers of boxes. negative: int64 [Q]. objects: int64 [P], what the
    positives are to find.
    """

    positive: Tensor
    negative: Tensor
    objects: Tensor

    @classmethod
    def of(cls, assigned: Tensor, positive: Tensor, negative: Tensor) -> "Sample":
        return cls(positive, negative, assigned[positive] - 1)

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)


@dataclass(frozen=True)
class Sampler:
    """At most `count` boxes of an image, of them at most `positives` (a share) positive ones."""

    count: int
    positives: float

    def __call__(self, assigned: Tensor, generator: torch.Generator | None = None) -> Sample:
        """`generator`: on the boxes' device; None = torch's own there."""
        positive = torch.where(assigned > BACKGROUND)[0]
        positive = _some(positive, int(self.count * self.positives), generator)
        negative = torch.where(assigned == BACKGROUND)[0]
        negative = _some(negative, self.count - len(positive), generator)
        return Sample.of(assigned, positive, negative)


def _some(numbers: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """At most `most` of `numbers`, ascending."""
    if len(numbers) <= most:
        return numbers
    drawn = torch.randperm(len(numbers), generator=generator, device=numbers.device)[:most]
    return numbers[drawn].sort().values
