"""What a large JSON file of annotations tells, kept: to read COCO's again takes half a minute and 4 GB.

The index of `instances_train2017.json` is `.instances_train2017.json.index` beside it (`kept` says where
else). It counts as long as the file has the size and time of change that it tells, and as the same of
its pictures are there. Small files are read anew each time.

Letters: N pictures that are there, M objects, K classes, T pictures that the file tells of.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data.listing import ByteStrings, printable, size_and_time, status_of
from xdino.runtime.kept import Kept, kept
from xdino_transfer.detection.layouts.annotations import (
    NAMED,
    Annotations,
    LeftOut,
    Places,
    present,
)
from xdino_transfer.detection.layouts.outline_columns import Outlines

LEAST = 1 << 22  # bytes of a file; smaller ones are read in no time
_VERSION = 1
_SETTLED = 2 * 10**9  # ns: what changed later than this before it was read may change unseen
#: Columns as `kept` takes them: floats by their bits.
_KEPT = {
    "category_ids": np.int64, "numbers": np.int64, "sizes": np.int64, "starts": np.int64,
    "boxes": np.float32, "labels": np.int64, "areas": np.float64, "crowd": np.bool_,
}  # fmt: skip
_BITS = {"float32": np.int32, "float64": np.int64, "bool": np.uint8}


def indexed(
    path: Path,
    images: Path,
    missing_share: float,
    make: Callable[[], tuple[Annotations, Sequence[str]]],
) -> Annotations:
    """What `make` reads of the file `path`, from its index where that holds.

    make: gives the names of all T pictures below the folder `images`, too.

    Raises:
        UsageError: too many pictures are not there; as `make`.
    """
    found: list[Annotations] = []
    facts = size_and_time(status_of(path))

    def fresh(index: Kept) -> bool:
        known = _from_index(index, path, images, facts)
        found.extend([known] if known is not None else [])
        return known is not None

    def made() -> Kept | None:
        now = time.time_ns()
        known, names = make()
        found.append(known)
        if facts[0] < LEAST or facts[1] > now - _SETTLED:
            return None
        return _index_of(known, names, facts)

    if not kept(path.with_name(f".{path.name}.index"), fresh, made):
        return found[-1]
    known = found[-1]
    told = known.left_out.notices(known.where, len(known.labels), missing_share)
    return replace(known, notices=told)


def _index_of(known: Annotations, names: Sequence[str], facts: tuple[int, int]) -> Kept | None:
    try:
        strings = ByteStrings.of(map(os.fsencode, names))
    except UnicodeEncodeError:  # halves of characters, which name no file
        return None
    told = {
        "version": _VERSION,
        "file": facts,
        "classes": known.classes,
        "left_out": asdict(known.left_out),
    }
    outlines = known.outlines
    arrays = {name: _bits(getattr(known, name)) for name in _KEPT}
    arrays |= {
        "names": np.frombuffer(strings.blob, np.uint8),
        "name_ends": strings.ends,
        "outline_first": outlines.first,
        "outline_starts": outlines.starts,
        "outline_coordinates": _bits(outlines.coordinates),
        "outline_objects": outlines.objects,
        "outline_runs": np.frombuffer(outlines.runs.blob, np.uint8),
        "outline_run_ends": outlines.runs.ends,
    }
    return Kept(told, arrays)


def _bits(column: np.ndarray) -> np.ndarray:
    return column.view(_BITS.get(column.dtype.name, column.dtype))


def _from_index(
    index: Kept, path: Path, images: Path, facts: tuple[int, int]
) -> Annotations | None:
    """The annotations, without notices; None where the index is of another file or state of it."""
    told, arrays = index.told, index.arrays
    if told["version"] != _VERSION or tuple(told["file"]) != facts:
        return None
    columns: dict[str, Any] = {name: arrays[name].view(kind) for name, kind in _KEPT.items()}
    names = ByteStrings(arrays["names"].data, arrays["name_ends"])
    coordinates = arrays["outline_coordinates"]
    outlines = Outlines(
        arrays["outline_first"],
        arrays["outline_starts"],
        coordinates if coordinates.dtype == np.int32 else coordinates.view(np.float64),
        arrays["outline_objects"],
        ByteStrings(arrays["outline_runs"].data, arrays["outline_run_ends"]),
    )
    classes, left_out = tuple(map(str, told["classes"])), LeftOut(**told["left_out"])
    counts = (left_out.pictures, left_out.dropped, left_out.points, left_out.boxed)
    if left_out.pictures != len(names) or any(type(count) is not int for count in counts):
        return None
    if not (names.are_whole() and outlines.are_whole(len(columns["labels"]))):
        return None
    there = np.ones(len(names), bool)
    there[np.array(left_out.missing, np.int64)] = False
    if not _sound(columns, len(classes), int(there.sum())):
        return None
    base = str(images)
    if not np.array_equal(present([os.path.join(base, os.fsdecode(n)) for n in names]), there):
        return None
    missing = Places(images, names, np.flatnonzero(~there)[:NAMED])
    left_out = replace(left_out, named=[printable(bytes(place)) for place in missing])
    paths = Places(images, names, np.flatnonzero(there))
    return Annotations(
        where=str(path),
        classes=classes,
        paths=paths,
        outlines=outlines,
        left_out=left_out,
        **columns,
    )


def _sound(columns: dict[str, np.ndarray], classes: int, pictures: int) -> bool:
    """Whether the columns of a kept index fit together."""
    N, M = pictures, len(columns["labels"])
    shapes = {
        "category_ids": (classes,), "numbers": (N,), "sizes": (N, 2), "starts": (N + 1,),
        "boxes": (M, 4), "labels": (M,), "areas": (M,), "crowd": (M,),
    }  # fmt: skip
    if any(columns[name].shape != shape for name, shape in shapes.items()):
        return False
    starts, labels = columns["starts"], columns["labels"]
    return bool(
        (starts[0], starts[-1]) == (0, M)
        and (np.diff(starts) >= 0).all()
        and ((labels >= 0) & (labels < classes)).all()
        and (columns["sizes"] > 0).all()
        and np.isfinite(columns["boxes"]).all()
    )
