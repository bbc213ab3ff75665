"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), in their binary and their Python archives.

A binary record is the label (CIFAR-100: coarse, then fine) and 3 x 1,024 bytes of a 32 x 32 picture,
channel by channel; a pickled batch holds the same rows in an array. Pickles are read by
`suite.safe_pickle`, which runs nothing of them. CIFAR-100's labels are the fine ones.

Letters: N images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data import Source
from xdino.data.idx import ArraySource
from xdino.errors import UsageError, asked
from xdino_eval.suite import safe_pickle
from xdino_transfer.datasets.checks import checked, existing

SIDE = 32
_PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """How one of the archives is laid out."""

    name: str
    folder: str
    files: dict[str, tuple[str, ...]]  # of each split
    names: str  # of the file that names the classes
    classes: int
    key: str = ""  # of the labels of a pickled batch, and of its file of names; "" for binary
    name_key: str = ""


def _ten(template: str) -> dict[str, tuple[str, ...]]:
    train = tuple(template.format(f"data_batch_{n}") for n in range(1, 6))
    return {"train": train, "val": (template.format("test_batch"),)}


LAYOUTS = (
    Layout("CIFAR-10", "cifar-10-batches-bin", _ten("{}.bin"), "batches.meta.txt", 10),
    Layout("CIFAR-10", "cifar-10-batches-py", _ten("{}"), "batches.meta", 10, "labels", "label_names"),
    Layout(
        "CIFAR-100", "cifar-100-binary", {"train": ("train.bin",), "val": ("test.bin",)},
        "fine_label_names.txt", 100,
    ),
    Layout(
        "CIFAR-100", "cifar-100-python", {"train": ("train",), "val": ("test",)}, "meta", 100,
        "fine_labels", "fine_label_names",
    ),
)  # fmt: skip


def recognised(folder: Path) -> tuple[Layout, Path] | None:
    """The archive in a folder, or in the folder of the archive's own name inside it."""
    for layout in LAYOUTS:
        for place in (folder, folder / layout.folder):
            marks = (layout.names, layout.files["train"][0])
            if all((place / mark).is_file() for mark in marks):
                return layout, place
    for layout in LAYOUTS:  # by its name alone, so that what it lacks is told
        for place in (folder, folder / layout.folder):
            if place.name == layout.folder and place.is_dir():
                return layout, place
    return None


def open_split(layout: Layout, folder: Path, split: str, channels: int = 3) -> Source:
    """One split of an archive in memory, 150 MB of pixels for the 50,000 training images.

    Raises:
        UsageError: missing files, truncated records, labels outside of the classes.
        RunFailed: a pickle that is damaged, or asks for more than plain values.
    """
    classes = _class_names(layout, folder)
    pixels, labels = [], []
    for name in layout.files[split]:
        path = existing(folder, name, layout.name)
        rows, numbers = _pickled(path, layout) if layout.key else _binary(path, layout)
        pixels.append(rows)
        labels.append(numbers)
    planes = np.concatenate(pixels).reshape(-1, 3, SIDE, SIDE)
    where = f"{layout.name}'s {split} split in {folder}"
    numbers = checked(np.concatenate(labels), classes, where, empty=split != "train")
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return ArraySource(str(folder), images, numbers, classes, channels, split)


def _class_names(layout: Layout, folder: Path) -> tuple[str, ...]:
    path = existing(folder, layout.names, layout.name)
    if layout.key:
        told = _dictionary(path).get(layout.name_key)
        names = [str(name) for name in told] if isinstance(told, list | tuple | np.ndarray) else []
    else:
        with asked(f"{path} cannot be read"):
            names = path.read_text("utf-8", "replace").split()
    if len(names) != layout.classes:
        raise UsageError(
            f"{path} names {len(names):,} classes, and {layout.name} has {layout.classes}"
        )
    return tuple(names)


def _binary(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 3,072] and labels [N] of a binary file."""
    labels = 1 if layout.classes == 10 else 2
    record = labels + _PIXELS
    with asked(f"{path} cannot be read"):
        size = path.stat().st_size
        if not size or size % record:
            raise UsageError(
                f"{path} is truncated or no {layout.name}: {size:,} bytes are no whole records of "
                f"{record:,}; fetch it again"
            )
        rows = np.fromfile(path, np.uint8).reshape(-1, record)
    return rows[:, labels:], rows[:, labels - 1]


def _pickled(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 3,072] and labels [N] of a pickled batch."""
    batch = _dictionary(path)
    missing = [key for key in ("data", layout.key) if key not in batch]
    if missing:
        raise UsageError(
            f"{path} is no batch of {layout.name}: it has no {' and no '.join(missing)}"
        )
    try:
        rows = np.asarray(batch["data"], np.uint8)
        labels = np.asarray(batch[layout.key], np.int64)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(
            f"{path} is no batch of {layout.name}: its values are no numbers"
        ) from None
    if rows.shape != (len(rows), _PIXELS) or labels.shape != (len(rows),):
        raise UsageError(
            f"{path} is truncated or no {layout.name}: expected rows of {_PIXELS:,} bytes with one "
            f"label each, got {list(rows.shape)} and {list(labels.shape)}"
        )
    return rows, labels


def _dictionary(path: Path) -> dict[Any, Any]:
    content = safe_pickle.load(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no batch of CIFAR: it holds a {type(content).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
