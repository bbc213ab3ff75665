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

from xdino.data.listing import ByteStrings
from xdino.data.tars.scanning import Piece, TarIndex, is_pack, scan
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import written_beside

_VERSION = 3  # of the kept index; 3: with the images of tars inside


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
        index = _kept(path, status)
        if index is None:
            with open(path, "rb", buffering=0) as file:
                descriptor = file.fileno()
                whole = Piece(
                    str(path),
                    lambda size, offset: os.pread(descriptor, size, offset),
                    status.st_size,
                )
                index = scan(path, whole)
            _keep(index, path, status)
    return index


def _index_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.index.npz")


def _keep(index: TarIndex, path: Path, status: os.stat_result) -> None:
    told = {
        "version": _VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
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
        written_beside(_index_path(path)) as beside,
        open(beside, "wb") as file,
    ):
        np.savez(file, allow_pickle=False, **arrays)


def _kept(path: Path, status: os.stat_result) -> TarIndex | None:
    """The index beside `path`, or None where it is absent, damaged or of another file."""
    try:
        with np.load(_index_path(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(arrays["told"].tobytes())
        now = (_VERSION, status.st_size, status.st_mtime_ns)
        if (told["version"], told["size"], told["mtime_ns"]) != now:
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
        return index if _sound(index, status.st_size) else None
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
    for strings in (index.names, index.classes):
        if strings.ends[0] != 0 or strings.ends[-1] != len(strings.blob):
            return False
        if (np.diff(strings.ends) < 0).any():
            return False
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.sizes <= size - index.offsets)
    return bool(inside.all()) and is_pack(index.pack) and isinstance(index.others, dict)
