"""What was found in folders, kept: to list 1.28 million files again takes minutes on a shared disk.

The index of the folder `photos` is `.photos.KEY.index` beside it, of a list the same (`kept` says where
else). It counts as long as no folder has changed that was looked into, a list neither, and as a sample
of the files has the sizes and times that it tells. What is written into a file without any of these
changing is found when the file is read. Few files are listed anew each time.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xdino.data.classes import are_labels
from xdino.data.files.source import FileSource
from xdino.data.listing import ByteStrings, size_and_time, status_of, what_is_listed
from xdino.data.source import Source
from xdino.runtime.kept import Kept, kept

LEAST = 10_000  # images; fewer are listed in no time
_SAMPLED = 256  # files whose sizes and times are looked at
_SETTLED = 2 * 10**9  # ns: what changed later than this before the listing may change unseen
_A_FOLDER = 4  # images at least: with fewer, looking at folders is as slow as at files


def indexed(path: Path, key: str, data: str, channels: int, make: Callable[[], Source]) -> Source:
    """The source that `make` finds in the folder or list `path`, from its index where that holds.

    key: what else the source follows from. data: what a person called it.
    """
    found: list[Source] = []
    whole = Path(os.path.abspath(path))
    place = whole.with_name(f".{whole.name or 'root'}.{key}.index")

    def fresh(index: Kept) -> bool:
        source = _from_index(index, path, data, channels)
        found.extend([source] if source is not None else [])
        return source is not None

    def made() -> Kept | None:
        now = time.time_ns()
        this = size_and_time(status_of(path))
        with what_is_listed() as folders:
            source = make()
        found.append(source)
        if not isinstance(source, FileSource) or len(source) < LEAST:
            return None
        settled = max([this[1], *folders.values()]) < now - _SETTLED
        if not settled or len(folders) * _A_FOLDER > len(source):
            return None
        return _index_of(source, path, data, folders, this if path.is_file() else None)

    kept(place, fresh, made)
    return found[-1]


def _index_of(
    source: FileSource,
    path: Path,
    data: str,
    folders: dict[bytes, int],
    this: tuple[int, int] | None,
) -> Kept:
    base = os.fsencode(path if this is None else path.parent)
    names = ByteStrings.of(
        f[len(base) :].lstrip(b"/") if f.startswith(base) else f for f in folders
    )
    told = {
        "data": data,
        "below": os.fsdecode(source.root[len(base) :].lstrip(b"/")),
        "this": this,
        "classes": source.classes,
        "left_out": source.left_out,
        "remarks": source.remarks,
        "described": source.names_and_sizes().hex(),
    }
    times = np.array(list(folders.values()), np.int64)
    ours = {"folders": np.frombuffer(names.blob, np.uint8), "folder_ends": names.ends}
    return Kept(told, {**source.tables(), **ours, "folder_times": times})


def _from_index(index: Kept, path: Path, data: str, channels: int) -> FileSource | None:
    """The source; None where the index is of another state of the files."""
    told, tables = index.told, index.arrays
    if told["remarks"] and told["data"] != data:  # they name it as it was called then
        return None
    if told["this"] is not None and tuple(told["this"]) != size_and_time(status_of(path)):
        return None
    base = path if told["this"] is None else path.parent
    folders = ByteStrings(tables["folders"].data, tables["folder_ends"])
    paths = ByteStrings(tables["paths"].data, tables["path_ends"])
    times, facts, labels = tables["folder_times"], tables["facts"], tables.get("labels")
    if not (folders.are_whole() and paths.are_whole() and len(folders) == len(times)):
        return None
    classes = tuple(told["classes"]) if labels is not None else None
    if facts.shape != (len(paths), 2) or not are_labels(labels, classes, len(paths) or -1):
        return None
    for folder, changed in zip(folders, times.tolist(), strict=True):
        if size_and_time(status_of(os.path.join(os.fsencode(base), folder)))[1] != changed:
            return None
    source = FileSource(data, base / told["below"], paths, channels, labels, classes, facts)
    source.left_out, source.remarks = dict(told["left_out"]), list(told["remarks"])
    source.described = bytes.fromhex(told["described"])
    source.facts_are_old, source.listed = True, told["this"] is not None
    sample = np.linspace(0, len(paths) - 1, _SAMPLED).astype(np.int64)
    return None if source.changed(sample.tolist()) else source
