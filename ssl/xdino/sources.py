"""Where images come from: folders, lists of paths, tar shards, and Fashion-MNIST's IDX files.

A source is a numbered row of images. It knows names and labels and reads one image at a time;
order, crops and batches are `data`'s business. A source is complete or refused: a missing file or
a truncated archive is an error with the mend in it, never a smaller data set.
"""

import abc
import contextlib
import gzip
import hashlib
import io
import os
import re
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from xdino import shards
from xdino.errors import UsageError, nearest
from xdino.images import MAX_PIXELS, SUFFIXES, allow_pixels, decode
from xdino.shards import ByteStrings, TarIndex

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
_TAR_NAME = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)
_NAMES = ("fashion_mnist", "fashion_mnist_sample")


class Source(abc.ABC):
    """N images. `labels`: int64 [N] indices into `classes`, or None.

    `batch_reads` is how many images make one task of a worker: few where reading one takes
    milliseconds, many where handing over a task costs as much as the image.
    """

    batch_reads = 4
    max_pixels = MAX_PIXELS  # of an image; a larger one is unreadable
    shrunk_to: int | None = (
        None  # shorter side in pixels, where the images are not the original ones
    )

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

    def encoded(self, index: int) -> bytes:
        """Image `index` as an image file's bytes: those that are stored, else lossless PNG."""
        image = self.read(index)
        return _png(image if image.shape[2] == 3 else image[..., 0])

    def member(self, index: int) -> bytes:
        """The name of image `index` below the source's root, folders and suffix included."""
        return f"{index:08}.png".encode()

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """How a person finds image `index`: its path, or its number in the file that holds it."""

    def stamps(self) -> bytes:
        """Sizes and times of the files that images are read from, for caches of what they gave."""
        told = []
        for path in dict.fromkeys(
            map(str, getattr(self, "_tars", map(self.describe, range(len(self)))))
        ):
            with contextlib.suppress(OSError):
                status = os.stat(path)
                told.append((status.st_size, status.st_mtime_ns))
        return repr(told).encode()

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

    def encoded(self, index: int) -> bytes:
        return _png(self._images[index])

    def member(self, index: int) -> bytes:
        assert self.labels is not None
        assert self.classes is not None
        folder = re.sub(r"[^A-Za-z0-9]+", "_", self.classes[self.labels[index]])
        return f"{folder}/{index:05}.png".encode()

    def describe(self, index: int) -> str:
        return f"{self._split} image {index} of {self.name}"

    def _content(self) -> Iterator[bytes]:
        yield self._images.tobytes()


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


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
        self._paths = ByteStrings.of(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._paths[index]))

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.channels, self.max_pixels)

    def encoded(self, index: int) -> bytes:
        with open(self.path(index), "rb", buffering=0) as file:
            return file.read()

    def member(self, index: int) -> bytes:
        return self._paths[index]

    def describe(self, index: int) -> str:
        return self.path(index)

    def _content(self) -> Iterator[bytes]:
        yield self._paths.blob
        yield self._paths.ends.tobytes()


class TarSource(Source):
    """Images inside plain tar files, read at their offsets.

    names: of the images below the split, in the order of `indexes` and `rows` (for each tar, which
    of its images). Reading is a `pread` without shared position, so that threads and forked
    processes may do it at once.
    """

    _HELD_OPEN = 256  # with more files than this each read opens its own: descriptors are few

    def __init__(
        self,
        name: str,
        indexes: Sequence[TarIndex],
        rows: Sequence[np.ndarray],
        names: ByteStrings,
        channels: int = 3,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        sides = [index.pack.get("shorter_side") for index in indexes]
        shrunk = sorted({side for side in sides if side is not None})
        if shrunk:
            partly = "" if all(sides) else "partly "
            name = f"{name} ({partly}shrunk to {', '.join(map(str, shrunk))})"
            self.shrunk_to = shrunk[0]
        super().__init__(name, channels, labels, classes)
        self._names = names
        self._tars = [index.path for index in indexes]
        self._tar = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
        pairs = list(zip(indexes, rows, strict=True))
        self._offsets = np.concatenate([index.offsets[chosen] for index, chosen in pairs])
        self._sizes = np.concatenate([index.sizes[chosen] for index, chosen in pairs])
        self._open: list[int] = []
        if len(self._tars) <= self._HELD_OPEN:
            self._open = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self._tars]
            weakref.finalize(self, _close, self._open)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.channels, self.max_pixels)

    def encoded(self, index: int) -> bytes:
        tar = int(self._tar[index])
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        if self._open:
            data = os.pread(self._open[tar], size, offset)
        else:
            with open(self._tars[tar], "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{self._tars[tar]} is shorter than when it was indexed")
        return data

    def member(self, index: int) -> bytes:
        return self._names[index]

    def describe(self, index: int) -> str:
        return f"{self._tars[int(self._tar[index])]}: {os.fsdecode(self._names[index])}"

    def _content(self) -> Iterator[bytes]:
        yield self._names.blob
        yield self._names.ends.tobytes()
        yield self._sizes.tobytes()
        yield str(self.shrunk_to).encode()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


# Opening


def open_source(
    data: str,
    split: str | None = None,
    channels: int | None = None,
    labelled: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """The source that `data` names.

    data: "fashion_mnist", "fashion_mnist:FOLDER" (IDX files, plain or .gz),
    "fashion_mnist_sample" (shipped: 10,000 and 2,000 images), a folder, a tar file, a folder of
    tar files, or a text file with one path a line. split: "train" or "val"; of a folder or tar,
    its (sub)folder of that name, or the tars whose names say so ("train" falls back on all of it).
    channels: 1 for Fashion-MNIST and 3 for files unless given. labelled: a folder must hold one
    folder per class, a tar the same or a .cls beside every image. max_pixels: images of more are
    unreadable. Raises UsageError for whatever is missing, misspelt or incomplete.
    """
    source = _open(data, split, channels, labelled)
    limit_pixels(source, max_pixels)
    return source


def limit_pixels(source: Source, max_pixels: int) -> None:
    """From now on images of `source` with more than `max_pixels` pixels are unreadable."""
    source.max_pixels = max_pixels
    allow_pixels(max_pixels)


def _open(data: str, split: str | None, channels: int | None, labelled: bool) -> Source:
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
        return _open_folder(data, path, split, channels, labelled)
    if path.is_file() and _TAR_NAME.search(path.name):
        return _open_tars(data, [path], split, channels, labelled)
    if path.is_file():
        if labelled:
            raise UsageError(f"{data} is a list of paths, which has no classes; give a folder")
        return _open_list(data, path, channels or 3)
    raise UsageError(_missing(data, path))


def open_splits(
    data: str, channels: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Source, Source]:
    """The labelled train and val splits of `data`. Raises UsageError where classes differ."""
    path = Path(data).expanduser()
    if path.is_dir() and not shards.tars_in(path):
        absent = [split for split in ("train", "val") if not (path / split).is_dir()]
        if absent:
            raise UsageError(
                f"{data} must hold the folders train and val, each with one folder per class; "
                f"it has no {' and no '.join(absent)}"
            )
    train = open_source(data, "train", channels, labelled=True, max_pixels=max_pixels)
    val = open_source(data, "val", channels, labelled=True, max_pixels=max_pixels)
    here, there = set(train.classes or ()), set(val.classes or ())
    if here != there:
        parts = [
            f"only in {split}: {_first(sorted(names))}"
            for split, names in (("train", here - there), ("val", there - here))
            if names
        ]
        raise UsageError(f"the classes of {data} differ between train and val; {'; '.join(parts)}")
    return train, val


def splits_of(data: str) -> tuple[str | None, ...]:
    """The splits that `data` is divided into; (None,) where it is not."""
    if data.partition(":")[0] in _NAMES:
        return "train", "val"
    path = Path(data).expanduser()
    if path.is_dir():
        found = [s for s in ("train", "val") if (path / s).is_dir() or shards.tars_in(path, s)]
    elif path.is_file() and _TAR_NAME.search(path.name):
        index = shards.open_index(path)
        found = [s for s in ("train", "val") if len(_rows(index, f"{s}/".encode()))]
    else:
        found = []
    return tuple(found) or (None,)


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


def _open_folder(
    data: str, path: Path, split: str | None, channels: int | None, labelled: bool
) -> Source:
    tars = shards.tars_in(path)
    if split is not None and (path / split).is_dir():
        path, split = path / split, None
        tars = shards.tars_in(path)
    elif split is not None and (named := shards.tars_in(path, split)):
        return _open_tars(data, named, None, channels, labelled)
    elif split == "val":
        if tars:
            return _open_tars(data, tars, split, channels, labelled)
        raise UsageError(f"{data} has no folder val; expected {path / split}")
    unknown: set[str] = set()
    paths = list(_scan(os.fsencode(path), b"", unknown, frozenset()))
    if not paths and tars:
        return _open_tars(data, tars, split, channels, labelled)
    if not paths:
        raise UsageError(_no_image(path, unknown))
    if not labelled:
        return FileSource(data, path, paths, channels or 3)
    classes = sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
    labels = _folder_labels(str(path), paths, classes)
    return FileSource(data, path, paths, channels or 3, labels, tuple(classes))


def _no_image(where: Path | str, unknown: Iterable[str]) -> str:
    seen = f"it holds files with the suffixes {_first(sorted(unknown))}" if unknown else ""
    return f"{where} holds no image" + (f"; {seen}, known are {' '.join(SUFFIXES)}" if seen else "")


def _folder_labels(where: str, paths: Sequence[bytes], classes: list[str]) -> np.ndarray:
    """The number of each path's first folder in `classes`: int64 [N]."""
    loose = [os.fsdecode(p) for p in paths if b"/" not in p]
    if loose:
        raise UsageError(
            f"{where} must hold one folder per class, but {len(loose):,} images lie outside of "
            f"any: {_first(loose)}"
        )
    number = {os.fsencode(name): label for label, name in enumerate(classes)}
    labels = np.array([number[p.split(b"/", 1)[0]] for p in paths], np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        names = _first([classes[label] for label in empty])
        raise UsageError(f"{where} has class folders without an image: {names}")
    return labels


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


# Tar files


def _open_tars(
    data: str, paths: Sequence[Path], split: str | None, channels: int | None, labelled: bool
) -> Source:
    """The images of tars, in their order; those below a folder `split` where there are any."""
    indexes = [shards.open_index(path) for path in paths]
    within = f"{split}/".encode() if split is not None else b""
    rows = [_rows(index, within) for index in indexes]
    if within and not any(len(chosen) for chosen in rows):
        if split == "val":
            tops = sorted({os.fsdecode(n.split(b"/")[0]) for i in indexes for n in i.names})
            raise UsageError(
                f"{data} has no folder val inside, only {_first(tops)}; expected members val/..., "
                "or a tar whose name says val"
            )
        within, rows = b"", [np.arange(len(index)) for index in indexes]
    pairs = list(zip(indexes, rows, strict=True))
    names = ByteStrings.of(i.names[row][len(within) :] for i, chosen in pairs for row in chosen)
    if not len(names):
        raise UsageError(_no_image(data, {suffix for i in indexes for suffix in i.others}))
    packed = {index.pack.get("channels") for index in indexes}
    channels = channels or (packed.pop() if packed in ({1}, {3}) else 3)
    labels, classes = None, None
    if labelled:
        said = [i.classes[row] for i, chosen in pairs for row in chosen]
        labels, classes = _tar_labels(data, names, said, _known_classes(indexes, within))
    return TarSource(data, indexes, rows, names, channels, labels, classes)


def _rows(index: TarIndex, within: bytes) -> np.ndarray:
    chosen = (row for row, name in enumerate(index.names) if name.startswith(within))
    return np.fromiter(chosen, np.int64)


def _known_classes(indexes: Sequence[TarIndex], within: bytes) -> list[str] | None:
    """The names of the classes that .cls members number, where all tars were packed with the same."""
    known = []
    for index in indexes:
        told = index.pack.get("splits", {})
        chosen = {within[:-1].decode(): told.get(within[:-1].decode(), {})} if within else told
        known += [split.get("classes") for split in chosen.values()] or [None]
    return known[0] if all(classes == known[0] for classes in known) else None


def _tar_labels(
    data: str, names: Sequence[bytes], said: list[bytes], known: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [N] and class names: from .cls members, where there are none from folders.

    known: class names by number, where the tar was packed here.
    """
    silent = sum(not text for text in said)
    if silent == len(said):
        folders = sorted({os.fsdecode(n.split(b"/", 1)[0]) for n in names if b"/" in n})
        return _folder_labels(data, names, folders), tuple(folders)
    if silent:
        where = next(os.fsdecode(n) for n, text in zip(names, said, strict=True) if not text)
        raise UsageError(
            f"{data} has no .cls beside {silent:,} of its {len(said):,} images, among them {where}"
        )
    distinct = sorted(set(said))
    if all(re.fullmatch(rb"[0-9]{1,9}", text) for text in distinct):
        distinct.sort(key=int)
        if known is not None and int(distinct[-1]) < len(known):
            return np.array([int(text) for text in said], np.int64), tuple(known)
    number = {text: label for label, text in enumerate(distinct)}
    classes = tuple(text.decode("utf-8", "replace") for text in distinct)
    return np.array([number[text] for text in said], np.int64), classes


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
