"""A folder as a source: of image files, of class folders, of train and val, or of tars."""

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from xdino.data import listing, splits
from xdino.data.classes import folder_labels
from xdino.data.files.index import indexed
from xdino.data.files.source import FileSource
from xdino.data.listing import ByteStrings, first, folders_in, holds_images, loose_images, tars_in
from xdino.data.source import Source
from xdino.data.tars import open_tars
from xdino.errors import UsageError


def open_folder(
    data: str, path: Path, split: str | None, channels: int | None, labelled: bool
) -> Source:
    """The images of the folder `path`, or of its `split`. `data`: what a person called it."""
    key = f"{split or 'all'}.labelled" if labelled else split or "all"
    return indexed(
        path, key, data, channels or 3, lambda: _looked_for(data, path, split, channels, labelled)
    )


def _looked_for(
    data: str, path: Path, split: str | None, channels: int | None, labelled: bool
) -> Source:
    if split is None:
        return _open_whole(data, path, [], channels, labelled)
    tars = tars_in(path)
    remarks: list[str] = []
    if _has_split(path, split):
        source = _open_whole(data, split_folder(path, split), [], channels, labelled)
        if split == "train" and not (path / "val").is_dir() and (others := _beside(path)):
            remarks = [f"train is {path / split}, without the images of {first(others)}"]
        elif split == "val" and (called := split_folder(path, split)).name != split:
            remarks = [f"val is {called}"]
    elif split == "val":
        named, remarks = splits.val_tars(tars)
        if not tars:
            raise UsageError(f"{data} has no folder val; expected {path / split}")
        source = open_tars(data, named or tars, None if named else split, channels, labelled)
    elif tars and not holds_images(path):
        chosen, remarks = splits.train_tars(tars)
        if not chosen:
            raise UsageError(f"{data} has nothing to train on but {first([t.name for t in tars])}")
        source = open_tars(data, chosen, split, channels, labelled)
    else:
        held = [f for f in folders_in(path) if splits.is_held_out(f) and holds_images(path / f)]
        if held:
            remarks.append(f"train is {data} without {first(held)}")
        if (path / "train").is_dir():
            remarks.append(f"train is taken for one of the classes of {data}")
        source = _open_whole(data, path, held, channels, labelled)
    source.remarks += remarks
    return source


def splits_of_folder(path: Path) -> list[str]:
    """The splits that a folder is divided into, by its folders or by the names of its tars."""
    found = splits.splits_among(lambda split: _has_split(path, split), lambda: _beside(path))
    return found if found or holds_images(path) else splits.splits_said(tars_in(path))


def check_both_splits(data: str, path: Path) -> None:
    """Raises UsageError where a folder of images lacks train or val."""
    if tars_in(path):
        return
    absent = [split for split in ("train", "val") if not split_folder(path, split).is_dir()]
    if absent:
        raise UsageError(
            f"{data} must hold the folders train and val, each with one folder per class; "
            f"it has no {' and no '.join(absent)}"
        )


def split_folder(path: Path, split: str) -> Path:
    """Where `split` of the folder `path` lies, if it is there: val may be called test beside a train."""
    if split != "val" or (path / "val").is_dir() or not (path / "train").is_dir():
        return path / split
    return path / splits.val_among(folders_in(path))


def _has_split(path: Path, split: str) -> bool:
    folder = split_folder(path, split)
    return folder.is_dir() and splits.is_split(
        split,
        split_folder(path, "val").is_dir(),
        lambda: _beside(path),
        lambda: loose_images(folder),
    )


def _beside(path: Path) -> list[str]:
    """What holds images beside the folder train, and is no other part by its name."""
    folders = [f for f in folders_in(path) if not splits.is_a_part(f) and holds_images(path / f)]
    return sorted(map(listing.printable, [*loose_images(path), *map(os.fsencode, folders)]))


def _open_whole(
    data: str, path: Path, but: Sequence[str], channels: int | None, labelled: bool
) -> Source:
    """All images below `path`, but for some of its folders; of all its tars where there is none."""
    left_out: dict[str, int] = {}
    facts = array("q")

    def listed() -> Iterator[bytes]:
        for name, size, changed in listing.scan(os.fsencode(path), left_out, but):
            facts.extend((size, changed))
            yield name

    paths = ByteStrings.of(listed())
    if not len(paths):
        if but:
            raise UsageError(f"{data} has nothing to train on but {first(but)}")
        if tars := tars_in(path):
            return open_tars(data, tars, None, channels, labelled)
        raise UsageError(listing.no_image(path, left_out))
    labels, classes = None, None
    if labelled:
        folders = [os.fsencode(f) for f in folders_in(path) if f not in but]
        labels, classes = folder_labels(str(path), paths, folders)
    table = np.frombuffer(facts, np.int64).reshape(-1, 2)
    source = FileSource(data, path, paths, channels or 3, labels, classes, table)
    source.left_out = left_out
    return source
