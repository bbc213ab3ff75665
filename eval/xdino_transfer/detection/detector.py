"""Mask R-CNN on an XCiT: images to boxes and masks.

Golden vector `detector`: `Detector.losses_of` (training from levels) and `Detector.detect_in` (test),
its tensors by `published.from_published`.

Letters: B images, H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xdino.errors import UsageError
from xdino_transfer.detection import roi, rpn
from xdino_transfer.detection.boxes import Size
from xdino_transfer.detection.objects import Detections, Objects, Shown
from xdino_transfer.detection.roi import RegionHeads
from xdino_transfer.detection.rpn import RegionProposals
from xdino_transfer.fpn import FPN
from xdino_transfer.pyramid import STRIDES, Pyramid


@dataclass(frozen=True)
class Shape:
    """Widths of the published detector: of levels, of the box head, of the mask head."""

    width: int = 256
    hidden: int = 1024
    mask_width: int = 256


@dataclass(frozen=True)
class Drawing:
    """What a step over several processes is told besides its pictures.

    generators: one of each picture, on its device, which anchors and regions are drawn from; None =
    torch's own there. average: of three counts [3], over the processes; None = this one alone.
    """

    generators: Sequence[torch.Generator | None] | None = None
    average: Callable[[Tensor], Tensor] | None = None


class Detector(nn.Module):
    """Backbone to levels, a pyramid network with a fifth level, proposals, heads on regions."""

    def __init__(
        self, backbone: nn.Module, neck: FPN, proposing: RegionProposals, heads: RegionHeads
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.rpn, self.roi = backbone, neck, proposing, heads

    # --- training -------------------------------------------------------------------------------

    def losses(
        self, images: Tensor, shown: Sequence[Shown], objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """`rpn_class`, `rpn_box`, `class`, `box` and `mask` for images [B, C, H, W], one number each."""
        found = self.losses_of(self.backbone(images), _size(images), shown, objects)
        return {name: loss.sum() for name, loss in found.items()}

    def losses_of(
        self,
        levels: Sequence[Tensor],
        batch: Size,
        shown: Sequence[Shown],
        objects: Sequence[Objects],
        drawing: Drawing | None = None,
    ) -> dict[str, Tensor]:
        """The same from the backbone's levels; those of the proposals level by level.

        drawing: with its average every loss is divided as if all processes' pictures were one batch,
        so that the mean of the processes' losses is that batch's. Published: each for itself.
        """
        drawing = drawing or Drawing()
        generators = drawing.generators or [None] * len(objects)
        features = self.neck(levels)
        outputs = self.rpn(features)
        boxes = [own.boxes for own in objects]
        samples = [
            self.rpn.settings.sampler(self.rpn.assign(outputs[0], batch, picture, own), generator)
            for picture, own, generator in zip(shown, boxes, generators, strict=True)
        ]
        proposals = self.rpn.proposals(outputs, batch, shown, self.rpn.settings.train)
        regions = []
        for (proposed, _), own, generator in zip(proposals, objects, generators, strict=True):
            candidates, sample = self.roi.sample(proposed, own, generator)
            regions.append(self.roi.regions(candidates, sample, own))
        if drawing.average is None:
            losses = self.rpn.losses(outputs, batch, samples, boxes)
            return losses | self.roi.losses(features, regions, objects)
        numbers = [rpn.counted(samples), *roi.counted(regions)]
        mine = torch.tensor(numbers, dtype=torch.float32, device=features[0].device)
        counts = drawing.average(mine)
        counts = torch.where(counts > 0, counts, 1.0)
        losses = self.rpn.losses(outputs, batch, samples, boxes, counts[0])
        return losses | self.roi.losses(features, regions, objects, [*counts[1:]])

    # --- test -----------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, images: Tensor, shown: Sequence[Shown]) -> list[Detections]:
        return self.detect_in(self.backbone(images), _size(images), shown)

    @torch.no_grad()
    def detect_in(
        self, levels: Sequence[Tensor], batch: Size, shown: Sequence[Shown]
    ) -> list[Detections]:
        """What is found, from the backbone's levels."""
        features = self.neck(levels)
        outputs = self.rpn(features)
        proposals = self.rpn.proposals(outputs, batch, shown, self.rpn.settings.test)
        return self.roi.detect(features, [boxes for boxes, _ in proposals], shown)


def _size(images: Tensor) -> Size:
    return images.shape[2], images.shape[3]


def build(
    backbone: Pyramid,
    classes: int,
    shape: Shape | None = None,
    rpn_settings: rpn.RPNSettings | None = None,
    roi_settings: roi.RegionSettings | None = None,
) -> Detector:
    """A new detector on an XCiT's pyramid, with the published constants unless others are given.

    Raises:
        UsageError: no class.
    """
    if classes < 1:
        raise UsageError(f"a detector needs at least one class of objects, got {classes}")
    shape = shape or Shape()
    return Detector(
        backbone,
        FPN([backbone.embed_dim] * len(STRIDES), shape.width, extra=True),
        RegionProposals(shape.width, rpn_settings),
        RegionHeads(shape.width, classes, shape.hidden, shape.mask_width, roi_settings),
    )
