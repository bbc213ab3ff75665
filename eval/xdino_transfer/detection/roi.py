"""Heads on regions: which class, which box, which mask (Mask R-CNN, arXiv 1703.06870).

As mmdetection 2.11 trains and asks them, with torchvision's modules and names: class 0 is background,
class 1 + k is label k, and each class has its own differences and its own mask. Published files have
background last and neither differences nor a mask for it: see `published`. Where torchvision computes
otherwise an argument says so; `TORCHVISION` is its set of constants.

Golden vector `detector_roi`: `RegionHeads.sample` (assignments), `classified` (`logits`, `deltas`),
`targets` (`labels`, `targets`), `masked` (`mask_logits`), `losses`, `detect` (`test/*`).

Letters: B images, R regions, K classes, P positives, N detections, D width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from xdino_transfer.detection.boxes import BoxCoder, Pooling, large_enough, suppressed
from xdino_transfer.detection.masks import mask_targets, pasted
from xdino_transfer.detection.matching import Matcher, Sample, Sampler
from xdino_transfer.detection.objects import Detections, Objects, Shown


@dataclass(frozen=True)
class RegionSettings:
    """The published constants.

    beta: of a smooth L1 loss; 0 is L1. mask_threshold: of mask targets; None leaves them shares.
    score, overlap, most, least: which detections stay (`least` pixels a side).
    """

    coder: BoxCoder = field(default_factory=lambda: BoxCoder((0.1, 0.1, 0.2, 0.2)))
    matcher: Matcher = field(default_factory=lambda: Matcher(0.5, 0.5, 0.5))
    sampler: Sampler = field(default_factory=lambda: Sampler(512, 0.25))
    pooling: Pooling = field(default_factory=Pooling)
    beta: float = 0.0
    mask_threshold: float | None = 0.5
    mask_aligned: bool = True
    score: float = 0.05
    overlap: float = 0.5
    most: int = 100
    least: float = 0.0


TORCHVISION = RegionSettings(
    BoxCoder((0.1, 0.1, 0.2, 0.2), narrowest=-float("inf")),
    Matcher(0.5, 0.5, None),
    pooling=Pooling(samples=2, aligned=False),
    beta=1 / 9,
    mask_threshold=None,
    mask_aligned=False,
    least=1e-2,
)


@dataclass(frozen=True)
class Regions:
    """What is learned from in one image: boxes [R, 4], the P positives first.

    labels: int64 [R], 0 for background. objects: int64 [P], which the positives are to find.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor


class RegionHeads(nn.Module):
    """Two layers of `hidden` for classes and boxes, four convolutions for masks.

    Args:
        width: of the levels. classes: K. hidden: 1,024 as published. mask_width: of its convolutions.
    """

    BOX_SIDE, MASK_SIDE = 7, 14

    def __init__(
        self,
        width: int,
        classes: int,
        hidden: int = 1024,
        mask_width: int = 256,
        settings: RegionSettings | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.classes = settings or RegionSettings(), classes
        self.box_head = TwoMLPHead(width * self.BOX_SIDE**2, hidden)
        self.box_predictor = FastRCNNPredictor(hidden, classes + 1)
        self.mask_head = MaskRCNNHeads(width, (mask_width,) * 4, 1)
        self.mask_predictor = MaskRCNNPredictor(mask_width, mask_width, classes + 1)
        self._start()

    def _start(self) -> None:
        """The published initial weights."""
        for layer in (self.box_head.fc6, self.box_head.fc7):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=0.001)
        for module in (*self.mask_head.modules(), *self.mask_predictor.modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():  # background has no box, and no mask
            self.box_predictor.bbox_pred.weight[:4] = 0
            self.mask_predictor.mask_fcn_logits.weight[:1] = 0

    # --- raw outputs ----------------------------------------------------------------------------

    def classified(
        self, levels: Sequence[Tensor], boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Boxes [R_i, 4] of each image -> logits [R, 1 + K] and differences [R, 1 + K, 4]."""
        found = self.settings.pooling(levels, boxes, self.BOX_SIDE)
        logits, deltas = self.box_predictor(self.box_head(found))
        return logits.float(), deltas.float().unflatten(1, (-1, 4))

    def masked(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Boxes [R_i, 4] of each image -> logits of masks [R, 1 + K, 28, 28]."""
        found = self.settings.pooling(levels, boxes, self.MASK_SIDE)
        return self.mask_predictor(self.mask_head(found)).float()

    # --- training -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, proposals: Tensor, objects: Objects, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Sample]:
        """Of one image: the candidates [M + P, 4], objects first, and which of them are learned from."""
        matched = self.settings.matcher(proposals, objects.boxes)
        own = torch.arange(1, len(objects) + 1, device=matched.device)
        candidates = torch.cat([objects.boxes, proposals])
        return candidates, self.settings.sampler(torch.cat([own, matched]), generator)

    def regions(self, candidates: Tensor, sample: Sample, objects: Objects) -> Regions:
        boxes = candidates[torch.cat([sample.positive, sample.negative])]
        labels = torch.zeros(len(sample), dtype=torch.int64, device=boxes.device)
        labels[: len(sample.positive)] = objects.labels[sample.objects] + 1
        return Regions(boxes, labels, sample.objects)

    def targets(self, regions: Regions, objects: Objects) -> Tensor:
        """The differences [P, 4] of the positives to their objects."""
        positive = regions.boxes[: len(regions.objects)]
        return self.settings.coder.encode(positive, objects.boxes[regions.objects])

    def losses(
        self,
        levels: Sequence[Tensor],
        regions: Sequence[Regions],
        objects: Sequence[Objects],
        counts: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """`class`, `box` and `mask`, one number each.

        counts: of regions and of positives, to divide by; None = of those that are given.
        """
        logits, deltas = self.classified(levels, [own.boxes for own in regions])
        labels = torch.cat([own.labels for own in regions])
        targets = torch.cat([self.targets(*pair) for pair in zip(regions, objects, strict=True)])
        (positive,) = torch.where(labels > 0)
        chosen = deltas[positive, labels[positive]]
        apart = F.smooth_l1_loss(chosen, targets, reduction="sum", beta=self.settings.beta)
        classes = F.cross_entropy(logits, labels, reduction="sum")
        count, positives = (max(len(labels), 1), None) if counts is None else counts
        return {
            "class": classes / count,
            "box": apart / count,
            "mask": self._mask_loss(levels, regions, objects, positives),
        }

    def _mask_loss(
        self,
        levels: Sequence[Tensor],
        regions: Sequence[Regions],
        objects: Sequence[Objects],
        count: Tensor | None,
    ) -> Tensor:
        boxes = [own.boxes[: len(own.objects)] for own in regions]
        logits = self.masked(levels, boxes)
        if not len(logits):
            return logits.sum()  # 0, with a gradient of 0 for every parameter
        labels = torch.cat([own.labels[: len(own.objects)] for own in regions])
        found = logits[torch.arange(len(logits), device=labels.device), labels]
        targets = torch.cat(
            [self.mask_targets(*pair) for pair in zip(regions, objects, strict=True)]
        )
        if count is None:
            return F.binary_cross_entropy_with_logits(found, targets)
        cells = found[0].numel()
        return F.binary_cross_entropy_with_logits(found, targets, reduction="sum") / (count * cells)

    def mask_targets(self, regions: Regions, objects: Objects) -> Tensor:
        """[P, 28, 28] of the positives of one image."""
        boxes = regions.boxes[: len(regions.objects)]
        side = 2 * self.MASK_SIDE
        settings = self.settings
        return mask_targets(
            objects.masks,
            regions.objects,
            boxes,
            side,
            settings.mask_threshold,
            settings.mask_aligned,
        )

    # --- test -----------------------------------------------------------------------------------

    @torch.no_grad()
    def detect(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], shown: Sequence[Shown]
    ) -> list[Detections]:
        """What is found in each image, from its proposals [P_i, 4]."""
        logits, deltas = self.classified(levels, proposals)
        counts = [len(own) for own in proposals]
        kept = [
            self._best(scores, own_deltas, boxes, picture)
            for scores, own_deltas, boxes, picture in zip(
                logits.softmax(1).split(counts), deltas.split(counts), proposals, shown, strict=True
            )
        ]
        scales = [boxes.new_tensor(p.scale) for (boxes, _, _), p in zip(kept, shown, strict=True)]
        here = [boxes * scale for (boxes, _, _), scale in zip(kept, scales, strict=True)]
        masks = self.masked(levels, here).sigmoid().split([len(boxes) for boxes in here])
        found = []
        for (boxes, scores, labels), own, picture in zip(kept, masks, shown, strict=True):
            chosen = own[torch.arange(len(own), device=own.device), labels + 1]
            size = picture.original or picture.size
            found.append(Detections(boxes, scores, labels, pasted(chosen, boxes, size)))
        return found

    def _best(
        self, scores: Tensor, deltas: Tensor, proposals: Tensor, shown: Shown
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N, 4] in the original's pixels, scores [N] and labels [N], best first."""
        boxes = self.settings.coder.decode(proposals[:, None], deltas, shown.size)
        boxes = boxes / boxes.new_tensor(shown.scale)  # suppressed as they are in the original
        region, label = torch.where(scores[:, 1:] > self.settings.score)
        boxes, found = boxes[region, label + 1], scores[region, label + 1]
        large = large_enough(boxes, self.settings.least)
        boxes, found, label = boxes[large], found[large], label[large]
        stay = suppressed(boxes, found, label, self.settings.overlap)[: self.settings.most]
        return boxes[stay], found[stay], label[stay]


def counted(regions: Sequence[Regions]) -> tuple[int, int]:
    """How many regions are learned from (one where there is none), and how many of them are positive."""
    count = sum(len(own.labels) for own in regions)
    return max(count, 1), sum(len(own.objects) for own in regions)


def without_sampling(settings: RegionSettings) -> RegionSettings:
    """The same, learning from every region."""
    return dataclasses.replace(settings, sampler=Sampler(2**40, 0.5))
