"""Text lists that name image files one by one."""

import os
import stat
from pathlib import Path

import numpy as np

from xdino.data.decode import HEAD, SUFFIXES, recognised
from xdino.data.files.index import indexed
from xdino.data.files.source import FileSource
from xdino.data.listing import first, looked_into, printable, shortened, size_and_time, status_of
from xdino.data.tars import COMPRESSED
from xdino.errors import UsageError

# What is given instead of a list of paths: how the file starts, and what it is.
_NO_LIST = [
    *((magic, f"compressed by {by}; {undo} it") for magic, (by, undo) in COMPRESSED.items()),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PK\x05\x06", "a zip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"PAR1", "a Parquet file, but not called so: its name must end in .parquet"),
    (b"\x89HDF", "an HDF5 file; write its images into a folder"),
    (b"%PDF", "a PDF document; write its images into a folder"),
]
_LONGEST_LIST = 1 << 31  # bytes


def open_list(data: str, path: Path, channels: int) -> FileSource:
    """The files that a text file names, one path a line, relative to where it lies."""
    source = indexed(path, "list", data, channels, lambda: _read_list(data, path, channels))
    assert isinstance(source, FileSource)
    return source


def _read_list(data: str, path: Path, channels: int) -> FileSource:
    text = _list_text(data, path)
    lines = [line.strip() for line in text.splitlines()]
    paths = [line for line in lines if line and not line.startswith(b"#")]
    if not paths:
        raise UsageError(f"{data} names no image; expected one path a line")
    base = os.fsencode(path.parent)
    for folder in {os.path.dirname(os.path.join(base, name)) for name in paths}:
        looked_into(folder)
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
