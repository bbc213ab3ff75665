"""What was found in all tars of a data set, kept as one: 500 shards are open again in no time.

It lies beside the tars and counts as long as each has the size and time of change that it tells.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data.classes import are_labels
from xdino.data.listing import ByteStrings
from xdino.data.tars.source import TarSource, TarTable
from xdino.runtime.kept import Kept, kept

LEAST = 10_000  # images; fewer are put together in no time


def indexed(
    data: str, paths: Sequence[Path], key: str, channels: int | None, make: Callable[[], TarSource]
) -> TarSource:
    """The source that `make` finds in the tars `paths`, from the index of all where that holds.

    data: what a person called them. key: what else it follows from.
    """
    found: list[TarSource] = []
    first = Path(os.path.abspath(paths[0]))
    place = first.with_name(f".{first.name if len(paths) == 1 else 'tars'}.{key}.index")

    def fresh(index: Kept) -> bool:
        source = _from_index(index, data, paths, channels)
        found.extend([source] if source is not None else [])
        return source is not None

    def made() -> Kept | None:
        before = TarTable.facts_of(paths)
        source = make()
        found.append(source)
        return _index_of(source, data, before) if len(source) >= LEAST and source.keeps else None

    kept(place, fresh, made)
    return found[-1]


def _index_of(source: TarSource, data: str, facts: np.ndarray) -> Kept:
    table = source.table
    told: dict[str, Any] = {
        "data": data,
        "tars": [path.name for path in table.tars],
        "sides": table.sides,
        "others": table.others,
        "within": source.within,
        "remarks": source.remarks,
        "channels": source.packed_channels,
        "classes": source.classes,
        "described": source.names_and_sizes().hex(),
    }
    arrays = {
        "names": np.frombuffer(table.names.blob, np.uint8),
        "name_ends": table.names.ends,
        "tar": table.tar,
        "offsets": table.offsets,
        "sizes": table.sizes,
        "facts": facts,
    }
    return Kept(told, arrays if source.labels is None else {**arrays, "labels": source.labels})


def _from_index(
    index: Kept, data: str, paths: Sequence[Path], channels: int | None
) -> TarSource | None:
    """The source; None where the index is of other tars, or of another state of them."""
    told, arrays = index.told, index.arrays
    if told["tars"] != [path.name for path in paths] or (told["remarks"] and told["data"] != data):
        return None
    facts = TarTable.facts_of(paths)
    if not np.array_equal(arrays["facts"], facts):
        return None
    names = ByteStrings(arrays["names"].data, arrays["name_ends"])
    tar, offsets, sizes = arrays["tar"], arrays["offsets"], arrays["sizes"]
    if not (names.are_whole() and len(names) == len(tar) == len(offsets) == len(sizes) > 0):
        return None
    if tar.min() < 0 or tar.max() >= len(paths) or len(told["sides"]) != len(paths):
        return None
    if ((offsets < 0) | (sizes < 0) | (sizes > facts[tar, 0] - offsets)).any():
        return None
    table = TarTable(
        list(paths), names, tar, offsets, sizes, list(told["sides"]), dict(told["others"])
    )
    labels = arrays.get("labels")
    classes = tuple(told["classes"]) if labels is not None else None
    if not are_labels(labels, classes, len(names)):
        return None
    source = TarSource(data, table, channels or told["channels"], labels, classes)
    source.within, source.remarks = told["within"], list(told["remarks"])
    source.packed_channels = told["channels"]
    source.described = bytes.fromhex(told["described"])
    return source
