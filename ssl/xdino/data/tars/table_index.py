"""What was found in all tars of a data set, kept as one: 500 shards are open again in no time.

It lies beside the tars and counts as long as each has the size and time of change that it tells.
"""

import posixpath
from collections.abc import Callable
from typing import Any

import numpy as np

from xdino.data.classes import are_labels
from xdino.data.listing import ByteStrings
from xdino.data.tars.source import TarSource, TarTable
from xdino.data.tars.store import Store
from xdino.runtime.kept import Kept, kept


def indexed(
    data: str, store: Store, key: str, channels: int | None, make: Callable[[], TarSource]
) -> TarSource:
    """The source that `make` finds in the tars of `store`, from the index of all where that holds.

    data: what a person called them. key: what else it follows from.
    """
    found: list[TarSource] = []

    def fresh(index: Kept) -> bool:
        source = _from_index(index, data, store, channels)
        found.extend([source] if source is not None else [])
        return source is not None

    def made() -> Kept | None:
        before = store.facts()
        source = make()
        found.append(source)
        keeps = len(source) >= store.least and source.keeps
        return _index_of(source, data, before) if keeps else None

    kept(store.place(key), fresh, made)
    return found[-1]


def _index_of(source: TarSource, data: str, facts: np.ndarray) -> Kept:
    table = source.table
    told: dict[str, Any] = {
        "data": data,
        "tars": [_last(name) for name in table.store.names],
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


def _from_index(index: Kept, data: str, store: Store, channels: int | None) -> TarSource | None:
    """The source; None where the index is of other tars, or of another state of them."""
    told, arrays = index.told, index.arrays
    here = [_last(name) for name in store.names]
    if told["tars"] != here or (told["remarks"] and told["data"] != data):
        return None
    facts = store.facts()
    if not np.array_equal(arrays["facts"], facts):
        return None
    names = ByteStrings(arrays["names"].data, arrays["name_ends"])
    tar, offsets, sizes = arrays["tar"], arrays["offsets"], arrays["sizes"]
    if not (names.are_whole() and len(names) == len(tar) == len(offsets) == len(sizes) > 0):
        return None
    if tar.min() < 0 or tar.max() >= len(here) or len(told["sides"]) != len(here):
        return None
    if ((offsets < 0) | (sizes < 0) | (sizes > facts[tar, 0] - offsets)).any():
        return None
    table = TarTable(store, names, tar, offsets, sizes, list(told["sides"]), dict(told["others"]))
    labels = arrays.get("labels")
    classes = tuple(told["classes"]) if labels is not None else None
    if not are_labels(labels, classes, len(names)):
        return None
    source = TarSource(data, table, channels or told["channels"], labels, classes)
    source.within, source.remarks = told["within"], list(told["remarks"])
    source.packed_channels = told["channels"]
    source.described = bytes.fromhex(told["described"])
    return source


def _last(name: str) -> str:
    """What a tar is called, wherever the data were moved."""
    return posixpath.basename(name)
