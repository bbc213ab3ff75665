"""A part of a labelled source: few-shot fractions, the same of every class."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from xdino.data import Source
from xdino.errors import UsageError
from xdino.runtime.rng import Stream
from xdino_transfer.draws import uniforms


class Subset(Source):
    """The images `indices` (int64 [n], ascending) of another source, with all of its classes."""

    def __init__(self, source: Source, indices: np.ndarray, part: str) -> None:
        labels = None if source.labels is None else source.labels[indices]
        super().__init__(f"{source.name} ({part})", source.channels, labels, source.classes)
        self._source, self._indices = source, indices
        self.batch_reads, self.shrunk_to = source.batch_reads, source.shrunk_to
        self.max_pixels = source.max_pixels

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> np.ndarray:
        return self._source.read(int(self._indices[index]))

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(int(self._indices[index]))

    def member(self, index: int) -> bytes:
        return self._source.member(int(self._indices[index]))

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def notices(self) -> list[str]:
        return self._source.notices()

    def _content(self) -> Iterator[bytes]:
        yield from self._source._content()
        yield self._indices.astype("<i8").tobytes()

    def stamps(self) -> bytes:
        return self._source.stamps() + self._indices.tobytes()


def few(source: Source, fraction: float, seed: int) -> Source:
    """`fraction` of every class, at least one image each; the whole source for 1.

    A smaller fraction is a part of a larger one with the same seed, so that curves over fractions
    compare the same images.

    Raises:
        UsageError: a fraction outside of (0, 1], or a source without labels.
    """
    if not 0 < fraction <= 1:
        raise UsageError(
            f"a fraction of the images must be above 0 and at most 1, got {fraction:g}"
        )
    if fraction == 1:
        return source
    return _part(source, lambda count: math.ceil(fraction * count), f"{100 * fraction:g} %", seed)


def few_of_each(source: Source, count: int, seed: int) -> Source:
    """`count` images of every class, all of a class that has no more.

    Raises:
        UsageError: a count below 1, or a source without labels.
    """
    if count < 1:
        raise UsageError(f"the images of each class must be at least 1, got {count}")
    return _part(source, lambda there: min(count, there), f"{count:,} of each class", seed)


def _part(source: Source, size: Callable[[int], int], part: str, seed: int) -> Subset:
    """`size(images)` of each class: those with the smallest of numbers drawn for all of them."""
    if source.labels is None:
        raise UsageError(f"{source.name} has no classes to take a part of")
    order = uniforms(seed, Stream.SUBSETS, np.zeros((1, 3), np.uint64), len(source))[0]
    chosen = []
    for label in np.unique(source.labels):
        members = np.flatnonzero(source.labels == label)
        chosen.append(members[np.argsort(order[members], kind="stable")[: size(len(members))]])
    return Subset(source, np.sort(np.concatenate(chosen)), part)
