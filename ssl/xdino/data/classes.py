"""Names of classes and their numbers: in one order everywhere, whatever kind of source has them."""

import re
from collections.abc import Iterable

import numpy as np

from xdino.data.listing import ByteStrings, first, printable
from xdino.data.source import Source
from xdino.errors import UsageError

Labels = tuple[np.ndarray, tuple[str, ...]]  # int64 [N], and the names that it numbers


def class_order(names: Iterable[str]) -> list[str]:
    """The order that classes are numbered in: by value where all are numbers, else as text."""
    names = list(names)
    if all(re.fullmatch("[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def numbered(said: Iterable[bytes], known: Iterable[bytes] = ()) -> Labels:
    """Labels of images whose classes are called `said` [N]. known: classes, images or not."""
    said = list(said)
    names = {raw: printable(raw) for raw in {*said, *known}}
    classes = class_order(names.values())
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[names[raw]] for raw in said], np.int64), tuple(classes)


def folder_labels(where: str, paths: ByteStrings, folders: Iterable[bytes] = ()) -> Labels:
    """Labels by each path's first folder. folders: all that there are, each of which needs an image.

    Raises UsageError for images outside of folders, and for folders without an image.
    """
    loose = [printable(p) for p in paths if b"/" not in p]
    if loose:
        raise UsageError(
            f"{where} must hold one folder per class, but {len(loose):,} images lie outside of "
            f"any: {first(loose)}"
        )
    labels, classes = numbered((p.split(b"/", 1)[0] for p in paths), folders)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        names = first([classes[label] for label in empty])
        raise UsageError(f"{where} has class folders without an image: {names}")
    return labels, classes


def are_labels(labels: np.ndarray | None, classes: tuple[str, ...] | None, n: int) -> bool:
    """Whether labels that were read from a file are those of `n` images, or none at all."""
    if labels is None or classes is None:
        return labels is None
    inside = ((labels >= 0) & (labels < len(classes))).all()
    return labels.dtype == np.int64 and labels.shape == (n,) and bool(inside)


def number_alike(data: str, train: Source, val: Source) -> None:
    """Give val's classes the numbers that they have in train; UsageError where classes differ."""
    ours, theirs = train.classes or (), val.classes or ()
    if ours == theirs:
        return
    here, there = set(ours), set(theirs)
    if here != there:
        parts = [
            f"only in {split}: {first(class_order(names))}"
            for split, names in (("train", here - there), ("val", there - here))
            if names
        ]
        raise UsageError(f"the classes of {data} differ between train and val; {'; '.join(parts)}")
    if len(here) != len(ours) or len(there) != len(theirs):
        raise UsageError(f"{data} numbers two classes of one name; train and val cannot be matched")
    assert val.labels is not None
    number = {name: label for label, name in enumerate(ours)}
    val.labels = np.array([number[name] for name in theirs], np.int64)[val.labels]
    val.classes = train.classes
