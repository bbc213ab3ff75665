"""Labels that lie beside a tar, for images that are in no folders: as ImageNet's validation tar comes.

What counts, looked for in this order in the tar's folder:

- ImageNet's own devkit, packed or not: one number a line in the order of the images' names, and
  which synset each number is (`meta.mat`);
- Kaggle's `LOC_val_solution.csv`: `ILSVRC2012_val_00000001,n01751748 111 108 341 344`;
- a text with one class a line in the order of the images' names, or with `NAME CLASS` a line:
  `imagenet_2012_validation_synset_labels.txt`, `val_labels.txt`, `val.txt`.
"""

import io
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdino.data.listing import ByteStrings, printable, shortened
from xdino.errors import UsageError, asked, reason

_DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_TEXTS = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val_labels.txt",
    "val.txt",
)
#: What a person hears where nothing of it is there.
WHAT_COUNTS = (
    f"labels may also lie beside a tar: {_DEVKIT}.tar.gz as ImageNet comes, or a text val.txt with "
    "a line NAME CLASS for each image"
)
_LARGEST = 1 << 28  # bytes of a text or of the devkit's files


@dataclass(frozen=True)
class Beside:
    """classes: what the class of each image is called [N]; file: where that is written."""

    classes: list[bytes]
    file: Path


def beside(folder: Path, names: ByteStrings) -> Beside | None:
    """The classes of the images `names` by what lies in `folder`; None where nothing does.

    Only for images that are in no folders: else these are their classes.

    Raises:
        UsageError: it cannot be read, or is not about these images.
    """
    if any(b"/" in name for name in names):
        return None
    for found, read in (
        (folder / f"{_DEVKIT}.tar.gz", _packed_devkit),
        (folder / _DEVKIT / "data", _devkit),
        (folder / _GROUND_TRUTH, lambda path: _devkit(path.parent)),
    ):
        if found.exists():
            with asked(f"{found} cannot be read"):
                return Beside(_in_order(names, read(found), found), found)
    for text in (folder / name for name in _TEXTS):
        if text.is_file():
            with asked(f"{text} cannot be read"):
                return Beside(_by_name(names, _lines(text), text), text)
    return None


# The devkit


def _packed_devkit(path: Path) -> list[bytes]:
    wanted: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as devkit:
            for member in devkit:
                name = os.path.basename(member.name)
                if name in (_GROUND_TRUTH, _META) and member.isreg() and member.size < _LARGEST:
                    file = devkit.extractfile(member)
                    wanted[name] = file.read() if file is not None else b""
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({reason(error)}); copy it again") from error
    return _synsets(wanted.get(_GROUND_TRUTH), wanted.get(_META), path)


def _devkit(folder: Path) -> list[bytes]:
    files = [folder / name for name in (_GROUND_TRUTH, _META)]
    truth, meta = [file.read_bytes() if file.is_file() else None for file in files]
    return _synsets(truth, meta, folder)


def _synsets(truth: bytes | None, meta: bytes | None, where: Path) -> list[bytes]:
    """The synset of each validation image, in their order."""
    if truth is None or meta is None:
        raise UsageError(
            f"{where} holds no {_GROUND_TRUTH if truth is None else _META}; ImageNet's devkit has "
            f"both, the classes by number and what each number means: lay {_DEVKIT}.tar.gz beside "
            "the tar"
        )
    from scipy.io import loadmat

    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        numbers, ids = np.atleast_1d(table["ILSVRC2012_ID"]), np.atleast_1d(table["WNID"])
        synset = {int(n): str(wnid).encode() for n, wnid in zip(numbers, ids, strict=True)}
        return [synset[int(number)] for number in truth.split()]
    except Exception as error:
        raise UsageError(f"{where}: its {_META} and {_GROUND_TRUTH} do not match") from error


# Texts


def _lines(path: Path) -> list[bytes]:
    if path.stat().st_size > _LARGEST:
        raise UsageError(f"{path} is no list of labels: it is too large")
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    lines = [line for line in lines if line and not line.startswith(b"#")]
    return lines[1:] if lines and lines[0].lower().startswith(b"imageid") else lines


def _by_name(names: ByteStrings, lines: Sequence[bytes], file: Path) -> list[bytes]:
    """Of lines `NAME CLASS` by the names, suffix or not; of lines `CLASS` by their order."""
    pairs = [re.split(rb"[,\s]+", line) for line in lines]
    if all(len(pair) == 1 for pair in pairs):
        return _in_order(names, lines, file)
    told = {pair[0]: pair[1] for pair in pairs if len(pair) > 1}
    keys = [name if name in told else os.path.splitext(name)[0] for name in names]
    missing = next((name for name, key in zip(names, keys, strict=True) if key not in told), None)
    if missing is not None:
        line = shortened(printable(lines[0]), 60)
        raise UsageError(
            f"{file} says no class of {printable(missing)}; expected a line NAME CLASS for each "
            f'image, or a class a line, and it begins "{line}"'
        )
    return [told[key] for key in keys]


def _in_order(names: ByteStrings, classes: Sequence[bytes], file: Path) -> list[bytes]:
    """Line i is about the i-th image by name, wherever that lies in the tar."""
    if len(classes) != len(names):
        raise UsageError(f"{file} has {len(classes):,} labels, but there are {len(names):,} images")
    order = sorted(range(len(names)), key=names.__getitem__)
    said = [b""] * len(names)
    for index, name in zip(order, classes, strict=True):
        said[index] = name
    return said
