"""Micro-batches of labelled training images, cut and augmented by threads.

An image's view follows from (seed, epoch, index, repeat), see `views`; which images a step takes, from
the seed and its number. With repeated augmentation the epoch's order is the published sampler's, see
`repeated_sampler`.

Letters: B images of a micro-batch on one rank, s side of a crop, C channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from xdino.data import BadImage, Loader, Source, steps_per_epoch
from xdino.errors import UsageError
from xdino_transfer.classification.repeated_sampler import images_per_epoch, repeated_order
from xdino_transfer.classification.views import Draws, TrainingView

_order = lru_cache(maxsize=2)(repeated_order)  # every micro-batch asks for its epoch's


@dataclass(frozen=True)
class LabelledBatch:
    """One micro-batch of one rank.

    crops: uint8 [B, s, s, C]; labels: int64 [B], of what the crops show; drawn: what happened, and
    is still to happen, to them. indices: int64 [B] of what was asked for. part: the number of the
    micro-batch among all processes' of the step.
    """

    crops: Tensor
    labels: Tensor
    drawn: Draws
    indices: np.ndarray
    iteration: int
    epoch: int
    part: int


@dataclass(eq=False)
class LabelledLoader(Loader[LabelledBatch]):
    """As `data.CropLoader`; repeats: how often an image comes in a row in an epoch, 1 for once."""

    source: Source
    view: TrainingView
    batch_size: int
    seed: int
    repeats: int = 1
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    workers: int = 2
    prefetch: int = 3
    pin_memory: bool = False
    max_bad_share: float = 0.05
    known_bad: InitVar[Iterable[BadImage]] = ()

    bad: dict[int, tuple[str, str]] = field(init=False, default_factory=dict)
    wait_seconds: float = field(init=False, default=0.0)
    threads = "xdino-views"

    def __post_init__(self, known_bad: Iterable[BadImage]) -> None:
        assert self.source.labels is not None
        if self.source.channels != len(self.view.mean):
            raise UsageError(
                f"{self.source.name} has {self.source.channels} channels, but mean and std have "
                f"{len(self.view.mean)}"
            )
        self._labels = torch.from_numpy(np.asarray(self.source.labels, np.int64))
        self._begin(known_bad)

    def _steps(self) -> int:
        n = len(self.source)
        if self.repeats > 1:
            repeated_order(n, self.seed, 0, 0, 1, self.repeats)  # refuses what is too small
            n = images_per_epoch(n, self.world_size) * self.world_size
        return steps_per_epoch(n, self.global_batch)

    def images_at(self, iteration: int, micro: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The epoch of iteration `iteration`, counted from 0; a micro-batch's images [B], and which
        repeat of its image each of them is [B]."""
        if self.repeats == 1:
            epoch, indices = self.indices_at(iteration, micro)
            return epoch, indices, np.zeros_like(indices)
        epoch, step = divmod(iteration, self.steps_per_epoch)
        indices, repeats = _order(
            len(self.source), self.seed, epoch, self.rank, self.world_size, self.repeats
        )
        first = (step * self.accumulate + micro) * self.batch_size
        mine = slice(first, first + self.batch_size)
        return epoch, indices[mine], repeats[mine]

    def _prepare(
        self, iteration: int, micro: int
    ) -> tuple[LabelledBatch, list[Callable[[], None]]]:
        epoch, indices, repeats = self.images_at(iteration, micro)
        side, B = self.view.size, self.batch_size
        crops = torch.empty(
            (B, side, side, self.source.channels), dtype=torch.uint8, pin_memory=self.pin_memory
        )
        drawn = self.view.draw(self.seed, epoch, indices, repeats)
        labels = torch.empty(B, dtype=torch.int64, pin_memory=self.pin_memory)
        slots = crops.numpy()

        def fill(first: int, last: int) -> None:
            for row in range(first, last):
                shown, image = self._read(int(indices[row]))
                labels[row] = self._labels[shown]
                try:
                    slots[row] = self.view.cut(image, drawn, row)
                except Exception as error:
                    error.add_note(f"while cutting {self.source.describe(shown)}")
                    raise

        part = micro * self.world_size + self.rank
        batch = LabelledBatch(crops, labels, drawn, indices, iteration, epoch, part)
        return batch, self._tasks(fill)
