"""Boxes: overlaps, differences to a reference, levels, and suppression of what says the same twice.

Boxes are (left, top, right, bottom) in pixels, corners of areas: a box over the whole of an image of
W x H pixels is (0, 0, W, H).

Golden vector `detector_boxes`: `BoxCoder` (`coder/*`), `suppressed` (`nms/*`), `Pooling`
(`roi_align/*`), `Pooling.levels_of` (`roi_levels/*`).

Letters: N, M boxes, R regions, B images, D width, S cells a side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import ops

_WIDEST = math.log(1000 / 16)  # of a logarithm of a ratio between two boxes' sides
_MANY = 10_000  # boxes from which groups are suppressed one by one instead of side by side
Size = tuple[int, int]  # height, width


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, [N, 4] and [M, 4] -> [N, M]; 0 for boxes without an area."""
    corner = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = (corner - torch.maximum(boxes[:, None, :2], others[None, :, :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    areas, other_areas = (ops.box_area(each) for each in (boxes, others))
    return shared / (areas[:, None] + other_areas[None] - shared).clamp(min=1e-6)


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """[N, 4], cut off at the sides of an image."""
    H, W = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([W, H, W, H]))


@dataclass(frozen=True)
class BoxCoder:
    """What a box is beside a reference: (dx, dy) in its sides, logarithms of the ratios of sides.

    Args:
        stds: what each of the four is divided by.
        narrowest, widest: logarithms are cut off there when boxes are decoded.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    narrowest: float = -_WIDEST
    widest: float = _WIDEST

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """[N, 4] and [N, 4] -> differences [N, 4]."""
        centre, sides = _middle(references)
        to, others = _middle(boxes)
        found = torch.cat([(to - centre) / sides, (others / sides).log()], dim=-1)
        return found / found.new_tensor(self.stds)

    def decode(self, references: Tensor, deltas: Tensor, size: Size | None = None) -> Tensor:
        """References [..., 4] and differences [..., 4] -> boxes, cut off at an image of `size`."""
        deltas = deltas * deltas.new_tensor(self.stds)
        centre, sides = _middle(references)
        centre = centre + sides * deltas[..., :2]
        sides = sides * deltas[..., 2:].clamp(self.narrowest, self.widest).exp()
        boxes = torch.cat([centre - sides * 0.5, centre + sides * 0.5], dim=-1)
        return boxes if size is None else clipped(boxes, size)


def _middle(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 4] -> centres [..., 2] and sides [..., 2]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low


def suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Which boxes stay, best first, int64: those that overlap no better one of their group by more.

    Args:
        boxes: [N, 4]. scores: [N]. groups: [N], whole numbers (levels or classes).
    """
    if not len(boxes) or len(boxes) >= _MANY:
        return ops.batched_nms(boxes, scores, groups, threshold)
    apart = groups.to(boxes.dtype) * (boxes.max() + 1)  # as mmcv rounds it
    return ops.nms(boxes + apart[:, None], scores, threshold)


def large_enough(boxes: Tensor, least: float) -> Tensor:
    """bool [N]: both sides at least `least` pixels; 0 keeps all."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return (sides >= least).all(1) if least > 0 else torch.ones_like(boxes[:, 0], dtype=torch.bool)


@dataclass(frozen=True)
class Pooling:
    """Features of regions out of the levels of a pyramid (RoIAlign, arXiv 1703.06870).

    A region of less than twice 56 pixels a side is read from the first level, of less than twice
    that from the second, and so on.

    Args:
        strides: of the levels. finest: the side in pixels where the first level ends, halved.
        samples: points a cell and side; 0 = as many as there are cells of the map in it.
        aligned: whether pixel centres lie at halves (published) or at whole numbers (torchvision).
    """

    strides: tuple[int, ...] = (4, 8, 16, 32)
    finest: float = 56.0
    samples: int = 0
    aligned: bool = True

    def levels_of(self, boxes: Tensor) -> Tensor:
        """[R, 4] -> int64 [R]."""
        side = ops.box_area(boxes).sqrt()
        level = torch.floor(torch.log2(side / self.finest + 1e-6))
        return level.clamp(0, len(self.strides) - 1).long()

    def __call__(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
        """Levels [B, D, ., .] and boxes [R_i, 4] of each image -> [R, D, size, size].

        Of half numbers in float32, as published: places of a thousand pixels have no halves there.
        """
        rois = regions(boxes)
        levels = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in levels]
        own = self.levels_of(rois[:, 1:])
        out = levels[0].new_zeros(len(rois), levels[0].shape[1], size, size)
        for i, stride in enumerate(self.strides):
            (here,) = torch.where(own == i)
            if len(here):
                found = ops.roi_align(
                    levels[i],
                    rois[here].to(levels[i].dtype),
                    size,
                    1 / stride,
                    self.samples,
                    self.aligned,
                )
                out = out.index_put((here,), found.to(out.dtype))
        return out


def regions(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes [R_i, 4] of each image -> [R, 5] with the image's number before each."""
    return torch.cat(
        [torch.cat([torch.full_like(own[:, :1], i), own], dim=1) for i, own in enumerate(boxes)]
    )
