"""Where a row of tars lies: on disk, or wherever else bytes can be had at an offset."""

import os
import resource
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from xdino.data.listing import size_and_time, status_of
from xdino.data.tars.index import open_index
from xdino.data.tars.scanning import TarIndex

HELD_OPEN = 256  # with more files than this each read opens its own: descriptors are few
_PART = 4  # of the descriptors that the process may have, this part at most is held


class Store(Protocol):
    """Tars that are numbered from 0. read: from any thread, and after a fork.

    names: what a person calls each. least: images from which on an index of all is worth keeping.
    """

    names: list[str]
    least: int

    def indexes(self) -> list[TarIndex]:
        """What each holds. Raises UsageError, RunFailed."""

    def facts(self) -> np.ndarray:
        """int64 [tars, 2]: sizes in bytes, and numbers that change with the content; -1 for none."""

    def place(self, key: str) -> Path:
        """Where an index of all is kept."""

    def folder(self) -> Path | None:
        """The folder that they lie in; None where that is not on this machine."""

    def read(self, tar: int, size: int, offset: int) -> bytes:
        """`size` bytes from `offset` on; fewer where the tar ends before. Raises OSError, RunFailed."""


class LocalTars:
    """Tar files on disk. Reading is a `pread`, which has no position to share."""

    least = 10_000  # fewer are put together in no time

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.names = list(paths), [str(path) for path in paths]
        self._open: list[int] | None = None

    def indexes(self) -> list[TarIndex]:
        return [open_index(path) for path in self.paths]

    def facts(self) -> np.ndarray:
        return np.array([size_and_time(status_of(path)) for path in self.paths], np.int64)

    def place(self, key: str) -> Path:
        first = Path(os.path.abspath(self.paths[0]))
        return first.with_name(f".{first.name if len(self.paths) == 1 else 'tars'}.{key}.index")

    def folder(self) -> Path | None:
        return self.paths[0].parent

    def hold_open(self, most: int) -> None:
        """Open the files for good, where they are few."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        allowed = most if allowed == resource.RLIM_INFINITY else allowed // _PART
        if len(self.paths) > min(most, allowed):
            return
        self._open = []
        weakref.finalize(self, _close, self._open)
        for path in self.paths:
            self._open.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def read(self, tar: int, size: int, offset: int) -> bytes:
        if self._open is not None:
            return os.pread(self._open[tar], size, offset)
        with open(self.paths[tar], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
