"""Image files on disk as a source, and the text lists that name them one by one."""

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np

from xdino.data.decode import HEAD, SUFFIXES, recognised
from xdino.data.listing import ByteStrings, first, printable, shortened, size_and_time, status_of
from xdino.data.source import StoredSource
from xdino.data.tars import COMPRESSED
from xdino.errors import UsageError

# What is given instead of a list of paths: how the file starts, and what it is.
_NO_LIST = [
    *((magic, f"compressed by {by}; {undo} it") for magic, (by, undo) in COMPRESSED.items()),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PK\x05\x06", "a zip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"PAR1", "a Parquet file; write its images into a folder"),
    (b"\x89HDF", "an HDF5 file; write its images into a folder"),
    (b"%PDF", "a PDF document; write its images into a folder"),
]
_LONGEST_LIST = 1 << 31  # bytes


class FileSource(StoredSource):
    """Image files: paths relative to `root`, kept as one run of bytes (1.28 million are 50 MB).

    facts: int64 [N, 2], size in bytes and time of change in nanoseconds of each, -1 where there is
    no such file; looked up when they are needed, unless given. listed: the files are named one by
    one, and not found in folders.
    """

    listed = False

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
        self._root = os.fsencode(root)
        self._paths = paths if isinstance(paths, ByteStrings) else ByteStrings.of(paths)
        if facts is not None:
            self._facts = facts

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._paths[index]))

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
        return printable(os.path.join(self._root, self._paths[index]))

    @cached_property
    def _facts(self) -> np.ndarray:
        return np.array(
            [size_and_time(status_of(self.path(i))) for i in range(len(self))], np.int64
        )

    def _content(self) -> Iterator[bytes]:
        return self._described(self._below_root, self._facts[:, 0])

    @property
    def _below_root(self) -> ByteStrings:
        """The paths without "./", "..", doubled slashes, and whether they were written in full."""
        odd = (b"/", b"./", b"../"), (b"//", b"/./", b"/../")
        if not any(path.startswith(odd[0]) for path in self._paths) and not any(
            part in self._paths.blob for part in odd[1]
        ):
            return self._paths
        return ByteStrings.of(
            posixpath.normpath(os.path.join(os.path.abspath(self._root), path))
            for path in self._paths
        )

    def stamps(self) -> bytes:
        return self._paths.blob + self._paths.ends.tobytes() + self._facts.tobytes()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


# Lists


def open_list(data: str, path: Path, channels: int) -> FileSource:
    """The files that a text file names, one path a line, relative to where it lies."""
    text = _list_text(data, path)
    lines = [line.strip() for line in text.splitlines()]
    paths = [line for line in lines if line and not line.startswith(b"#")]
    if not paths:
        raise UsageError(f"{data} names no image; expected one path a line")
    base = os.fsencode(path.parent)
    table, missing = [], []
    for name in paths:
        status = status_of(os.path.join(base, name))
        if status is not None and stat.S_ISREG(status.st_mode):
            table.append(size_and_time(status))
        else:
            missing.append(shortened(printable(name)))
    if missing:
        raise UsageError(
            f"{len(missing):,} of the {len(paths):,} files listed in {data} do not exist, cannot be "
            f"reached or are no regular files: {first(missing)} "
            f"(relative paths start at {path.parent})"
        )
    source = FileSource(data, path.parent, paths, channels, facts=np.array(table, np.int64))
    source.listed = True
    return source


def _list_text(data: str, path: Path) -> bytes:
    """A list of paths as UTF-8, or whatever bytes its names have."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        if path.suffix.lower() in SUFFIXES or recognised(head[:HEAD]):
            raise UsageError(
                f"{data} is one image; give a folder, or a text file with one path a line"
            )
        for start, what in _NO_LIST:
            if head.startswith(start):
                raise UsageError(f"{data} is no list of paths, but {what}")
        if head[257:262] == b"ustar":
            raise UsageError(f"{data} is a tar file, but not called so: its name must end in .tar")
        wide = head[:2] in (b"\xff\xfe", b"\xfe\xff")
        if (b"\0" in head and not wide) or os.fstat(file.fileno()).st_size > _LONGEST_LIST:
            raise UsageError(
                f"{data} is no list of paths: expected a folder, a tar file, or a text file with "
                "one path a line"
            )
        text = head + file.read()
    if wide:  # as Windows writes it
        try:
            text = text.decode("utf-16").encode("utf-8", "surrogateescape")
        except ValueError as error:
            raise UsageError(f"{data} is no list of paths: {error}") from error
    return text.removeprefix(b"\xef\xbb\xbf")
