"""Micro-batches of labelled training images, cut and augmented by threads.

An image's view follows from (seed, epoch, index, repeat), see `views`; which images a step takes, from
the seed and its number. With repeated augmentation the epoch's order is the published sampler's, see
`repeated_sampler`, dealt to the processes that the run began on.

Images are mixed within a part of a step, which the run's first start had on one process at a time.
Where there are other processes now, each takes whole parts, or of a part images that face each other:
what is mixed with what stays the same.

Letters: B images of a micro-batch on one rank, s side of a crop, C channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field

import numpy as np
import torch
from torch import Tensor

from xdino.data import BadImage, Loader, Source, epoch_order, steps_per_epoch
from xdino.data.decode import UnreadableImage
from xdino.errors import UsageError
from xdino.runtime.batch_layout import BatchLayout
from xdino_transfer.classification.repeated_sampler import dealt, images_per_epoch, repeated_order
from xdino_transfer.classification.views import SMALL, Draws, TrainingView, check_room


@dataclass(frozen=True)
class LabelledBatch:
    """One micro-batch of one rank.

    crops: uint8 [B, s, s, C]; labels: int64 [B], of what the crops show; drawn: what happened, and
    is still to happen, to them. indices: int64 [B] of what was asked for. part: the number, among
    the step's, of the part that they begin in; part_size: how many in a row are of one part.
    """

    crops: Tensor
    labels: Tensor
    drawn: Draws
    indices: np.ndarray
    iteration: int
    epoch: int
    part: int
    part_size: int


@dataclass(eq=False)
class LabelledLoader(Loader[LabelledBatch]):
    """As `data.CropLoader`; repeats: how often an image comes in a row in an epoch, 1 for once.

    first: how the run's first start shared a step out, of as many images; None for as here.
    """

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
    first: BatchLayout | None = None
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
        here = BatchLayout(self.batch_size, self.accumulate, self.world_size)
        self.first = self.first or here
        if self.first.total != here.total:
            raise ValueError(f"a step of {self.first.total} images is {here.total} here")
        self._labels = torch.from_numpy(np.asarray(self.source.labels, np.int64))
        self._begin(known_bad)

    def _steps(self) -> int:
        n = len(self.source)
        if self.repeats > 1:
            repeated_order(n, self.seed, 0, 0, 1, self.repeats)  # refuses what is too small
            assert self.first is not None
            n = images_per_epoch(n, self.first.processes) * self.first.processes
        return steps_per_epoch(n, self.global_batch)

    def images_at(self, iteration: int, micro: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The epoch of iteration `iteration`, counted from 0; a micro-batch's images [B], and which
        repeat of its image each of them is [B]."""
        assert self.first is not None
        first, n = self.first, len(self.source)
        epoch, step = divmod(iteration, self.steps_per_epoch)
        begins = micro * self.batch_size * self.world_size
        places = np.concatenate([np.arange(a, b) for a, b in self.mine]) + begins  # in the step [B]
        if self.repeats == 1:
            indices = epoch_order(n, self.seed, epoch)[step * self.global_batch + places]
            return epoch, indices, np.zeros_like(indices)
        # Which of the first start's processes would have it, and where in that one's epoch.
        rank, i = places % first.micro // first.batch_size, places % first.batch_size
        i += (step * first.accumulate + places // first.micro) * first.batch_size
        order = epoch_order(n, self.seed, epoch)
        return epoch, *dealt(order, rank, i, first.processes, self.repeats)

    @property
    def mine(self) -> tuple[tuple[int, int], ...]:
        """From and up to which images of every micro-batch over all processes are this one's."""
        assert self.first is not None
        size, part = self.batch_size, self.first.batch_size
        begins = self.rank * size
        if part % size or size == part or size % 2 or self.global_batch // self.accumulate % part:
            return ((begins, begins + size),)
        # Several processes share a part: each has images from its front and those that face them.
        whole, nth, half = begins // part * part, begins % part // size, size // 2
        front, back = whole + nth * half, whole + part - nth * half
        return ((front, front + half), (back - half, back))

    @property
    def part_size(self) -> int:
        """How many images in a row are of one part."""
        assert self.first is not None
        return (
            self.first.batch_size
            if self.batch_size % self.first.batch_size == 0
            else self.batch_size
        )

    def take(self, index: int) -> np.ndarray:
        image: np.ndarray = super().take(index)
        if self.view.size <= SMALL:
            try:
                check_room(image, self.view.size)
            except UsageError as error:  # as good as unreadable: another one stands in
                raise UnreadableImage(str(error)) from None
        return image

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

        assert self.first is not None
        size = self.first.batch_size if len(self.mine) > 1 else self.part_size
        part = (micro * self.world_size * self.batch_size + self.mine[0][0]) // size
        batch = LabelledBatch(crops, labels, drawn, indices, iteration, epoch, part, self.part_size)
        return batch, self._tasks(fill)
