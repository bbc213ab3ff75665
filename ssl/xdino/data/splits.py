"""Which part of the data is train: what a folder, a tar's name or a folder inside a tar calls so.

A class may be called "train" too, so the name counts only where nothing else would be lost by it; and
what calls itself val or test is never trained on, unless it is itself what was asked for. One rule
for folders on disk and folders in tars.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from xdino.data.listing import first

# Names of folders: which is val where several are there, the first.
_HELD_OUT = ("val", "valid", "validation", "test", "testing", "eval")
_PARTS = {*_HELD_OUT, "train", "unlabeled", "unlabelled"}
_SPLIT_WORDS = {"train": "train(ing)?", "val": "val(id|idation)?", "test": "test(ing)?|eval"}


def is_held_out(folder: str) -> bool:
    """Whether a folder calls itself what is not to be trained on."""
    return folder.lower() in _HELD_OUT


def is_a_part(folder: str) -> bool:
    """Whether a folder calls itself a part of the data."""
    return folder.lower() in _PARTS


def val_among(folders: Iterable[str]) -> str:
    """The folder that is val, of those beside a train: it may have another name of what is held out."""
    named = {folder.lower(): folder for folder in folders}
    return next((named[name] for name in _HELD_OUT if name in named), "val")


def is_split(
    split: str, val_is_there: bool, beside: Callable[[], object], loose: Callable[[], object]
) -> bool:
    """Whether the folder called `split` is a part of the data, and not a class of that name.

    val always is. train is, where val lies beside it or no other images do, but for more parts; it
    is too where it holds folders only, as a part does, and a class does not.

    Args:
        beside: what holds images beside it, and is no other part by its name.
        loose: what images lie directly in it.
    """
    return split == "val" or val_is_there or not beside() or not loose()


def splits_among(there: Callable[[str], object], beside: Callable[[], object]) -> list[str]:
    """The splits that are there; what lies beside a val alone is train."""
    found = [split for split in ("train", "val") if there(split)]
    return ["train", "val"] if found == ["val"] and beside() else found


# Tars by their names


def split_said(path: Path) -> str | None:
    """The split that a tar's name speaks of: "train", "val", "test" or None.

    "train-0001.tar", "val00.tar" and "imagenet1k-validation-00.tar" speak of one. The first word
    that does decides: "train-without-val.tar" is train.
    """
    word = "|".join(f"(?P<{split}>{words})" for split, words in _SPLIT_WORDS.items())
    said = re.search(rf"(?:^|[-_.\d])(?:{word})(?=[-_.\d])", path.name, re.IGNORECASE)
    return said.lastgroup if said else None


def val_tars(tars: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Those of `tars` that are val, and a sentence where they call themselves test."""
    said = [split_said(tar) for tar in tars]
    wanted = "val" if "val" in said else "test"
    chosen = [tar for tar, split in zip(tars, said, strict=True) if split == wanted]
    told = wanted == "test" and chosen
    return chosen, [f"val is {first([tar.name for tar in chosen])}"] if told else []


def train_tars(tars: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Those of `tars` to train on, and a sentence where some are not.

    What says train, or where that is unclear, what is not held out.
    """
    said = [split_said(tar) for tar in tars]
    clear = "train" in said and ("val" in said or None not in said)
    wanted = {"train"} if clear else {"train", None}
    chosen = [tar for tar, split in zip(tars, said, strict=True) if split in wanted]
    left = [tar.name for tar, split in zip(tars, said, strict=True) if split not in wanted]
    count = f"{len(chosen):,} tars" if len(chosen) != 1 else "1 tar"
    return chosen, [f"train is {count}, without {first(left)}"] if left else []


def splits_said(tars: Sequence[Path]) -> list[str]:
    """The splits that the names of `tars` divide them into; none where they say too little."""
    said = [split_said(tar) for tar in tars]
    if "val" in said or {"train", "test"} <= set(said):
        return ["train", "val"] if train_tars(tars)[0] else ["val"]
    return ["train"] if said and set(said) == {"train"} else []
