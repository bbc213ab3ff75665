"""The index of a tar, read from its headers once and kept beside it.

Kept as `.NAME.index.npz` where that can be written, and made anew when the file's size or time changes.
What a kept index says is checked before it is used: all that it names lies inside of the file.
"""

import contextlib
import json
import os
import stat
import zipfile
from pathlib import Path

import numpy as np

from xdino.data.listing import ByteStrings, size_and_time
from xdino.data.tars.scanning import Piece, TarIndex, is_pack, scan
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import written_beside

_VERSION = 4  # of the kept index; 3: with the images of tars inside, 4: with arrays


def open_index(path: Path) -> TarIndex:
    """The index of a tar, kept or made now.

    Raises:
        UsageError: it cannot be read, is no tar, compressed, cut short, or unclear about what is
            an image of it.
    """
    with asked(f"{path} cannot be read"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no ordinary file; an index of offsets needs one")
        file, facts = path.with_name(f".{path.name}.index.npz"), size_and_time(status)
        index = kept_index(file, path, facts)
        if index is None:
            with open(path, "rb", buffering=0) as tar:
                descriptor = tar.fileno()
                whole = Piece(
                    str(path),
                    lambda size, offset: os.pread(descriptor, size, offset),
                    status.st_size,
                )
                index = scan(path, whole)
            keep_index(index, file, facts)
    return index


def keep_index(index: TarIndex, file: Path, facts: tuple[int, int]) -> None:
    """Write it to `file`; facts: the tar's size in bytes, and a number that changes with it."""
    told = {
        "version": _VERSION,
        "size": facts[0],
        "mtime_ns": facts[1],
        "pack": index.pack,
        "others": index.others,
    }
    arrays = {
        "told": np.frombuffer(json.dumps(told).encode(), np.uint8),
        "names": np.frombuffer(index.names.blob, np.uint8),
        "name_ends": index.names.ends,
        "classes": np.frombuffer(index.classes.blob, np.uint8),
        "class_ends": index.classes.ends,
        "offsets": index.offsets,
        "sizes": index.sizes,
    }
    # A folder that cannot be written costs the time of another scan, nothing else.
    with (
        contextlib.suppress(RunFailed),
        written_beside(file) as beside,
        open(beside, "wb") as target,
    ):
        np.savez(target, allow_pickle=False, **arrays)


def kept_index(file: Path, path: Path | str, facts: tuple[int, int]) -> TarIndex | None:
    """The index of the tar at `path`; None where `file` is absent, damaged or of another tar."""
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        told = json.loads(arrays["told"].tobytes())
        if (told["version"], told["size"], told["mtime_ns"]) != (_VERSION, *facts):
            return None
        index = TarIndex(
            path,
            ByteStrings(arrays["names"].tobytes(), arrays["name_ends"]),
            arrays["offsets"],
            arrays["sizes"],
            ByteStrings(arrays["classes"].tobytes(), arrays["class_ends"]),
            told["pack"],
            told["others"],
        )
        return index if _sound(index, facts[0]) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _sound(index: TarIndex, size: int) -> bool:
    """Whether all that a kept index names lies inside the file and its own strings."""
    n = len(index.offsets)
    numbers = (index.offsets, index.sizes, index.names.ends, index.classes.ends)
    if any(array.dtype != np.int64 or array.ndim != 1 for array in numbers):
        return False
    if not (len(index.sizes) == len(index.names) == len(index.classes) == n):
        return False
    if not (index.names.are_whole() and index.classes.are_whole()):
        return False
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.sizes <= size - index.offsets)
    return bool(inside.all()) and is_pack(index.pack) and isinstance(index.others, dict)
