"""A source of images -> an endless, resumable row of micro-batches of uint8 crops.

Which images and crops make up iteration i follows from (seed, i) alone: the order of an epoch is
one Philox permutation, an image's crops are a pure function of (seed, epoch, index). So the loader
has no state to save, any number of workers gives the same pixels, and a run that resumes at i goes
on exactly where it stopped. `Loader` is what all kinds of batches share, `CropLoader` those of
pretraining.

Workers are threads: decoding and resizing let go of the interpreter lock, and threads write
straight into the batch, where processes would copy every crop twice more.

Letters: N images of the source, B images of a micro-batch on one rank, V views.
"""

import abc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from xdino.augment.cutting import cutter
from xdino.augment.multi_crop import MultiCrop, boxes, draw_batch, serial_threads
from xdino.data.decode import UnreadableImage
from xdino.data.source import Source
from xdino.errors import RunFailed, UsageError, reason
from xdino.runtime import rng


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` images in an epoch: int64 [n], a permutation, read-only.

    Sorts raw numbers: unlike numpy's own shuffling, these are the same in every version.
    """
    order = np.argsort(rng.raw(rng.Stream.ORDER, seed, epoch, n), kind="stable")
    order.flags.writeable = False
    return order


def steps_per_epoch(n: int, global_batch: int, images: int | None = None) -> int:
    """Whole batches of `global_batch` images in `n`; the rest of an epoch is dropped.

    `images`: of an epoch that is no pass over all `n` (`train.images_per_epoch`).

    Raises UsageError where there is not even one.
    """
    if n < global_batch:
        raise UsageError(
            f"a batch takes {global_batch:,} images (processes x batch size x accumulation), but "
            f"the data holds {n:,}; lower the batch size to at most {n:,} in total"
        )
    if images is None:
        return n // global_batch
    if images < global_batch:
        raise UsageError(
            f"train.images_per_epoch is {images:,}, less than the {global_batch:,} images of a step "
            "(processes x batch size x accumulation): raise it"
        )
    return images // global_batch


@contextmanager
def _one_thread() -> Iterator[None]:
    """No fan-out of torch's operations in this thread: single crops are too small for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, order=True)
class BadImage:
    """An image that cannot be read: its index in the source, how a person finds it, why."""

    index: int
    where: str
    why: str


@dataclass(frozen=True)
class CropBatch:
    """One micro-batch of one rank.

    crops: one uint8 [views, B, size, size, C] per group of equal sizes; table: the drawn
    parameters [V, B]; indices: int64 [B] into the source (of what was asked for, also where
    another image stands in for one that cannot be read).
    """

    crops: list[Tensor]
    table: np.ndarray
    indices: np.ndarray
    iteration: int
    epoch: int


Batch = TypeVar("Batch")


class Loader(abc.ABC, Generic[Batch]):
    """Micro-batches for one rank, made ahead by threads; a subclass says what is in one.

    Its fields are those of `CropLoader` but for the crops. `_begin` comes before anything else.
    """

    source: Source
    batch_size: int
    seed: int
    accumulate: int
    rank: int
    world_size: int
    workers: int
    prefetch: int
    max_bad_share: float
    bad: dict[int, tuple[str, str]]
    wait_seconds: float
    threads = "xdino-crops"  # how the workers' names begin

    def _begin(self, known_bad: Iterable[BadImage]) -> None:
        """Check the fields; raises UsageError, ValueError."""
        least = {"batch_size": 1, "accumulate": 1, "world_size": 1, "workers": 0, "prefetch": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {self.rank}")
        if not 0 <= self.max_bad_share <= 1:
            raise UsageError(f"data.max_bad_share must be from 0 to 1, got {self.max_bad_share}")
        self.steps_per_epoch = self._steps()
        self._news: queue.SimpleQueue[BadImage] = queue.SimpleQueue()
        self._lock = threading.Lock()
        for known in known_bad:
            self._try_again(known)
        self._check_share()

    def _steps(self) -> int:
        """Of a pass over the images. Raises UsageError where there is not even one."""
        return steps_per_epoch(len(self.source), self.global_batch)

    @property
    def global_batch(self) -> int:
        """Images of one iteration, over all ranks and micro-batches."""
        return self.world_size * self.batch_size * self.accumulate

    def indices_at(self, iteration: int, micro: int) -> tuple[int, np.ndarray]:
        """The epoch of iteration `iteration`, counted from 0, and a micro-batch's images [B]."""
        epoch, step = divmod(iteration, self.steps_per_epoch)
        order = epoch_order(len(self.source), self.seed, epoch)
        # Micro-batches of all ranks lie one after the other, so that the images of an iteration
        # are the same however they are shared out.
        start = step * self.global_batch
        start += (micro * self.world_size + self.rank) * self.batch_size
        return epoch, order[start : start + self.batch_size].copy()  # writable, as torch wants it

    def images_at(self, iteration: int, micro: int) -> tuple[int, np.ndarray, np.ndarray]:
        """As `indices_at`, and which repeat of its image in the epoch each of them is [B]."""
        epoch, indices = self.indices_at(iteration, micro)
        return epoch, indices, np.zeros_like(indices)

    def iterate(self, start_iteration: int, end_iteration: int) -> Generator[Batch, None, None]:
        """The micro-batches of iterations start to end (exclusive), `accumulate` for each.

        Closing the generator early waits only for the images in hand. Raises RunFailed when too
        many images cannot be read.
        """
        plan = (
            (iteration, micro)
            for iteration in range(start_iteration, end_iteration)
            for micro in range(self.accumulate)
        )
        if self.workers == 0:
            for iteration, micro in plan:
                began = time.perf_counter()
                batch, tasks = self._prepare(iteration, micro)
                with _one_thread():
                    for task in tasks:
                        task()
                self.wait_seconds += time.perf_counter() - began
                yield batch
            return
        pool = serial_threads(self.workers, self.threads)
        ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
        try:
            while True:
                began = time.perf_counter()
                self._submit(pool, plan, ahead)
                if not ahead:
                    return
                batch, futures = ahead.popleft()
                for future in futures:
                    future.result()
                self._submit(pool, plan, ahead)
                self.wait_seconds += time.perf_counter() - began
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        plan: Iterator[tuple[int, int]],
        ahead: deque[tuple[Batch, list[Future[None]]]],
    ) -> None:
        """Start work until `prefetch` micro-batches are under way."""
        while len(ahead) < self.prefetch and (step := next(plan, None)) is not None:
            batch, tasks = self._prepare(*step)
            ahead.append((batch, [pool.submit(task) for task in tasks]))

    @abc.abstractmethod
    def _prepare(self, iteration: int, micro: int) -> tuple[Batch, list[Callable[[], None]]]:
        """An empty micro-batch, and the tasks that fill it."""

    def _tasks(self, fill: Callable[[int, int], None]) -> list[Callable[[], None]]:
        """A task for every few images of a micro-batch: `fill(first, last)`."""

        def task(first: int) -> Callable[[], None]:
            last = min(first + self.source.batch_reads, self.batch_size)
            return lambda: fill(first, last)

        return [task(i) for i in range(0, self.batch_size, self.source.batch_reads)]

    # Images that cannot be read

    def take_bad_report(self) -> list[BadImage]:
        """The images found unreadable since the last call, for a notice."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def take(self, index: int) -> Any:
        """What is read of an image: uint8 [H, W, C], and more in subclasses.

        Raises UnreadableImage or OSError for an image that cannot be used.
        """
        return self.source.read(index)

    def _read(self, index: int) -> tuple[int, Any]:
        """Image `index`, or the next one after it that can be used: which, and what `take` gives."""
        n = len(self.source)
        for candidate in range(index, index + n):
            if candidate % n in self.bad:
                continue
            try:
                return candidate % n, self.take(candidate % n)
            except (UnreadableImage, OSError) as error:
                self._record(candidate % n, error)
            except Exception as error:
                error.add_note(f"while reading {self.source.describe(candidate % n)}")
                raise
        raise RunFailed(f"none of the {n:,} images of {self.source.name} can be read")

    def _try_again(self, known: BadImage) -> None:
        """Keep an image of an earlier process on the list if it is the same one and as bad."""
        index = known.index
        if not 0 <= index < len(self.source) or self.source.describe(index) != known.where:
            return
        try:
            self.take(index)
        except (UnreadableImage, OSError) as error:
            self.bad[index] = (known.where, reason(error))

    def _record(self, index: int, error: Exception) -> None:
        with self._lock:
            if index in self.bad:  # another worker was quicker
                return
            found = (self.source.describe(index), reason(error))
            self.bad[index] = found
            self._news.put(BadImage(index, *found))
        self._check_share()

    def _check_share(self) -> None:
        with self._lock:
            bad, n = list(self.bad.values()), len(self.source)
        if len(bad) > self.max_bad_share * n:
            files = "; ".join(f"{where} ({why})" for where, why in bad[:3])
            raise RunFailed(
                f"{len(bad):,} of {n:,} images of {self.source.name} cannot be read "
                f"({len(bad) / n:.2%}; data.max_bad_share allows {self.max_bad_share:.2%}): {files}"
                f"{' and more' if len(bad) > 3 else ''}; replace or remove them, or raise "
                "data.max_bad_share"
            )


@dataclass(eq=False)
class CropLoader(Loader[CropBatch]):
    """Micro-batches of crops for one rank.

    batch_size: images of a micro-batch on this rank; an iteration is `accumulate` micro-batches on
    each of `world_size` ranks. workers: threads, 0 to work in the calling one. prefetch: whole
    micro-batches that are worked on ahead of the consumer. early_crops: what iterations before
    `early_iterations` get instead of `crops`; which it is follows from the iteration, also for
    batches made ahead and after a restart. max_bad_share: of the source's images,
    how many may turn out unreadable, on this rank, before the run is stopped; until then the next
    readable image stands in.

    known_bad: images that an earlier process found unreadable; they are tried once more here, and
    those that still cannot be read count from the start.

    `bad` maps the index of each unreadable image found so far to (where it is, why);
    `wait_seconds` is how long the consumer has waited for batches in total. Raises UsageError for
    a source smaller than one batch, or with a number of channels other than the crops'.
    """

    source: Source
    crops: MultiCrop
    batch_size: int
    seed: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    workers: int = 2
    prefetch: int = 3
    pin_memory: bool = False
    max_bad_share: float = 0.05
    early_crops: MultiCrop | None = None
    early_iterations: int = 0
    known_bad: InitVar[Iterable[BadImage]] = ()

    bad: dict[int, tuple[str, str]] = field(init=False, default_factory=dict)
    wait_seconds: float = field(init=False, default=0.0)

    def __post_init__(self, known_bad: Iterable[BadImage]) -> None:
        if self.source.channels != self.crops.channels:
            raise UsageError(
                f"{self.source.name} has {self.source.channels} channels, but mean and std have "
                f"{self.crops.channels}"
            )
        self._begin(known_bad)

    def crops_at(self, iteration: int) -> MultiCrop:
        """The crops of iteration `iteration`, counted from 0."""
        if self.early_crops is not None and iteration < self.early_iterations:
            return self.early_crops
        return self.crops

    def _prepare(self, iteration: int, micro: int) -> tuple[CropBatch, list[Callable[[], None]]]:
        """An empty micro-batch, and the tasks that fill it."""
        epoch, indices = self.indices_at(iteration, micro)
        crops = self.crops_at(iteration)
        table = draw_batch(crops, self.seed, epoch, indices)
        tensors = [
            torch.empty(
                (count, self.batch_size, size, size, self.source.channels),
                dtype=torch.uint8,
                pin_memory=self.pin_memory,
            )
            for size, count in crops.groups
        ]
        slots = [view for tensor in tensors for view in tensor.numpy()]  # V of [B, size, size, C]

        def fill(first: int, last: int) -> None:
            self._fill(indices[first:last], table[:, first:last], slots, first)

        return CropBatch(tensors, table, indices, iteration, epoch), self._tasks(fill)

    def _fill(
        self, indices: np.ndarray, table: np.ndarray, slots: list[np.ndarray], first: int
    ) -> None:
        """Read images `indices` [b] and write their crops from column `first` of the slots on."""
        images = [self._read(int(index))[1] for index in indices]
        heights, widths = np.array([image.shape[:2] for image in images]).T  # [b] each
        found = boxes(table, heights, widths, self.crops.ratio).tolist()  # V lists of b boxes
        for column, (index, image) in enumerate(zip(indices, images, strict=True)):
            try:
                cut = cutter(image)
                for view, slot in enumerate(slots):
                    box = found[view][column]
                    cut(box, slot.shape[1], slot[first + column])
            except Exception as error:
                error.add_note(f"while cropping {self.source.describe(int(index))}")
                raise
