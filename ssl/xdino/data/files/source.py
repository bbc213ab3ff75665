"""Image files on disk as a source."""

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np

from xdino.data.listing import ByteStrings, printable, size_and_time, status_of
from xdino.data.source import StoredSource, names_and_sizes


class FileSource(StoredSource):
    """Image files: paths relative to `root`, kept as one run of bytes (1.28 million are 50 MB).

    facts: int64 [N, 2], size in bytes and time of change in nanoseconds of each, -1 where there is
    no such file; looked up when they are needed, unless given. listed: the files are named one by
    one, and not found in folders. facts_are_old: they come from an index that was kept.
    """

    lies_apart = True
    listed = False
    facts_are_old = False

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[bytes],
        channels: int = 3,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        facts: np.ndarray | None = None,
    ) -> None:
        super().__init__(name, channels, labels, classes)
        self.root = os.fsencode(root)
        self._paths = paths if isinstance(paths, ByteStrings) else ByteStrings.of(paths)
        if facts is not None:
            self._facts = facts

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self._paths[index]))

    def encoded(self, index: int) -> bytes:
        with self._opened(index) as file:
            self._check_size(os.fstat(file.fileno()).st_size)
            return file.read()

    def sizes(self) -> np.ndarray:
        return self._facts[:, 0]

    def _ends(self, index: int, most: int) -> bytes:
        with self._opened(index) as file:
            beginning = os.pread(file.fileno(), most, 0)
            last = max(0, os.fstat(file.fileno()).st_size - most)
            return beginning + os.pread(file.fileno(), most, last)

    @contextmanager
    def _opened(self, index: int) -> Iterator[FileIO]:
        """Pipes and devices are not opened: they may wait, or act."""
        path = self.path(index)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            yield file

    def member(self, index: int) -> bytes:
        return self._paths[index]

    def describe(self, index: int) -> str:
        return printable(os.path.join(self.root, self._paths[index]))

    @cached_property
    def _facts(self) -> np.ndarray:
        return self._facts_now(range(len(self)))

    def _facts_now(self, indices: Iterable[int]) -> np.ndarray:
        found = [size_and_time(status_of(self.path(i))) for i in indices]
        return np.array(found, np.int64).reshape(-1, 2)

    def changed(self, indices: Iterable[int]) -> bool:
        """Whether the facts that are known of these images are no longer true."""
        indices = list(indices)
        return not np.array_equal(self._facts[indices], self._facts_now(indices))

    def tables(self) -> dict[str, np.ndarray]:
        """What `index` keeps: paths and facts, and labels where there are any."""
        found = {
            "paths": np.frombuffer(self._paths.blob, np.uint8),
            "path_ends": self._paths.ends,
            "facts": self._facts,
        }
        return found if self.labels is None else {**found, "labels": self.labels}

    def names_and_sizes(self) -> bytes:
        """As in `source`; worked out once."""
        self.described = self.described or names_and_sizes(self._below_root, self._facts[:, 0])
        return self.described

    def _content(self) -> Iterator[bytes]:
        return self._described(self.names_and_sizes())

    @property
    def _below_root(self) -> ByteStrings:
        """The paths without "./", "..", doubled slashes, and whether they were written in full."""
        odd = (b"/", b"./", b"../"), (b"//", b"/./", b"/../")
        blob = bytes(self._paths.blob)
        if not any(path.startswith(odd[0]) for path in self._paths) and not any(
            part in blob for part in odd[1]
        ):
            return self._paths
        return ByteStrings.of(
            posixpath.normpath(os.path.join(os.path.abspath(self.root), path))
            for path in self._paths
        )

    def stamps(self) -> bytes:
        facts = self._facts_now(range(len(self))) if self.facts_are_old else self._facts
        return bytes(self._paths.blob) + self._paths.ends.tobytes() + facts.tobytes()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
