"""Two sets whose indices are MATLAB files: Oxford's 102 flowers and Stanford's cars.

Flowers (Nilsback and Zisserman, 2008): jpg/, imagelabels.mat, setid.mat; the train split is train and
validation together, as the transfer results of the field take it. Cars (Krause et al., 2013):
cars_train/, cars_test/ and the development kit with `cars_test_annos_withlabels.mat` beside them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from xdino.data.sources import FileSource
from xdino.errors import UsageError, reason
from xdino_transfer.datasets.checks import all_there, checked, existing

FLOWERS, CARS = "Flowers-102", "Stanford Cars"
_SUBSETS = {"train": ("trnid", "valid"), "val": ("tstid",)}


def has_flowers(folder: Path) -> bool:
    return (folder / "imagelabels.mat").is_file() or (folder / "setid.mat").is_file()


def has_cars(folder: Path) -> bool:
    marks = ("cars_train", "cars_meta.mat", "devkit/cars_meta.mat")
    return any((folder / mark).exists() for mark in marks)


def open_flowers(folder: Path, split: str, channels: int = 3) -> FileSource:
    """Raises UsageError for missing or damaged files, and labels outside of 1..102."""
    path = existing(folder, "imagelabels.mat", FLOWERS)
    labels = _numbers(path, "labels")
    sets = existing(folder, "setid.mat", FLOWERS)
    chosen = np.concatenate([_numbers(sets, name) for name in _SUBSETS[split]])
    if len(chosen) and not 1 <= chosen.min() <= chosen.max() <= len(labels):
        raise UsageError(
            f"{sets} numbers images up to {chosen.max():,}, and {path} has labels for {len(labels):,}"
        )
    classes = tuple(str(number) for number in range(1, 103))  # the archive does not name them
    where = f"the {split} split of {folder}"
    numbers = checked(labels[chosen - 1] - 1, classes, where, empty=split != "train")
    paths = [f"jpg/image_{number:05}.jpg" for number in chosen.tolist()]
    all_there(folder, paths, where)
    return FileSource(str(folder), folder, map(str.encode, paths), channels, numbers, classes)


def open_cars(folder: Path, split: str, channels: int = 3) -> FileSource:
    """Raises UsageError for missing or damaged files, and labels outside of the classes."""
    kit = folder / "devkit" if (folder / "devkit").is_dir() else folder
    meta = existing(kit, "cars_meta.mat", CARS)
    classes = tuple(str(name) for name in np.atleast_1d(_variable(meta, "class_names")))
    if split == "train":
        path = existing(kit, "cars_train_annos.mat", CARS)
    else:  # beside the kit, or inside it
        name = "cars_test_annos_withlabels.mat"
        path = folder / name if (folder / name).is_file() else existing(kit, name, CARS)
    images = "cars_train" if split == "train" else "cars_test"
    existing(folder, images, CARS)
    entries = np.atleast_1d(_variable(path, "annotations"))
    try:
        paths = [f"{images}/{entry['fname']}" for entry in entries]
        labels = [int(entry["class"]) - 1 for entry in entries]
    except (LookupError, TypeError, ValueError):
        raise UsageError(f"{path} has no fname and class for every image") from None
    where = f"the {split} split of {folder}"
    numbers = checked(labels, classes, where, empty=split != "train")
    all_there(folder, paths, where)
    return FileSource(str(folder), folder, map(str.encode, paths), channels, numbers, classes)


def _numbers(path: Path, name: str) -> np.ndarray:
    """A row of whole numbers, int64 [N]."""
    value = np.asarray(_variable(path, name)).reshape(-1)
    if value.dtype.kind not in "iuf" or (value != np.floor(value)).any():
        raise UsageError(f"{path} holds no whole numbers in {name}")
    return value.astype(np.int64)


def _variable(path: Path, name: str) -> Any:
    try:
        content = scipy.io.loadmat(path, squeeze_me=True, variable_names=[name])
    except Exception as error:  # noqa: BLE001  whatever its decoder trips over
        raise UsageError(f"{path} is damaged or no MATLAB file ({reason(error)})") from None
    if name not in content:
        raise UsageError(f"{path} holds no {name}")
    return content[name]
