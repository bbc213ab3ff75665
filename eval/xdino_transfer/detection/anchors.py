"""Anchors: the boxes that a region proposal network starts from, a few at each cell of each level.

Golden vector `detector_rpn` (`anchors/*`, `valid`): `AnchorGrid`.

Letters: L levels, A anchors a cell, N anchors of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xdino_transfer.detection.boxes import Size


@dataclass(frozen=True)
class AnchorGrid:
    """Anchors of `scale` strides a side at the corner of each cell, of three shapes.

    Args:
        strides: pixels of a cell of each level.
        ratios: height / width of the anchors.
        rounded: to whole pixels, as torchvision does; published anchors are not.
        measured: take a level's stride from the sizes of image and grid, as torchvision does.
    """

    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    scale: float = 8.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rounded: bool = False
    measured: bool = False

    def __call__(
        self, grids: Sequence[Size], image: Size, device: torch.device | None = None
    ) -> list[Tensor]:
        """Anchors [N, 4] of each level, rows first, then columns, then shapes.

        Args:
            grids: height and width of each level. image: of the batch, in pixels.
        """
        found = []
        for stride, (h, w) in zip(self.strides, grids, strict=True):
            down, across = (image[0] // h, image[1] // w) if self.measured else (stride, stride)
            y = torch.arange(h, dtype=torch.float32, device=device) * down
            x = torch.arange(w, dtype=torch.float32, device=device) * across
            y, x = (each.flatten() for each in torch.meshgrid(y, x, indexing="ij"))
            corners = torch.stack([x, y, x, y], dim=1)
            found.append((corners[:, None] + self._shapes(stride, device)).flatten(0, 1))
        return found

    def _shapes(self, stride: int, device: torch.device | None) -> Tensor:
        """[A, 4] around (0, 0)."""
        taller = torch.tensor(self.ratios, device=device).sqrt()
        half = 0.5 * self.scale * stride
        width, height = half / taller, half * taller
        shapes = torch.stack([-width, -height, width, height], dim=1)
        return shapes.round() if self.rounded else shapes

    def inside(
        self, grids: Sequence[Size], image: Size, device: torch.device | None = None
    ) -> list[Tensor]:
        """bool [N] of each level: whose cell begins inside of an image of this (padded) size.

        In a batch of several sizes the others lie in what was added for the larger images.
        """
        found = []
        for stride, (h, w) in zip(self.strides, grids, strict=True):
            cells = torch.zeros(h, w, dtype=torch.bool, device=device)
            cells[: -(-image[0] // stride), : -(-image[1] // stride)] = True
            found.append(cells.flatten().repeat_interleave(len(self.ratios)))
        return found
