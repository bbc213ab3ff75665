"""Which images of tars make a source, and their labels: from folders, `.cls` members, or a text."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdino.data.classes import Labels, folder_labels, numbered
from xdino.data.listing import ByteStrings, first, no_image, printable
from xdino.data.splits import is_a_part, is_held_out, is_split, splits_among, val_among
from xdino.data.tars import label_files
from xdino.data.tars.index import open_index
from xdino.data.tars.scanning import TarIndex, of_pictures
from xdino.data.tars.source import TarSource, TarTable
from xdino.data.tars.store import LocalTars, Store
from xdino.data.tars.table_index import indexed
from xdino.errors import UsageError


def open_tars(
    data: str,
    tars: Sequence[Path] | Store,
    split: str | None,
    channels: int | None,
    labelled: bool,
) -> TarSource:
    """The images of tars, in their order; those below a folder `split` where that is a part."""
    key = f"{split or 'all'}.labelled" if labelled else split or "all"
    store = LocalTars(tars) if isinstance(tars, Sequence) else tars
    return indexed(
        data, store, key, channels, lambda: _put_together(data, store, split, channels, labelled)
    )


def _put_together(
    data: str, store: Store, split: str | None, channels: int | None, labelled: bool
) -> TarSource:
    indexes = of_pictures(store.indexes())
    within = _split_folder(indexes, split) if split is not None else b""
    if split == "val" and not within and any(map(len, indexes)):
        tops = sorted({printable(n.split(b"/")[0]) for i in indexes for n in i.names})
        raise UsageError(
            f"{data} has no folder val inside, only {first(tops)}; expected members val/..., "
            "or a folder with a tar whose name says val"
        )
    held = _held_out(indexes) if split == "train" and not within else []
    rows = [_rows(index, within, held) for index in indexes]
    pairs = list(zip(indexes, rows, strict=True))
    names = ByteStrings.of(i.names[row][len(within) :] for i, chosen in pairs for row in chosen)
    if not len(names) and held:
        raise UsageError(f"{data} has nothing to train on but {first(held)}")
    if not len(names):
        raise UsageError(no_image(data, {suffix for i in indexes for suffix in i.others}))
    packed = {index.pack.get("channels") for index in indexes}
    packed_channels = packed.pop() if packed in ({1}, {3}) else 3
    labels, classes, remarks = None, None, list[str]()
    if labelled:
        said = [i.classes[row] for i, chosen in pairs for row in chosen]
        known = _packed_classes(indexes, within)
        folder = store.folder()
        if any(said) or folder is None or (found := label_files.beside(folder, names)) is None:
            labels, classes = _labels(data, names, said, known)
        else:
            labels, classes = numbered(found.classes)
            remarks = [f"labels of {data} are those of {found.file}"]
    table = TarTable.of(store, indexes, rows, names)
    source = TarSource(data, table, channels or packed_channels, labels, classes)
    source.within, source.remarks = printable(within), remarks
    source.packed_channels, source.keeps = packed_channels, not remarks
    if split == "val" and within not in (b"", b"val/"):
        source.remarks.append(f"val is {printable(within[:-1])} in {data}")
    if held:
        source.remarks.append(f"train is {data} without {first(held)}")
    return source


# Which part of a tar


def splits_of_tar(path: Path) -> list[str]:
    """The splits that a tar is divided into by the folders inside."""
    indexes = of_pictures([open_index(path)])
    held = _held_out(indexes)
    return splits_among(
        lambda split: _split_folder(indexes, split), lambda: len(_rows(indexes[0], b"", held))
    )


def _split_folder(indexes: Sequence[TarIndex], split: str) -> bytes:
    """`b"train/"` where the folder of that name inside tars is a part of them, b"" where not."""
    raw = {name.rpartition(b"/")[0] for index in indexes for name in index.names}
    folders = {os.fsdecode(folder) for folder in raw}
    tops = {folder.split("/", 1)[0] for folder in folders}  # "" where images lie in no folder
    beside = [top for top in tops if not is_a_part(top)]
    val = val_among(tops) if "train" in tops else "val"
    name = val if split == "val" else split
    part = name in tops and is_split(split, val in tops, lambda: beside, lambda: name in folders)
    return f"{name}/".encode() if part else b""


def _held_out(indexes: Sequence[TarIndex]) -> list[str]:
    """What folders inside are called that are not to be trained on, in small letters."""
    tops = dict.fromkeys(_top(name) for index in indexes for name in index.names)
    return [top.decode() for top in tops if is_held_out(os.fsdecode(top))]


def _top(name: bytes) -> bytes:
    """The first folder of a member, in small letters; b"" where it lies in none."""
    return name.partition(b"/")[0].lower() if b"/" in name else b""


def _rows(index: TarIndex, within: bytes, held: Sequence[str]) -> np.ndarray:
    """Which images lie below `within` and not below the folders `held`: int64 [n]."""
    out = {folder.encode() for folder in held}
    return np.flatnonzero([n.startswith(within) and _top(n) not in out for n in index.names])


# Labels


def _packed_classes(indexes: Sequence[TarIndex], within: bytes) -> list[str] | None:
    """The names of the classes that .cls members number, where all tars were packed with the same."""
    known = []
    for index in indexes:
        told = index.pack.get("splits", {})
        chosen = {within[:-1].decode(): told.get(within[:-1].decode(), {})} if within else told
        known += [split.get("classes") for split in chosen.values()] or [None]
    return known[0] if all(classes == known[0] for classes in known) else None


def _labels(data: str, names: ByteStrings, said: list[bytes], known: list[str] | None) -> Labels:
    """From .cls members, where there are none from folders.

    known: class names by number, where the tar was packed here.
    """
    silent = sum(not text for text in said)
    if silent == len(said):
        try:
            return folder_labels(data, names)
        except UsageError as error:
            if any(b"/" in name for name in names):
                raise
            raise UsageError(f"{error}; {label_files.WHAT_COUNTS}") from None
    if silent:
        where = next(printable(n) for n, text in zip(names, said, strict=True) if not text)
        raise UsageError(
            f"{data} has no .cls beside {silent:,} of its {len(said):,} images, among them {where}"
        )
    if known is not None and all(re.fullmatch(rb"[0-9]{1,9}", text) for text in set(said)):
        labels = np.array([int(text) for text in said], np.int64)
        if labels.max() < len(known):
            return labels, tuple(known)
    return numbered(said)
