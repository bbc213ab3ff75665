"""The two labelled splits of a data set to be transferred to, whatever its layout.

Besides what `xdino.data.open_splits` opens (train/ + val/ with a folder a class, tars, Fashion-MNIST):
the archives of CIFAR-10 and CIFAR-100, Flowers-102, Stanford Cars, iNaturalist, and train/ + test/.
A folder is recognised by the files in it. What is scored on is called "val" throughout.
"""

from pathlib import Path

from xdino.config import MAX_PIXELS
from xdino.data import Source, open_source, open_splits
from xdino.data.listing import folders_in, holds_images
from xdino.data.sources import limit_pixels, splits_of
from xdino.errors import asked
from xdino_transfer.datasets import cifar, inaturalist, matlab
from xdino_transfer.datasets.checks import checked

SPLITS = ("train", "val")


def open_labelled(
    data: str,
    channels: int | None = None,
    category: str = "name",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Source, Source]:
    """Train and val of `data`, with the same classes in the same order.

    Args:
        channels: 1 or 3; the data's own unless given.
        category: of iNaturalist, the rank that is told apart.
        max_pixels: images of more are unreadable.

    Raises:
        UsageError: a layout that is not whole; classes that differ between the splits, fewer than
            two of them, or without an image in train; labels outside of the classes.
    """
    with asked(f"{data} cannot be read"):
        folder = Path(data).expanduser()
        train, val = _open(data, folder, channels, category, max_pixels)
    for source in (train, val):
        limit_pixels(source, max_pixels)
        split = "train" if source is train else "val"
        assert source.labels is not None
        checked(source.labels, source.classes or (), f"the {split} split of {data}", split == "val")
    return train, val


def open_scored(
    data: str,
    split: str = "val",
    channels: int | None = None,
    category: str = "name",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Source, int]:
    """The labelled images that a classifier is scored on, and how many there are to learn from.

    Besides what `open_labelled` opens: val/ or test/ alone, and a folder of class folders that is
    divided into nothing, of which all images are taken. How many to learn from is 0 then.

    Args:
        split: "train" or "val". channels, category, max_pixels: as of `open_labelled`.

    Raises:
        UsageError: as `open_labelled`; the split is not there.
    """
    with asked(f"{data} cannot be read"):
        folder = Path(data).expanduser()
        alone = _alone(data, folder, split)
    if alone is None:
        train, val = open_labelled(data, channels, category, max_pixels)
        return (train if split == "train" else val), len(train)
    place, part = alone
    source = open_source(place, part, channels, labelled=True, max_pixels=max_pixels)
    limit_pixels(source, max_pixels)
    assert source.labels is not None
    checked(source.labels, source.classes or (), place)
    return source, 0


def _alone(data: str, folder: Path, split: str) -> tuple[str, str | None] | None:
    """What is opened of a folder or tar that has one split, or none; None where it has both."""
    if is_archive(folder):
        return None
    parts = {name for name in ("train", "val", "test") if (folder / name).is_dir()}
    if "train" in parts and len(parts) > 1:
        return None
    found = splits_of(data)
    if found == (None,):
        only_test = parts == {"test"} and not any(
            holds_images(folder / name) for name in folders_in(folder) if name != "test"
        )
        return (str(folder / "test") if only_test else data), None
    return (data, split) if found == (split,) else None


def is_archive(folder: Path) -> bool:
    """Whether a folder is one of the layouts that are recognised by their files."""
    return folder.is_dir() and (
        cifar.recognised(folder) is not None
        or matlab.has_flowers(folder)
        or matlab.has_cars(folder)
        or inaturalist.year(folder) is not None
    )


def _open(
    data: str, folder: Path, channels: int | None, category: str, max_pixels: int
) -> tuple[Source, Source]:
    if not folder.is_dir():
        return open_splits(data, channels, max_pixels)
    wanted = channels or 3
    archive = cifar.recognised(folder)
    if archive is not None:
        train, val = (cifar.open_split(*archive, split, wanted) for split in SPLITS)
    elif matlab.has_flowers(folder):
        train, val = (matlab.open_flowers(folder, split, wanted) for split in SPLITS)
    elif matlab.has_cars(folder):
        train, val = (matlab.open_cars(folder, split, wanted) for split in SPLITS)
    elif inaturalist.year(folder) is not None:
        train, val = (inaturalist.open_split(folder, split, category, wanted) for split in SPLITS)
    else:
        return open_splits(data, channels, max_pixels)
    return train, val
