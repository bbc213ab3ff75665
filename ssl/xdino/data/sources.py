"""Where images come from: what a person calls a data set -> the source that reads it.

Folders, text lists of paths, tar files and folders of them, and Fashion-MNIST by its name. A kind of
source has a room of its own: `files`, `tars`, `idx`; which files count as images is `listing`'s,
which of them are train is `splits`'.
"""

import os
import re
import stat
from pathlib import Path

from xdino.config import MAX_PIXELS
from xdino.data.classes import class_order, number_alike
from xdino.data.files import (
    FileSource,
    check_both_splits,
    open_folder,
    open_list,
    splits_of_folder,
)
from xdino.data.idx import NAMES, ArraySource, open_named
from xdino.data.listing import holds_arrays, of_arrays, shortened
from xdino.data.parquet import open_parquet, parquet_in, splits_of_parquet
from xdino.data.remote import open_named_tars, splits_of_named_tars
from xdino.data.source import Source, fingerprint, limit_pixels, settle_bands
from xdino.data.tars import TarSource, open_tars, splits_of_tar
from xdino.errors import UsageError, asked
from xdino.runtime import places
from xdino.runtime.places import missing_data

__all__ = [
    "ArraySource",
    "FileSource",
    "Source",
    "TarSource",
    "class_order",
    "fingerprint",
    "limit_pixels",
    "open_source",
    "open_splits",
    "splits_of",
]

_TAR_NAME = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)


def open_source(
    data: str,
    split: str | None = None,
    channels: int | None = None,
    labelled: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """The source that `data` names.

    data: "fashion_mnist", "fashion_mnist:FOLDER" (IDX files, plain or .gz),
    "fashion_mnist_sample" (shipped: 10,000 and 2,000 images), "fashion_mnist_scattered" (the same
    garments at random places, see `scattered`), a folder, a tar file, a folder of
    tar files, a text file with one path a line, an address of tars ("s3://bucket/train-{000..127}.tar"),
    or a pattern of tar files ("shards/train-*.tar"). split: "train" or "val"; of a folder or tar,
    its (sub)folder of that name, or the tars whose names say so ("train" falls back on what does
    not call itself val or test). channels: 1 for Fashion-MNIST and 3 for files unless given; `Bands`
    of sensors' images, which are found to be such where nothing is given.
    labelled: a folder must hold one folder per class, a tar the same or a .cls beside every image.
    max_pixels: images of more are unreadable. Raises UsageError for whatever is missing, misspelt
    or incomplete.
    """
    with asked(f"{shortened(data)} cannot be read"):
        source = _open(data, split, channels or None, labelled)
        settle_bands(source, channels)
    limit_pixels(source, max_pixels)
    return source


def _open(data: str, split: str | None, channels: int | None, labelled: bool) -> Source:
    if split not in (None, "train", "val"):
        raise UsageError(f'split must be "train" or "val", got "{split}"')
    named = open_named(data, split, channels)
    if named is not None:
        return named
    if places.is_address(data):
        return open_named_tars(data, split, channels, labelled)
    path = Path(data).expanduser()
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if places.matching(data):
            return open_named_tars(data, split, channels, labelled)
        raise UsageError(missing_data(data, path)) from None
    if stat.S_ISDIR(mode):
        try:
            return open_folder(data, path, split, channels, labelled)
        except UsageError:  # looked for last: it costs a listing
            if tables := parquet_in(path):
                return open_parquet(data, tables, split, channels, labelled)
            if holds_arrays(path):
                with of_arrays():
                    return open_folder(data, path, split, channels, labelled)
            raise
    if not stat.S_ISREG(mode):
        raise UsageError(f"{data} is neither a folder nor a regular file")
    if path.suffix.lower() == ".parquet":
        return open_parquet(data, [path], None if split == "train" else split, channels, labelled)
    if _TAR_NAME.search(path.name):
        return open_tars(data, [path], split, channels, labelled)
    if labelled:
        raise UsageError(f"{data} is a list of paths, which has no classes; give a folder")
    return open_list(data, path, channels or 3)


def open_splits(
    data: str, channels: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Source, Source]:
    """The labelled train and val splits of `data`, with the same classes in the same order.

    Raises UsageError where classes differ.
    """
    with asked(f"{shortened(data)} cannot be read"):
        path = Path(data).expanduser()
        if path.is_dir() and not parquet_in(path):
            check_both_splits(data, path)
    train = open_source(data, "train", channels, labelled=True, max_pixels=max_pixels)
    val = open_source(data, "val", channels, labelled=True, max_pixels=max_pixels)
    number_alike(data, train, val)
    return train, val


def splits_of(data: str) -> tuple[str | None, ...]:
    """The splits that `data` is divided into, "train" and "val"; (None,) where it is not."""
    if data.partition(":")[0] in NAMES:
        return "train", "val"
    with asked(f"{shortened(data)} cannot be read"):
        path = Path(data).expanduser()
        found: list[str] = []
        if places.is_address(data) or (not path.exists() and places.matching(data)):
            found = splits_of_named_tars(data)
        elif path.is_dir():
            found = splits_of_folder(path) or splits_of_parquet(parquet_in(path))
            if not found and holds_arrays(path):
                with of_arrays():
                    found = splits_of_folder(path)
        elif path.is_file() and _TAR_NAME.search(path.name):
            found = splits_of_tar(path)
    return tuple(found) or (None,)
