"""The region proposal network (Ren et al., arXiv 1506.01497), as mmdetection 2.11 trains and asks it.

Where torchvision's differs, an argument says so: `TORCHVISION` is its set of constants.

Golden vector `detector_rpn`: `RegionProposals.forward` (raw outputs, `logits/*`, `deltas/*`), `assign`
(targets), `losses`, `proposals`.

Letters: B images, L levels, A anchors a cell, N anchors of an image, P proposals.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.rpn import RPNHead

from xdino_transfer.detection.anchors import AnchorGrid
from xdino_transfer.detection.boxes import BoxCoder, Size, large_enough, suppressed
from xdino_transfer.detection.matching import IGNORED, Matcher, Sample, Sampler
from xdino_transfer.detection.objects import Shown


@dataclass(frozen=True)
class Kept:
    """Which proposals go on: the best `before` of a level, suppressed, the best `after` of an image."""

    before: int
    after: int
    overlap: float = 0.7
    least: float = 0.0  # pixels a side


@dataclass(frozen=True)
class RPNSettings:
    """The published constants.

    beta: of a smooth L1 loss; 0 is L1. own_size: anchors in what was added for larger images of the
    batch take no part.
    """

    anchors: AnchorGrid = field(default_factory=AnchorGrid)
    coder: BoxCoder = field(default_factory=BoxCoder)
    matcher: Matcher = field(default_factory=lambda: Matcher(0.7, 0.3, 0.3))
    sampler: Sampler = field(default_factory=lambda: Sampler(256, 0.5))
    train: Kept = field(default_factory=lambda: Kept(2000, 1000))
    test: Kept = field(default_factory=lambda: Kept(1000, 1000))
    beta: float = 0.0
    own_size: bool = True


TORCHVISION = RPNSettings(
    AnchorGrid(rounded=True, measured=True),
    BoxCoder(narrowest=-float("inf")),
    Matcher(0.7, 0.3, 0.0, own_best=True),
    train=Kept(2000, 2000, least=1e-3),
    test=Kept(1000, 1000, least=1e-3),
    beta=1 / 9,
    own_size=False,
)


class RegionProposals(nn.Module):
    """A 3x3 convolution and two 1x1 ones, the same on every level (torchvision's module)."""

    def __init__(self, width: int, settings: RPNSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or RPNSettings()
        self.head = RPNHead(width, len(self.settings.anchors.ratios))

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels [B, D, h, w] -> logits [B, A, h, w] and differences [B, 4 A, h, w] of each."""
        return self.head([*levels])

    def anchors(self, logits: Sequence[Tensor], batch: Size) -> list[Tensor]:
        """[N_l, 4] of each level; batch: height and width of its images."""
        grids = [(level.shape[2], level.shape[3]) for level in logits]
        return self.settings.anchors(grids, batch, logits[0].device)

    @torch.no_grad()
    def assign(
        self, logits: Sequence[Tensor], batch: Size, shown: Shown, objects: Tensor
    ) -> Tensor:
        """Of one image: int64 [N], IGNORED, BACKGROUND or 1 + the object that an anchor is to find."""
        anchors = torch.cat(self.anchors(logits, batch))
        taking_part = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
        if self.settings.own_size:
            grids = [(level.shape[2], level.shape[3]) for level in logits]
            inside = self.settings.anchors.inside(grids, shown.padded, anchors.device)
            taking_part = torch.cat(inside)
        found = torch.full((len(anchors),), IGNORED, device=anchors.device)
        found[taking_part] = self.settings.matcher(anchors[taking_part], objects)
        return found

    def losses(
        self,
        outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
        batch: Size,
        samples: Sequence[Sample],
        objects: Sequence[Tensor],
        count: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """`rpn_class` and `rpn_box`, each [L]: sums over what was sampled, divided by its number.

        Args:
            outputs: of `forward`. samples: of each image. objects: their boxes [M, 4].
            count: what to divide by; None = `counted` of the samples.
        """
        anchors = self.anchors(outputs[0], batch)
        sizes = [len(level) for level in anchors]
        every = torch.cat(anchors)
        logits, deltas = (_by_anchor(part) for part in zip(*_flat(outputs), strict=True))
        count = counted(samples) if count is None else count
        classes, boxes = torch.zeros_like(logits), torch.zeros_like(logits)
        for i, (sample, own) in enumerate(zip(samples, objects, strict=True)):
            chosen = torch.cat([sample.positive, sample.negative])
            wanted = torch.zeros(len(chosen), device=logits.device)
            wanted[: len(sample.positive)] = 1
            found = F.binary_cross_entropy_with_logits(logits[i, chosen], wanted, reduction="none")
            classes = classes.index_put((_all(i, chosen), chosen), found)
            target = self.settings.coder.encode(every[sample.positive], own[sample.objects])
            apart = F.smooth_l1_loss(
                deltas[i, sample.positive], target, reduction="none", beta=self.settings.beta
            )
            here = (_all(i, sample.positive), sample.positive)
            boxes = boxes.index_put(here, apart.sum(1))
        return {
            name: torch.stack([level.sum() for level in part.split(sizes, dim=1)]) / count
            for name, part in (("rpn_class", classes), ("rpn_box", boxes))
        }

    @torch.no_grad()
    def proposals(
        self,
        outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
        batch: Size,
        shown: Sequence[Shown],
        kept: Kept,
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each image boxes [P, 4], cut off at its own sides, and their scores [P], best first."""
        anchors = self.anchors(outputs[0], batch)
        levels = _flat(outputs)
        return [
            self._proposed(
                [(logits[i].detach(), deltas[i].detach()) for logits, deltas in levels],
                anchors,
                picture.size,
                kept,
            )
            for i, picture in enumerate(shown)
        ]

    def _proposed(
        self, levels: list[tuple[Tensor, Tensor]], anchors: list[Tensor], size: Size, kept: Kept
    ) -> tuple[Tensor, Tensor]:
        scores, deltas, references, numbers = [], [], [], []
        for number, ((logits, own), reference) in enumerate(zip(levels, anchors, strict=True)):
            best = logits.sigmoid()
            order = torch.arange(len(best), device=best.device)
            if len(best) > kept.before:
                best, order = best.sort(descending=True)
                best, order = best[: kept.before], order[: kept.before]
            scores.append(best)
            deltas.append(own[order])
            references.append(reference[order])
            numbers.append(torch.full_like(order, number))
        boxes = self.settings.coder.decode(torch.cat(references), torch.cat(deltas), size)
        large = large_enough(boxes, kept.least)
        boxes, score = boxes[large], torch.cat(scores)[large]
        stay = suppressed(boxes, score, torch.cat(numbers)[large], kept.overlap)[: kept.after]
        return boxes[stay], score[stay]


def counted(samples: Sequence[Sample]) -> int:
    """How many anchors are learned from, at least one positive and one negative each, as published."""
    return sum(max(len(s.positive), 1) + max(len(s.negative), 1) for s in samples)


def _flat(outputs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Of each level float32 logits [B, N_l] and differences [B, N_l, 4], in the anchors' order."""
    found = []
    for logits, deltas in zip(*outputs, strict=True):
        B, A, h, w = logits.shape
        found.append(
            (
                logits.float().permute(0, 2, 3, 1).reshape(B, -1),
                deltas.float().view(B, A, 4, h, w).permute(0, 3, 4, 1, 2).reshape(B, -1, 4),
            )
        )
    return found


def _by_anchor(levels: Sequence[Tensor]) -> Tensor:
    return torch.cat([*levels], dim=1)


def _all(number: int, like: Tensor) -> Tensor:
    return torch.full_like(like, number)


def without_sampling(settings: RPNSettings) -> RPNSettings:
    """The same, learning from every anchor that is not ignored."""
    return dataclasses.replace(settings, sampler=Sampler(2**40, 0.5))
