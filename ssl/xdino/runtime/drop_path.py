"""Stochastic depth (arXiv 1603.09382) that does not depend on how images are shared out.

What is dropped is drawn for the images of all processes, from a generator that is seeded alike on
each (`job.LoaderJob`), and every process takes its own images' part of it. So the same images lose
the same blocks on one process and on eight, and no process has a generator of its own to save.

Letters: B rows (images of V views one after the other), M images of a micro-batch over all processes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """Which images of a micro-batch are this process's.

    total: M. mine: from and up to which of them, in the order that this process has them in.
    """

    total: int
    mine: tuple[tuple[int, int], ...]

    @property
    def images(self) -> int:
        return sum(last - first for first, last in self.mine)


def drop_path_mask(x: Tensor, rate: float, rows: Rows | None = None, scale: bool = True) -> Tensor:
    """Per image of `[B, ...]`, 0 or what keeps the mean: `[B, 1, ...]`.

    rows: None where no other process has images, or where x is none of a training step.
    scale: False for 0 and 1.
    """
    keep, B = 1.0 - rate, x.shape[0]
    if rows is None or rows.total == rows.images or B % rows.images:
        mask = x.new_empty(B).bernoulli_(keep)
    else:
        of_all = x.new_empty(B // rows.images, rows.total).bernoulli_(keep)  # [V, M]
        mask = torch.cat([of_all[:, first:last] for first, last in rows.mine], 1).reshape(B)
    if scale:
        mask.div_(keep)
    return mask.view((B,) + (1,) * (x.ndim - 1))


def tell_rows(network: nn.Module, rows: Rows | None) -> None:
    """Every layer of `network` that drops paths (by an attribute `rows`) hears whose images it sees."""
    for module in network.modules():
        if hasattr(type(module), "rows"):
            module.rows = rows  # type: ignore[assignment]
