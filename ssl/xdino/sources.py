"""Where images come from: folders, lists of paths, and Fashion-MNIST's IDX files.

A source is a numbered row of images. It knows names and labels and reads one image at a time;
order, crops and batches are `data`'s business. A source is complete or refused: a missing file or
a truncated archive is an error with the mend in it, never a smaller data set.
"""

import abc
import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from xdino.errors import UsageError, nearest
from xdino.images import decode

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
)  # fmt: skip
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
_NAMES = ("fashion_mnist", "fashion_mnist_sample")


class Source(abc.ABC):
    """N images. `labels`: int64 [N] indices into `classes`, or None.

    `batch_reads` is how many images make one task of a worker: few where reading one takes
    milliseconds, many where handing over a task costs as much as the image.
    """

    batch_reads = 4

    def __init__(
        self,
        name: str,
        channels: int,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise UsageError(f"channels must be 1 or 3, got {channels}")
        self.name, self.channels, self.labels, self.classes = name, channels, labels, classes

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> np.ndarray:
        """uint8 [H, W, C]. Raises UnreadableImage or OSError for an image that cannot be read."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """How a person finds image `index`: its path, or its number in the file that holds it."""

    @abc.abstractmethod
    def _content(self) -> Iterator[bytes]:
        """What tells this source from another of the same length, for `fingerprint`."""


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits: the same for the same images, names and labels on any machine.

    Files count by their names below the source's folder, not by their contents.
    """
    digest = hashlib.blake2b(str(len(source)).encode(), digest_size=8)
    for part in source._content():
        digest.update(part)
    if source.labels is not None:
        digest.update(source.labels.tobytes())
        digest.update("\0".join(source.classes or ()).encode())
    return digest.hexdigest()


class ArraySource(Source):
    """Images in memory, uint8 [N, H, W]; three channels repeat the one."""

    batch_reads = 64  # crops of 28 pixels are all interpreter: threads that take turns double it

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        channels: int = 1,
        split: str = "train",
    ) -> None:
        super().__init__(name, channels, labels, classes)
        self._images, self._split = images, split

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> np.ndarray:
        image = self._images[index][:, :, None]
        return image if self.channels == 1 else np.repeat(image, 3, axis=2)

    def describe(self, index: int) -> str:
        return f"{self._split} image {index} of {self.name}"

    def _content(self) -> Iterator[bytes]:
        yield self._images.tobytes()


class FileSource(Source):
    """Image files: paths relative to `root`, kept as one run of bytes (1.28 million are 50 MB)."""

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[bytes],
        channels: int = 3,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name, channels, labels, classes)
        self._root = os.fsencode(root)
        blob, ends = bytearray(), [0]
        for path in paths:
            blob += path
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _relative(self, index: int) -> bytes:
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._relative(index)))

    def read(self, index: int) -> np.ndarray:
        with open(self.path(index), "rb", buffering=0) as file:
            return decode(file.read(), self.channels)

    def describe(self, index: int) -> str:
        return self.path(index)

    def _content(self) -> Iterator[bytes]:
        yield self._blob
        yield self._ends.tobytes()


# Opening


def open_source(
    data: str, split: str | None = None, channels: int | None = None, labelled: bool = False
) -> Source:
    """The source that `data` names.

    data: "fashion_mnist", "fashion_mnist:FOLDER" (IDX files, plain or .gz),
    "fashion_mnist_sample" (shipped: 10,000 and 2,000 images), a folder, or a text file with one
    path a line. split: "train" or "val"; of a folder, its subfolder of that name ("train" falls
    back on the folder itself). channels: 1 for Fashion-MNIST and 3 for files unless given.
    labelled: a folder must hold one folder per class. Raises UsageError for whatever is missing,
    misspelt or incomplete.
    """
    if split not in (None, "train", "val"):
        raise UsageError(f'split must be "train" or "val", got "{split}"')
    name, _, place = data.partition(":")
    if name == "fashion_mnist":
        folder = place or os.environ.get("XDINO_FASHION_MNIST") or _FASHION_FOLDER
        prefix = {"val": "t10k"}.get(split or "train", "train")
        return _open_idx(data, Path(folder).expanduser(), prefix, split or "train", channels)
    if data == "fashion_mnist_sample":
        folder = Path(__file__).parent / "assets" / "fashion_mnist_sample"
        return _open_idx(data, folder, split or "train", split or "train", channels)
    path = Path(data).expanduser()
    if path.is_dir():
        return _open_folder(data, path, split, channels or 3, labelled)
    if path.is_file():
        if labelled:
            raise UsageError(f"{data} is a list of paths, which has no classes; give a folder")
        return _open_list(data, path, channels or 3)
    raise UsageError(_missing(data, path))


def open_splits(data: str, channels: int | None = None) -> tuple[Source, Source]:
    """The labelled train and val splits of `data`. Raises UsageError where classes differ."""
    path = Path(data).expanduser()
    if path.is_dir():
        absent = [split for split in ("train", "val") if not (path / split).is_dir()]
        if absent:
            raise UsageError(
                f"{data} must hold the folders train and val, each with one folder per class; "
                f"it has no {' and no '.join(absent)}"
            )
    train = open_source(data, "train", channels, labelled=True)
    val = open_source(data, "val", channels, labelled=True)
    here, there = set(train.classes or ()), set(val.classes or ())
    if here != there:
        parts = [
            f"only in {split}: {_first(sorted(names))}"
            for split, names in (("train", here - there), ("val", there - here))
            if names
        ]
        raise UsageError(f"the classes of {data} differ between train and val; {'; '.join(parts)}")
    return train, val


def _missing(data: str, path: Path) -> str:
    """One sentence about a `data` that is neither a name, a folder nor a file."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = [entry.name for entry in os.scandir(parent)]
    if len(Path(data).parts) == 1 and not data.startswith("~"):
        return (
            f'there is no data set or folder called "{data}"; '
            + nearest(data, [*_NAMES, *siblings])
            + f" (data sets: {', '.join(_NAMES)}; else a folder or a list of paths)"
        )
    hint = nearest(path.name, siblings)
    where = f"{data} does not exist: {parent} has no {path.name}"
    return where + (f"; {hint}" if hint.startswith("did you") else "")


def _first(names: list[str], count: int = 5) -> str:
    """`a, b, c and 7 more`."""
    rest = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


# Folders and lists


def _open_folder(data: str, path: Path, split: str | None, channels: int, labelled: bool) -> Source:
    if split is not None and (path / split).is_dir():
        path = path / split
    elif split == "val":
        raise UsageError(f"{data} has no folder val; expected {path / split}")
    unknown: set[str] = set()
    paths = list(_scan(os.fsencode(path), b"", unknown, frozenset()))
    if not paths:
        seen = f"it holds files with the suffixes {_first(sorted(unknown))}" if unknown else ""
        raise UsageError(
            f"{path} holds no image" + (f"; {seen}, known are {' '.join(SUFFIXES)}" if seen else "")
        )
    if not labelled:
        return FileSource(data, path, paths, channels)
    loose = [os.fsdecode(p) for p in paths if os.sep.encode() not in p]
    if loose:
        raise UsageError(
            f"{path} must hold one folder per class, but {len(loose):,} images lie outside of "
            f"any: {_first(loose)}"
        )
    classes = sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
    number = {os.fsencode(name): label for label, name in enumerate(classes)}
    labels = np.array([number[p.split(os.sep.encode(), 1)[0]] for p in paths], np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        names = _first([classes[label] for label in empty])
        raise UsageError(f"{path} has class folders without an image: {names}")
    return FileSource(data, path, paths, channels, labels, tuple(classes))


def _scan(
    root: bytes, below: bytes, unknown: set[str], above: frozenset[tuple[int, int]]
) -> Iterator[bytes]:
    """Paths of the images below `root`, relative to it, sorted folder by folder.

    Hidden names are skipped (macOS leaves "._photo.jpg" beside photos). Linked folders are
    followed, except into a folder that is being listed. Other suffixes are put into `unknown`.
    """
    folder = os.path.join(root, below) if below else root
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    known = tuple(suffix.encode() for suffix in SUFFIXES)
    for name, is_folder in found:
        if name.startswith(b"."):
            continue
        path = os.path.join(below, name)
        if is_folder:
            yield from _scan(root, path, unknown, above | {identity})
        elif name.lower().endswith(known):
            yield path
        else:
            unknown.add(os.fsdecode(os.path.splitext(name)[1]) or "none")


def _open_list(data: str, path: Path, channels: int) -> Source:
    if path.suffix.lower() in SUFFIXES:
        raise UsageError(f"{data} is one image; give a folder, or a text file with one path a line")
    root = path.parent
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    paths = [line for line in lines if line and not line.startswith(b"#")]
    if not paths:
        raise UsageError(f"{data} names no image; expected one path a line")
    base = os.fsencode(root)
    missing = [os.fsdecode(p) for p in paths if not os.path.isfile(os.path.join(base, p))]
    if missing:
        raise UsageError(
            f"{len(missing):,} of the {len(paths):,} files listed in {data} do not exist: "
            f"{_first(missing)} (relative paths start at {root})"
        )
    return FileSource(data, root, paths, channels)


# IDX, the format of MNIST: magic 0 0 8 rank, then big-endian sizes, then bytes


def _open_idx(data: str, folder: Path, prefix: str, split: str, channels: int | None) -> Source:
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
    if len(images) != len(labels):
        raise UsageError(
            f"{folder} holds {len(images):,} {split} images but {len(labels):,} labels"
        )
    if len(images) == 0 or labels.max() >= len(FASHION_CLASSES):
        raise UsageError(f"{folder} holds no {split} images with labels from 0 to 9")
    return ArraySource(data, images, labels, FASHION_CLASSES, channels or 1, split)


def _read_idx(folder: Path, name: str, rank: int) -> np.ndarray:
    """uint8 of `rank` dimensions from FOLDER/NAME.gz or FOLDER/NAME."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise UsageError(
            f"Fashion-MNIST is not here: {folder / name}(.gz) does not exist; get it with `apt-get "
            "install dataset-fashion-mnist`, or name its folder: fashion_mnist:FOLDER, or in the "
            "environment variable XDINO_FASHION_MNIST"
        )
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read whole ({error}); fetch it again") from error
    header = 4 + 4 * rank
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, rank]):
        raise UsageError(f"{path} is no IDX file of bytes with {rank} dimensions")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise UsageError(
            f"{path} holds {len(raw):,} bytes where its header announces {expected:,}; "
            "fetch it again"
        )
    # A bytearray, because torch warns about arrays that cannot be written.
    return np.frombuffer(bytearray(raw), np.uint8, offset=header).reshape(shape)
