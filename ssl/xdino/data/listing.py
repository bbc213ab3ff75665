"""Names of files: which of them are images, what lies below a folder, and how a person reads them.

What counts as an image, everywhere: a regular file with one of `decode.SUFFIXES`, or one without any
suffix whose first bytes are an image's. Where there is none, arrays (.npy) are images: beside pictures
they are what somebody worked out from them. The rest is counted by suffix; hidden files and what
systems leave behind (@eaDir, Thumbs.db) are not mentioned.
"""

import os
import re
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data.decode import ARRAYS, HEAD, SUFFIXES, recognised
from xdino.errors import asked

# What operating systems and storage boxes leave in folders, by lower-case name: "._x" and other
# hidden names are left out besides.
_SYSTEM = {
    b"@eadir", b"#recycle", b"#snapshot", b"$recycle.bin", b"system volume information",
    b"lost+found", b"__macosx", b"thumbs.db", b"desktop.ini", b"ehthumbs.db", b"icon\r",
}  # fmt: skip
_AT_ONCE = 1 << 16  # strings that are read from a mapped file together
_RAW_SUFFIXES = {suffix.encode() for suffix in SUFFIXES}
_ARRAYS = {suffix.encode() for suffix in ARRAYS}
_counted: ContextVar[set[bytes]] = ContextVar("counted", default=_RAW_SUFFIXES)


# Names and their letters


def is_hidden(name: bytes) -> bool:
    """Whether a file or folder is the system's, not the person's."""
    return name.startswith(b".") or name.lower() in _SYSTEM


def printable(name: bytes) -> str:
    r"""A file's name as text that every terminal and file takes: \xff for what is no UTF-8."""
    text = name.decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def shortened(text: str, most: int = 200) -> str:
    """A text that may be of any length, for a sentence."""
    return text if len(text) <= most else text[: most - 3] + "..."


def first(names: Sequence[str], count: int = 5) -> str:
    """`a, b, c and 7 more`."""
    rest = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


class ByteStrings(Sequence[bytes]):
    """Many short strings as one run of bytes: 1.28 million paths are 50 MB, not 150.

    blob: may be a part of a mapped file.
    """

    def __init__(self, blob: bytes | memoryview, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends  # int64 [N + 1], from 0

    @classmethod
    def of(cls, parts: Iterable[bytes]) -> "ByteStrings":
        blob, ends = bytearray(), array("q", [0])
        for part in parts:
            blob += part
            ends.append(len(blob))
        return cls(bytes(blob), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self), _AT_ONCE):
            ends = self.ends[first : first + _AT_ONCE + 1].tolist()
            blob = bytes(self.blob[ends[0] : ends[-1]])
            for start, end in pairwise(ends):
                yield blob[start - ends[0] : end - ends[0]]

    def __getitem__(self, index: Any) -> Any:
        return bytes(self.blob[self.ends[index] : self.ends[index + 1]])

    def are_whole(self) -> bool:
        """Whether the ends fit the bytes, of strings that were read from a file."""
        ends = self.ends
        if ends.dtype != np.int64 or ends.ndim != 1 or not len(ends):
            return False
        return bool(ends[0] == 0 and ends[-1] == len(self.blob) and (np.diff(ends) >= 0).all())


# What is left out, and how it is said


def count_suffix(counts: dict[str, int], suffix: str) -> None:
    """Count a file; where every file has a suffix of its own, as "a.001", "a.002", most in one."""
    suffix = suffix or "none"
    if suffix not in counts and len(counts) >= 100:
        suffix = "others"
    counts[suffix] = counts.get(suffix, 0) + 1


def left_out_sentence(name: str, counts: dict[str, int]) -> str:
    """What a person hears about files of `name` that were not taken for images."""
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = first([f"{suffix} ({count:,})" for suffix, count in most_first], 8)
    total = sum(counts.values())
    files = f"{total:,} files" if total > 1 else "1 file"
    return (
        f"{files} of {name} left out, for want of the suffix of an image that can be read: {parts}"
    )


def no_image(where: Path | str, left_out: Iterable[str]) -> str:
    """Why nothing is there: what else is, by suffix."""
    suffixes = first(sorted(left_out))
    known = f"; it holds files with the suffixes {suffixes}, known are {' '.join(SUFFIXES)}"
    return f"{where} holds no image" + (known if suffixes else "")


# Folders

_OF_A_RUN = (b"config.yaml", b"environment.json")
_listed: ContextVar[dict[bytes, int] | None] = ContextVar("listed", default=None)


@contextmanager
def what_is_listed() -> Iterator[dict[bytes, int]]:
    """The folders that are listed inside, and their times of change before that, in nanoseconds.

    What was found there stands as long as these times do: names that come and go change them.
    """
    folders: dict[bytes, int] = {}
    token = _listed.set(folders)
    try:
        yield folders
    finally:
        _listed.reset(token)


def looked_into(folder: bytes) -> None:
    """Note the folder for `what_is_listed`, before what is in it is looked at."""
    listed = _listed.get()
    if listed is not None and folder not in listed:
        listed[folder] = size_and_time(status_of(folder))[1]


def entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What is in a folder, but for hidden names, sorted by name.

    Raises UsageError where it cannot be listed.
    """
    looked_into(folder)
    with asked(f"{printable(folder)} cannot be listed"), os.scandir(folder) as found:
        return sorted((e for e in found if not is_hidden(e.name)), key=lambda e: e.name)


def folders_in(path: Path) -> list[str]:
    """The names of the folders directly in `path`, links to folders included; runs are none of them."""
    found = (e for e in entries(os.fsencode(path)) if _is_folder(e))
    return [os.fsdecode(e.name) for e in found if not _is_run(e.path)]


def _is_run(folder: bytes) -> bool:
    """Whether it is the folder of a run, which may lie among its images: its pictures are none."""
    return all(os.path.exists(os.path.join(folder, name)) for name in _OF_A_RUN)


def tars_in(path: Path) -> list[Path]:
    """The tar files directly in `path`, sorted."""
    found = [e for e in entries(os.fsencode(path)) if e.name.lower().endswith(b".tar")]
    return sorted(tar for e in found if (tar := Path(os.fsdecode(e.path))).is_file())


def loose_images(path: Path) -> list[bytes]:
    """The names of the images directly in `path`."""
    found = (e for e in entries(os.fsencode(path)) if not _is_folder(e))
    return [e.name for e in found if _is_image(e.path, status_of(e.path), {})]


def holds_images(path: Path) -> bool:
    return next(scan(os.fsencode(path), {}), None) is not None


@contextmanager
def of_arrays() -> Iterator[None]:
    """Inside, arrays are the images."""
    token = _counted.set(_ARRAYS)
    try:
        yield
    finally:
        _counted.reset(token)


def holds_arrays(path: Path) -> bool:
    """Whether there are arrays below a folder, and no images."""
    if holds_images(path):
        return False
    with of_arrays():
        return holds_images(path)


def scan(
    root: bytes, left_out: dict[str, int], but: Sequence[str] = ()
) -> Iterator[tuple[bytes, int, int]]:
    """(path, size, time of change) of the images below `root`, sorted folder by folder.

    Paths are relative to it. Linked folders are followed, except into a folder that is being
    listed; runs are not looked into. but: folders directly in `root` that are skipped. Other files are
    counted in `left_out`.
    """
    skipped = {os.fsencode(name) for name in but}
    stack = [(b"", frozenset([_identity(os.stat(root))]), iter(entries(root)))]
    while stack:
        below, above, found = stack[-1]
        entry = next(found, None)
        if entry is None:
            stack.pop()
            continue
        path, status = below + entry.name, status_of(entry.path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            folder = os.path.join(root, path)
            if _identity(status) not in above and path not in skipped and not _is_run(folder):
                inside = iter(entries(folder))
                stack.append((path + b"/", above | {_identity(status)}, inside))
        elif _is_image(entry.path, status, left_out):
            yield path, *size_and_time(status)


def status_of(path: str | bytes | Path) -> os.stat_result | None:
    """The status of what a path leads to; None where that is nothing, or no path."""
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte
        return None


def size_and_time(status: os.stat_result | None) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds; -1 where there is no file."""
    return (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_image(path: bytes, status: os.stat_result | None, left_out: dict[str, int]) -> bool:
    """Whether a file counts as an image. What a link without a target is called decides, too."""
    suffix = os.path.splitext(path)[1].lower()
    if status is not None and not stat.S_ISREG(status.st_mode):
        count_suffix(left_out, "no regular file")
    elif suffix in _counted.get():
        return True
    elif suffix or status is None or not _starts_as_image(path):
        count_suffix(left_out, printable(suffix))
    else:
        return True
    return False


def _starts_as_image(path: bytes) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return recognised(file.read(HEAD)) is not None
    except OSError:
        return False
