"""Heads of semantic segmentation: levels of features -> logits [B, K, h, w] at the first level's size.

Semantic FPN (Kirillov et al., arXiv 1901.02446), UperNet (Xiao et al., arXiv 1807.10221) with its
auxiliary head, and a linear map on frozen features (DINOv2's and DINOv3's probe). Names are those of
the published files: `decode_head.*`, `auxiliary_head.*`.

Golden vectors `semantic_fpn`, `upernet`: `SemanticFPN` behind `fpn.FPN`, `UperNet` and `Auxiliary`,
in a `segmenter.Segmenter`.

Letters: B images, D width of a level, K classes, (h, w) grid of the first level.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdino.runtime.drop_path import Rows
from xdino_transfer.resizing import bilinear


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SharedDropout(nn.Dropout2d):
    """Channels left out, drawn for the images of all processes (see `xdino.runtime.drop_path`).

    So the same images lose the same channels on one process and on eight.
    """

    rows: Rows | None = None  # which of the images are here; None: all

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows
        if not self.training or not self.p or rows is None or rows.images != len(x):
            return super().forward(x)
        of_all = x.new_empty(rows.total, x.shape[1], 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)
        return x * torch.cat([of_all[first:last] for first, last in rows.mine])


class Head(nn.Module):
    """What all heads end in: dropped channels, and a 1x1 convolution `conv_seg`."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = SharedDropout(dropout)
        self.conv_seg = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        if self.conv_seg.bias is not None:
            nn.init.zeros_(self.conv_seg.bias)

    def classified(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class SemanticFPN(Head):
    """Each level to the first one's size by convolutions and doublings, all summed.

    Args:
        widths: of the four levels. channels: 128 as published.
    """

    def __init__(
        self, widths: Sequence[int], classes: int, channels: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__(channels, classes, dropout)
        self.scale_heads = nn.ModuleList()
        for i, width in enumerate(widths):
            steps: list[nn.Module] = []
            for step in range(max(1, i)):
                steps.append(ConvNorm(channels if step else width, channels, 3))
                if i:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*steps))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        first = self.scale_heads[0](levels[0])
        for head, level in zip(self.scale_heads[1:], levels[1:], strict=True):
            # Doubled grids of odd sizes miss the first level's by a cell or two.
            first = first + bilinear(head(level), first.shape[2:])
        return self.classified(first)


class UperNet(Head):
    """A pyramid pooling module on the last level, a top-down path, all levels fused.

    Args:
        widths: of the four levels. channels: 512 as published. pools: cells a side of the pools.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        pools: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__(channels, classes, dropout)
        *lower, last = widths
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), ConvNorm(last, channels, 1))
            for cells in pools
        )
        self.bottleneck = ConvNorm(last + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvNorm(len(widths) * channels, channels, 3)

    def _pooled(self, level: Tensor) -> Tensor:
        parts = [bilinear(pool(level), level.shape[2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([level, *parts], dim=1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        found = [
            lateral(level) for lateral, level in zip(self.lateral_convs, levels[:-1], strict=True)
        ]
        found.append(self._pooled(levels[-1]))
        for upper, lower in pairwise(range(len(found) - 1, -1, -1)):
            found[lower] = found[lower] + bilinear(found[upper], found[lower].shape[2:])
        outputs = [
            conv(level) for conv, level in zip(self.fpn_convs, found[:-1], strict=True)
        ] + found[-1:]
        size = outputs[0].shape[2:]
        return self.classified(
            self.fpn_bottleneck(torch.cat([bilinear(x, size) for x in outputs], dim=1))
        )


class Auxiliary(Head):
    """A second opinion from one level, in training only: UperNet's FCN head on the third level."""

    def __init__(
        self,
        width: int,
        classes: int,
        channels: int = 256,
        dropout: float = 0.1,
        level: int = 2,
    ) -> None:
        super().__init__(channels, classes, dropout)
        self.level = level
        self.convs = nn.Sequential(ConvNorm(width, channels, 3))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return self.classified(self.convs(levels[self.level]))


class LinearMap(Head):
    """DINOv3's linear probe: BatchNorm, dropped channels and a 1x1 convolution on frozen tokens.

    It reads the last of the levels that it is given.
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__(width, classes, dropout)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return self.classified(self.bn(levels[-1]))
