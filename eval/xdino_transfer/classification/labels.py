"""Which class of a data set is which output of a head: by name, by ImageNet's synsets, by position.

Published files do not name their classes. Those of ImageNet lie in folders that are called by WordNet's
synsets (n01440764, ...), and are numbered in the order of these names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from xdino.data import Source
from xdino.data.listing import first
from xdino.errors import UsageError

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Matching:
    """numbers: for each class of the data the output that is its own, int64 [classes of the data].

    how: "by name", "by synset" or "by position". notes: what a reader of a score should know of it.
    """

    numbers: Tensor
    how: str
    notes: list[str] = field(default_factory=list)


@cache
def synsets() -> tuple[str, ...]:
    """The 1,000 of ImageNet, in the order of a published head's outputs."""
    return tuple(ImageNetInfo().label_names())


def display_names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """What the outputs of a head are called to a person: ImageNet's in words, unknown ones by number."""
    if classes is not None:
        return tuple(classes)
    return _in_words() if count == IMAGENET_CLASSES else tuple(map(str, range(count)))


@cache
def _in_words() -> tuple[str, ...]:
    """ "n01440764 tench" and so on."""
    told = ImageNetInfo()
    return tuple(f"{s} {told.label_name_to_description(s).split(',')[0]}" for s in synsets())


def match(classes: Sequence[str] | None, count: int, source: Source) -> Matching:
    """How the classes of `source` are found among the `count` outputs of a head.

    Args:
        classes: the head's names, None where it has none.

    Raises:
        UsageError: no labels, or one class; a class that the head does not have; another number of
            classes, where the head does not name its own.
    """
    if source.labels is None or source.classes is None:
        raise UsageError(f"{source.name} has no classes to score against")
    theirs = source.classes
    if len(theirs) < 2:
        raise UsageError(f"{source.name} has one class, {theirs[0]}: any head would be right")
    if classes is not None:
        return _by_name(tuple(classes), source, theirs, "by name")
    if count == IMAGENET_CLASSES and set(theirs) <= set(synsets()):
        return _by_name(synsets(), source, theirs, "by synset")
    if len(theirs) != count:
        raise UsageError(
            f"the head knows {count:,} classes without names and {source.name} has {len(theirs):,}: "
            "it is a classifier of other data"
        )
    note = (
        "the head does not name its classes: they are taken in the order of the data's, from "
        f"{theirs[0]} to {theirs[-1]}"
    )
    return Matching(torch.arange(count), "by position", [note])


def _by_name(ours: tuple[str, ...], source: Source, theirs: tuple[str, ...], how: str) -> Matching:
    if ours == theirs:  # where two of them share a name, too
        return Matching(torch.arange(len(ours)), how)
    number = {name: column for column, name in enumerate(ours)}
    unknown = [name for name in theirs if name not in number]
    absent = [name for name in ours if name not in set(theirs)]
    if unknown:
        also = f"; only the head has {first(absent)}" if absent else ""
        raise UsageError(
            f"the head does not know {len(unknown):,} of the {len(theirs):,} classes of "
            f"{source.name}: {first(unknown)}{also}"
        )
    if len(number) < len(ours):
        twice = next(name for name in ours if ours.count(name) > 1)
        raise UsageError(
            f"the head calls two of its classes {twice}: {source.name} cannot be scored"
        )
    notes = []
    if absent:
        notes.append(
            f"the data has {len(theirs):,} of the head's {len(ours):,} classes, and lacks "
            f"{first(absent)}"
        )
    return Matching(torch.tensor([number[name] for name in theirs]), how, notes)
