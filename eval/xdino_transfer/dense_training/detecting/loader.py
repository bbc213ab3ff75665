"""Micro-batches of annotated pictures, cut by threads; each holds pictures of one orientation.

Which pictures a step takes follows from the seed and its number, what happens to one of them from
(seed, epoch, index, repeat): see `detection.views`.

Letters: B pictures of a micro-batch on one rank, H x W pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field

import numpy as np
from torch import Tensor

from xdino.data import BadImage, Loader, steps_per_epoch
from xdino.runtime.batch_layout import BatchLayout
from xdino_transfer.dense_training.detecting.source import AnnotatedSource
from xdino_transfer.detection.objects import Objects, Shown
from xdino_transfer.detection.views import Views, oriented_order, repeats_of, together


@dataclass(frozen=True)
class DetectionBatch:
    """One micro-batch of one rank.

    cut: of each picture uint8 [C, h, w] and its objects. indices, repeats: int64 [B], of what was
    asked for, and how often that picture came before in the epoch. iteration: counted from 0.
    """

    cut: list[tuple[Tensor, Objects] | None]
    indices: np.ndarray
    repeats: np.ndarray
    iteration: int
    epoch: int

    def together(self) -> tuple[Tensor, list[Shown], list[Objects]]:
        """uint8 [B, C, H, W], how each picture lies there, and its objects."""
        return together([own for own in self.cut if own is not None])


@dataclass(eq=False)
class DetectionLoader(Loader[DetectionBatch]):
    """As `data.CropLoader`, of pictures of any size.

    first: how the run's first start shared a step out, by which its pictures lie in order; None for as
    here.
    """

    source: AnnotatedSource
    views: Views
    batch_size: int
    seed: int
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
    threads = "xdino-pictures"

    def __post_init__(self, known_bad: Iterable[BadImage]) -> None:
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.layout = self.first or BatchLayout(self.batch_size, self.accumulate, self.world_size)
        self._begin(known_bad)

    @property
    def together(self) -> int:
        """Pictures of one orientation in a row: a micro-batch of every process, as the run began."""
        return self.layout.micro

    def _steps(self) -> int:
        steps_per_epoch(len(self.source), self.global_batch)  # refuses what is too small
        portraits = int(self.source.portrait.sum())
        kinds = (portraits, len(self.source) - portraits)
        return -(-sum(-(-count // self.together) for count in kinds) // self.layout.accumulate)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's pictures and repeats, int64 [steps x global batch] each.

        Where micro-batches do not fill the last step, the first ones come once more.
        """
        if epoch not in self._orders:
            order = oriented_order(self.source.portrait, self.together, self.seed, epoch)
            order = np.resize(order, self.steps_per_epoch * self.global_batch)
            last = {key: value for key, value in self._orders.items() if key == epoch - 1}
            self._orders = {**last, epoch: (order, repeats_of(order))}
        return self._orders[epoch]

    def images_at(self, iteration: int, micro: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The epoch of iteration `iteration`, counted from 0; a micro-batch's pictures and repeats."""
        epoch, step = divmod(iteration, self.steps_per_epoch)
        order, repeats = self.order(epoch)
        # Micro-batches of all ranks lie one after the other, as in `Loader.indices_at`.
        start = step * self.global_batch
        start += (micro * self.world_size + self.rank) * self.batch_size
        mine = slice(start, start + self.batch_size)
        return epoch, order[mine], repeats[mine]

    def _prepare(
        self, iteration: int, micro: int
    ) -> tuple[DetectionBatch, list[Callable[[], None]]]:
        epoch, indices, repeats = self.images_at(iteration, micro)
        cut: list[tuple[Tensor, Objects] | None] = [None] * self.batch_size

        def fill(first: int, last: int) -> None:
            for row in range(first, last):
                index, image = self._read(int(indices[row]))
                try:
                    objects = self.source.objects(index)
                    drawn = self.views.draw(self.seed, epoch, int(indices[row]), int(repeats[row]))
                    cut[row] = self.views.cut(image, objects, drawn)
                except Exception as error:
                    error.add_note(f"while cutting {self.source.describe(index)}")
                    raise

        batch = DetectionBatch(cut, indices, repeats, iteration, epoch)
        return batch, self._tasks(fill)
