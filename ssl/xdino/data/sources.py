"""Where images come from: folders, lists of paths, tar shards, and Fashion-MNIST's IDX files.

A source is a numbered row of images. It knows names and labels and reads one image at a time;
order, crops and batches are `loader`'s business. A source is complete or refused: a missing file or
a truncated archive is an error with the mend in it, never a smaller data set.

What counts as an image, everywhere: a regular file with one of `images.SUFFIXES`, or one without
any suffix whose first bytes are an image's. The rest is counted by suffix (`Source.left_out`) and
told in a sentence (`Source.notices`); hidden files and what systems leave behind (@eaDir,
Thumbs.db) are not mentioned. Classes are in one order everywhere (`class_order`).

Which part of the data is train: what a folder, a tar's name or a folder inside a tar calls so. A
class may be called "train" too, so the name counts only where nothing else would be lost by it; and
what calls itself val or test is never trained on, unless it is itself what was asked for.
"""

import abc
import gzip
import hashlib
import io
import math
import os
import posixpath
import re
import resource
import stat
import struct
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np
from PIL import Image

from xdino.config import MAX_PIXELS
from xdino.data.decode import HEAD, SUFFIXES, allow_pixels, decode, recognised
from xdino.data.tars import (
    ByteStrings,
    TarIndex,
    count_suffix,
    is_hidden,
    open_index,
    printable,
    split_said,
    tars_in,
)
from xdino.errors import UsageError, asked, nearest

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
_TAR_NAME = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)
_NAMES = ("fashion_mnist", "fashion_mnist_sample")
_HELD_OUT = ("val", "valid", "validation", "test", "testing", "eval")  # names of folders
_SAMPLED, _PIECE = 64, 1 << 16  # images whose first and last bytes a fingerprint reads
_RAW_HELD_OUT = {name.encode() for name in _HELD_OUT}
_RAW_SUFFIXES = {suffix.encode() for suffix in SUFFIXES}


class Source(abc.ABC):
    """N images. `labels`: int64 [N] indices into `classes`, or None.

    `batch_reads` is how many images make one task of a worker: few where reading one takes
    milliseconds, many where handing over a task costs as much as the image.
    left_out: how many files were not taken for images, by suffix.
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
        self.name, self.channels = printable(os.fsencode(name)), channels
        self.labels, self.classes = labels, classes
        self.left_out: dict[str, int] = {}
        self.remarks: list[str] = []

    def notices(self) -> list[str]:
        """What a person should hear once about what was read: sentences, none as a rule."""
        told = list(self.remarks)
        if self.left_out:
            most_first = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
            parts = _first([f"{suffix} ({count:,})" for suffix, count in most_first], 8)
            count = sum(self.left_out.values())
            files = f"{count:,} files" if count > 1 else "1 file"
            told.append(
                f"{files} of {self.name} left out, for want of the suffix of an image that can be "
                f"read: {parts}"
            )
        return told

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
        """How a person finds image `index`: its path, or its number in the file that holds it.

        In letters that can be printed and written anywhere; `FileSource.path` opens files.
        """

    @abc.abstractmethod
    def _content(self) -> Iterator[bytes]:
        """What tells this source from another, wherever it lies, for `fingerprint`."""

    def stamps(self) -> bytes:
        """Names, sizes and times of change; of arrays their content. Changes with any of the files.

        Unlike a fingerprint it also changes when equal files are written again.
        """
        return b"\0".join(self._content())

    def _piece(self, index: int) -> bytes:
        """The first and the last bytes of what image `index` is stored as."""
        data = self.encoded(index)
        return data[:_PIECE] + data[-_PIECE:]


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits: the same for the same images, names and labels on any machine.

    Files count by their names below the folder that they share, by their sizes, and by the
    beginnings and ends of a sample of them. Where they lie, and when they were written, is nothing.
    """
    digest = hashlib.blake2b(str(len(source)).encode(), digest_size=8)
    for part in source._content():
        digest.update(part)
    if source.labels is not None:
        digest.update(source.labels.tobytes())
        digest.update("\0".join(source.classes or ()).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _described(source: Source, names: ByteStrings, sizes: np.ndarray) -> Iterator[bytes]:
    """Names, sizes and a sample of the contents of stored images, for `fingerprint`."""
    shared = _shared_folder(names)
    told = hashlib.blake2b(b"\0".join(name[shared:] for name in names), digest_size=32)
    told.update(np.ascontiguousarray(sizes, np.dtype("<i8")).tobytes())
    yield told.digest()
    # What is sampled follows from names and sizes, so that it is the same on any machine.
    draws = np.random.Philox(key=int.from_bytes(told.digest()[:16], "little"))
    chosen = np.arange(len(names))
    if len(names) > _SAMPLED:
        chosen = np.unique(draws.random_raw(_SAMPLED) % np.uint64(len(names)))
    for index in chosen.tolist():
        try:
            yield source._piece(index)
        except OSError:
            yield b"unreadable"


def _shared_folder(names: ByteStrings) -> int:
    """The length of the folders, with their last slash, that all names start with."""
    if not len(names):
        return 0
    first, last = min(names), max(names)  # what these two start with, all do
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first.rfind(b"/", 0, sum(1 for _ in same)) + 1


def class_order(names: Iterable[str]) -> list[str]:
    """The order that classes are numbered in: by value where all are numbers, else as text."""
    names = list(names)
    if all(re.fullmatch("[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


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

    def stamps(self) -> bytes:
        digest = hashlib.blake2b(self._images.tobytes(), digest_size=32)
        return str(self._images.shape).encode() + digest.digest()


def _facts_of(path: str | Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class FileSource(Source):
    """Image files: paths relative to `root`, kept as one run of bytes (1.28 million are 50 MB).

    facts: int64 [N, 2], size in bytes and time of change in nanoseconds of each, -1 where there is
    no such file; looked up when they are needed, unless given. listed: the files are named one by
    one, and not found in folders.
    """

    listed = False

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[bytes],
        channels: int = 3,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        facts: np.ndarray | None = None,
    ) -> None:
        super().__init__(name, channels, labels, classes)
        self._root = os.fsencode(root)
        self._paths = paths if isinstance(paths, ByteStrings) else ByteStrings.of(paths)
        if facts is not None:
            self._facts = facts

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._paths[index]))

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.channels, self.max_pixels)

    def encoded(self, index: int) -> bytes:
        descriptor, size = self._open(index)
        try:
            most = (1 << 28) + 16 * self.max_pixels  # more than any format needs for them
            if size > most:
                raise OSError(f"{size:,} bytes are more than {self.max_pixels:,} pixels need")
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)

    def _open(self, index: int) -> tuple[int, int]:
        """Descriptor and size. Pipes and devices are not opened: they may wait, or act."""
        path = self.path(index)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return descriptor, os.fstat(descriptor).st_size

    def _piece(self, index: int) -> bytes:
        descriptor, size = self._open(index)
        try:
            end = os.pread(descriptor, _PIECE, max(0, size - _PIECE))
            return os.pread(descriptor, _PIECE, 0) + end
        finally:
            os.close(descriptor)

    def member(self, index: int) -> bytes:
        return self._paths[index]

    def describe(self, index: int) -> str:
        return printable(os.path.join(self._root, self._paths[index]))

    @cached_property
    def _facts(self) -> np.ndarray:
        return np.array([_facts_of(self.path(i)) for i in range(len(self))], np.int64)

    def _content(self) -> Iterator[bytes]:
        return _described(self, self._below_root, self._facts[:, 0])

    @property
    def _below_root(self) -> ByteStrings:
        """The paths without "./", "..", doubled slashes, and whether they were written in full."""
        odd = (b"/", b"./", b"../"), (b"//", b"/./", b"/../")
        if not any(path.startswith(odd[0]) for path in self._paths) and not any(
            part in self._paths.blob for part in odd[1]
        ):
            return self._paths
        return ByteStrings.of(
            posixpath.normpath(os.path.join(os.path.abspath(self._root), path))
            for path in self._paths
        )

    def stamps(self) -> bytes:
        return self._paths.blob + self._paths.ends.tobytes() + self._facts.tobytes()


class TarSource(Source):
    """Images inside plain tar files, read at their offsets.

    names: of the images below the split, in the order of `indexes` and `rows` (for each tar, which
    of its images). Reading is a `pread` without shared position, so that threads and forked
    processes may do it at once.
    """

    _HELD_OPEN = 256  # with more files than this each read opens its own: descriptors are few
    _PART = 4  # of the descriptors that the process may have, this part at most is held

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
        for index in indexes:
            for suffix, count in index.others.items():
                self.left_out[suffix] = self.left_out.get(suffix, 0) + count
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        allowed = self._HELD_OPEN if allowed == resource.RLIM_INFINITY else allowed // self._PART
        self._open: list[int] = []
        if len(self._tars) <= min(self._HELD_OPEN, allowed):
            weakref.finalize(self, _close, self._open)
            for path in self._tars:
                self._open.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.channels, self.max_pixels)

    def encoded(self, index: int) -> bytes:
        size = int(self._sizes[index])
        if size > (1 << 28) + 16 * self.max_pixels:
            raise OSError(f"{size:,} bytes are more than {self.max_pixels:,} pixels need")
        return self._bytes(index, 0, size)

    def _bytes(self, index: int, start: int, size: int) -> bytes:
        tar, offset = int(self._tar[index]), int(self._offsets[index]) + start
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
        tar = os.fsencode(self._tars[int(self._tar[index])])
        return f"{printable(tar)}: {printable(self._names[index])}"

    def _piece(self, index: int) -> bytes:
        size = int(self._sizes[index])
        last = min(size, _PIECE)
        return self._bytes(index, 0, last) + self._bytes(index, size - last, last)

    def _content(self) -> Iterator[bytes]:
        yield str(self.shrunk_to).encode()
        yield from _described(self, self._names, self._sizes)

    def stamps(self) -> bytes:
        facts = np.array([_facts_of(path) for path in self._tars], np.int64)
        names = self._names.blob + self._names.ends.tobytes()
        return names + self._sizes.tobytes() + self._offsets.tobytes() + facts.tobytes()


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
    its (sub)folder of that name, or the tars whose names say so ("train" falls back on what does
    not call itself val or test). channels: 1 for Fashion-MNIST and 3 for files unless given.
    labelled: a folder must hold one folder per class, a tar the same or a .cls beside every image.
    max_pixels: images of more are unreadable. Raises UsageError for whatever is missing, misspelt
    or incomplete.
    """
    with asked(f"{shortened(data)} cannot be read"):
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
        folder = Path(__file__).parents[1] / "assets" / "fashion_mnist_sample"
        return _open_idx(data, folder, split or "train", split or "train", channels)
    path = Path(data).expanduser()
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(_missing(data, path)) from None
    if stat.S_ISDIR(mode):
        return _open_folder(data, path, split, channels, labelled)
    if not stat.S_ISREG(mode):
        raise UsageError(f"{data} is neither a folder nor a regular file")
    if _TAR_NAME.search(path.name):
        return _open_tars(data, [path], split, channels, labelled)
    if labelled:
        raise UsageError(f"{data} is a list of paths, which has no classes; give a folder")
    return _open_list(data, path, channels or 3)


def open_splits(
    data: str, channels: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Source, Source]:
    """The labelled train and val splits of `data`, with the same classes in the same order.

    Raises UsageError where classes differ.
    """
    with asked(f"{shortened(data)} cannot be read"):
        path = Path(data).expanduser()
        if path.is_dir() and not tars_in(path):
            absent = [split for split in ("train", "val") if not (path / split).is_dir()]
            if absent:
                raise UsageError(
                    f"{data} must hold the folders train and val, each with one folder per class; "
                    f"it has no {' and no '.join(absent)}"
                )
    train = open_source(data, "train", channels, labelled=True, max_pixels=max_pixels)
    val = open_source(data, "val", channels, labelled=True, max_pixels=max_pixels)
    _number_alike(data, train, val)
    return train, val


def _number_alike(data: str, train: Source, val: Source) -> None:
    """Give val's classes the numbers that they have in train."""
    ours, theirs = train.classes or (), val.classes or ()
    if ours == theirs:
        return
    here, there = set(ours), set(theirs)
    if here != there:
        parts = [
            f"only in {split}: {_first(class_order(names))}"
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


def splits_of(data: str) -> tuple[str | None, ...]:
    """The splits that `data` is divided into; (None,) where it is not."""
    if data.partition(":")[0] in _NAMES:
        return "train", "val"
    with asked(f"{shortened(data)} cannot be read"):
        path = Path(data).expanduser()
        found: list[str] = []
        if path.is_dir():
            found = [split for split in ("train", "val") if _is_split(path, split)]
            if found == ["val"] and _beside(path):
                found = ["train", "val"]
            tars = tars_in(path)
            if not found and not _holds_images(path):
                said = ["val"] if "val" in map(split_said, tars) else []
                train = [tar for tar in tars if split_said(tar) == "train"]
                chosen = _train_tars(tars, []) if said or len(train) == len(tars) else []
                found = ["train"] * bool(chosen) + said
        elif path.is_file() and _TAR_NAME.search(path.name):
            index = open_index(path)
            found = [split for split in ("train", "val") if _within([index], split)]
            if found == ["val"] and len(_rows(index, b"", True, [])):
                found = ["train", "val"]
    return tuple(found) or (None,)


def _missing(data: str, path: Path) -> str:
    """One sentence about a `data` that is neither a name, a folder nor a file."""
    if path.is_symlink():
        return f"{data} is a link to {os.readlink(path)}, which does not exist"
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = [entry.name for entry in os.scandir(parent)]
    if parent.is_dir() and path.is_file():
        return f"{data} does not exist: {path} is a file, not a folder"
    if len(Path(data).parts) == 1 and not data.startswith("~"):
        return (
            f'there is no data set or folder called "{data}"; '
            + nearest(data, [*_NAMES, *siblings])
            + f" (data sets: {', '.join(_NAMES)}; else a folder or a list of paths)"
        )
    hint = nearest(path.name, siblings)
    where = f"{data} does not exist: {parent} has no {path.name}"
    return where + (f"; {hint}" if hint.startswith("did you") else "")


def _first(names: Sequence[str], count: int = 5) -> str:
    """`a, b, c and 7 more`."""
    rest = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


# Which part is train


def _is_split(path: Path, split: str) -> bool:
    """Whether the folder `path`/`split` is a part of the data, and not a class of that name.

    val always is. train is, where val lies beside it or no other images do, but for more parts; it
    is too where it holds folders only, as a part does, and a class does not.
    """
    folder = path / split
    if not folder.is_dir():
        return False
    if split == "val" or (path / "val").is_dir() or not _beside(path):
        return True
    return not _loose(folder)


def _beside(path: Path) -> list[str]:
    """What holds images beside the folder train, and is no other part by its name."""
    parts = {"train", "unlabeled", "unlabelled", *_HELD_OUT}
    folders = [f for f in _folders(path) if f.name.lower() not in parts and _holds_images(f)]
    return sorted(map(printable, [*_loose(path), *(os.fsencode(f.name) for f in folders)]))


def _loose(path: Path) -> list[bytes]:
    """The names of images that lie directly in a folder."""
    folder = os.fsencode(path)
    return [
        name
        for name, status in _listed(folder)
        if not (status is not None and stat.S_ISDIR(status.st_mode))
        and _is_image(folder, name, status, {})
    ]


def _folders(path: Path) -> list[Path]:
    return [f for f in path.iterdir() if not is_hidden(os.fsencode(f.name)) and f.is_dir()]


def _holds_images(path: Path) -> bool:
    return next(_scan(os.fsencode(path), {}), None) is not None


def _train_tars(tars: Sequence[Path], remarks: list[str]) -> list[Path]:
    """Those of `tars` to train on: what says train, or where that is unclear, what is not held out."""
    said = {split: [tar for tar in tars if split_said(tar) == split] for split in ("train", "val")}
    rest = [tar for tar in tars if split_said(tar) is None]
    if said["train"] and (said["val"] or not rest):
        chosen = said["train"]
    else:
        chosen = [tar for tar in tars if split_said(tar) in (None, "train")]
    left = [tar.name for tar in tars if tar not in chosen]
    if left:
        tars_said = f"{len(chosen):,} tars" if len(chosen) != 1 else "1 tar"
        remarks.append(f"train is {tars_said}, without {_first(left)}")
    return chosen


def _within(indexes: Sequence[TarIndex], split: str) -> bytes:
    """`b"train/"` where the folder of that name inside tars is a part of them, b"" where not.

    By the same rule as `_is_split`.
    """
    folders = {name.rpartition(b"/")[0] for index in indexes for name in index.names}
    tops = {folder.split(b"/", 1)[0] for folder in folders}
    asked_for = split.encode()
    if asked_for not in tops:
        return b""
    beside = tops - {part.encode() for part in (split, "unlabeled", "unlabelled", *_HELD_OUT)}
    clear = split == "val" or b"val" in tops or not beside or asked_for not in folders
    return asked_for + b"/" if clear else b""


# Folders and lists


def _open_folder(
    data: str, path: Path, split: str | None, channels: int | None, labelled: bool
) -> Source:
    tars, remarks = tars_in(path), []  # type: list[Path], list[str]
    if split is None:
        return _open_whole(data, path, [], channels, labelled)
    if _is_split(path, split):
        source = _open_whole(data, path / split, [], channels, labelled)
        if split == "train" and not (path / "val").is_dir() and (others := _beside(path)):
            remarks.append(f"train is {path / split}, without the images of {_first(others)}")
    elif split == "val":
        named = [tar for tar in tars if split_said(tar) == "val"]
        if not tars:
            raise UsageError(f"{data} has no folder val; expected {path / split}")
        source = _open_tars(data, named or tars, None if named else split, channels, labelled)
    elif tars and not _holds_images(path):
        chosen = _train_tars(tars, remarks)
        if not chosen:
            raise UsageError(f"{data} has nothing to train on but {_first([t.name for t in tars])}")
        source = _open_tars(data, chosen, split, channels, labelled)
    else:
        held = [f.name for f in _folders(path) if f.name.lower() in _HELD_OUT and _holds_images(f)]
        if held:
            remarks.append(f"train is {data} without {_first(sorted(held))}")
        if (path / "train").is_dir():
            remarks.append(f"train is taken for one of the classes of {data}")
        source = _open_whole(data, path, held, channels, labelled)
    source.remarks += remarks
    return source


def _open_whole(
    data: str, path: Path, but: Sequence[str], channels: int | None, labelled: bool
) -> Source:
    """All images below `path`, but for some of its folders; of all its tars where there is none."""
    left_out: dict[str, int] = {}
    facts = array("q")

    def listed() -> Iterator[bytes]:
        for name, size, changed in _scan(os.fsencode(path), left_out, but):
            facts.extend((size, changed))
            yield name

    paths = ByteStrings.of(listed())
    if not len(paths) and but:
        raise UsageError(f"{data} has nothing to train on but {_first(sorted(but))}")
    if not len(paths) and (tars := tars_in(path)):
        return _open_tars(data, tars, None, channels, labelled)
    if not len(paths):
        raise UsageError(_no_image(path, left_out))
    labels, classes = None, None
    if labelled:
        folders = [os.fsencode(f.name) for f in _folders(path) if f.name not in but]
        labels, classes = _folder_labels(str(path), paths, folders)
    table = np.frombuffer(facts, np.int64).reshape(-1, 2)
    source = FileSource(data, path, paths, channels or 3, labels, classes, table)
    source.left_out = left_out
    return source


def _no_image(where: Path | str, unknown: Iterable[str]) -> str:
    seen = f"it holds files with the suffixes {_first(sorted(unknown))}" if unknown else ""
    return f"{where} holds no image" + (f"; {seen}, known are {' '.join(SUFFIXES)}" if seen else "")


def _folder_labels(
    where: str, paths: ByteStrings, folders: Iterable[bytes]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of each path's first folder, int64 [N], and the folders' names in order."""
    loose = [printable(p) for p in paths if b"/" not in p]
    if loose:
        raise UsageError(
            f"{where} must hold one folder per class, but {len(loose):,} images lie outside of "
            f"any: {_first(loose)}"
        )
    raw = {printable(folder): folder for folder in folders}
    classes = class_order(raw)
    number = {raw[name]: label for label, name in enumerate(classes)}
    labels = np.array([number[p.split(b"/", 1)[0]] for p in paths], np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        names = _first([classes[label] for label in empty])
        raise UsageError(f"{where} has class folders without an image: {names}")
    return labels, tuple(classes)


_Listing = list[tuple[bytes, os.stat_result | None]]


def _scan(
    root: bytes, left_out: dict[str, int], but: Sequence[str] = ()
) -> Iterator[tuple[bytes, int, int]]:
    """(path, size, time of change) of the images below `root`, sorted folder by folder.

    Paths are relative to it. Linked folders are followed, except into a folder that is being
    listed. but: folders directly in `root` that are skipped. Other files are put into `left_out`.
    """
    skipped = {os.fsencode(name) for name in but}
    top: _Listing = [(b"", os.stat(root))]
    stack = [(b"", frozenset[tuple[int, int]](), iter(top))]
    while stack:
        below, above, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        name, status = entry
        path = below + name
        if status is None:
            if _is_image(root, path, status, left_out):
                yield path, -1, -1
        elif stat.S_ISDIR(status.st_mode):
            identity = (status.st_dev, status.st_ino)
            if identity not in above and path not in skipped:
                inner = _listed(os.path.join(root, path))
                stack.append((path and path + b"/", above | {identity}, iter(inner)))
        elif _is_image(root, path, status, left_out):
            yield path, status.st_size, status.st_mtime_ns


def _listed(folder: bytes) -> _Listing:
    """What is in a folder, sorted by name, each with its target's status; None without a target."""
    with asked(f"{printable(folder)} cannot be listed"), os.scandir(folder) as entries:
        return sorted(
            ((e.name, _status(e)) for e in entries if not is_hidden(e.name)), key=lambda e: e[0]
        )


def _status(entry: os.DirEntry[bytes]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _is_image(
    folder: bytes, path: bytes, status: os.stat_result | None, left_out: dict[str, int]
) -> bool:
    """Whether a file counts as an image. What a link without a target is called decides, too."""
    suffix = os.path.splitext(path)[1].lower()
    if status is not None and not stat.S_ISREG(status.st_mode):
        count_suffix(left_out, "no regular file")
    elif suffix in _RAW_SUFFIXES:
        return True
    elif suffix or status is None or not _recognised(os.path.join(folder, path)):
        count_suffix(left_out, printable(suffix))
    else:
        return True
    return False


def _recognised(path: bytes) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return recognised(file.read(HEAD)) is not None
    except OSError:
        return False


# What is given instead of a list of paths: how the file starts, and what it is.
_NO_LIST = [
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PK\x05\x06", "a zip archive; unpack it"),
    (b"\x1f\x8b", "compressed by gzip; gunzip it"),
    (b"BZh", "compressed by bzip2; bunzip2 it"),
    (b"\xfd7zXZ", "compressed by xz; unxz it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unzstd it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"PAR1", "a Parquet file; write its images into a folder"),
    (b"\x89HDF", "an HDF5 file; write its images into a folder"),
    (b"%PDF", "a PDF document; write its images into a folder"),
]
_LONGEST_LIST = 1 << 31  # bytes


def _open_list(data: str, path: Path, channels: int) -> Source:
    text = _list_text(data, path)
    root = path.parent
    lines = [line.strip() for line in text.splitlines()]
    paths = [line for line in lines if line and not line.startswith(b"#")]
    if not paths:
        raise UsageError(f"{data} names no image; expected one path a line")
    base = os.fsencode(root)
    facts, missing = [], []
    for name in paths:
        try:
            found = os.stat(os.path.join(base, name))
            regular = stat.S_ISREG(found.st_mode)
        except (OSError, ValueError):  # ValueError: a zero byte
            regular = False
        if regular:
            facts.append((found.st_size, found.st_mtime_ns))
        else:
            missing.append(printable(name))
    if missing:
        raise UsageError(
            f"{len(missing):,} of the {len(paths):,} files listed in {data} do not exist, cannot be "
            f"reached or are no regular files: {_first([shortened(name) for name in missing])} "
            f"(relative paths start at {root})"
        )
    source = FileSource(data, root, paths, channels, facts=np.array(facts, np.int64))
    source.listed = True
    return source


def _list_text(data: str, path: Path) -> bytes:
    """A list of paths as UTF-8, or whatever bytes its names have."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        if path.suffix.lower() in SUFFIXES or recognised(head[:HEAD]):
            raise UsageError(
                f"{data} is one image; give a folder, or a text file with one path a line"
            )
        for start, what in _NO_LIST:
            if head.startswith(start):
                raise UsageError(f"{data} is no list of paths, but {what}")
        if head[257:262] == b"ustar":
            raise UsageError(f"{data} is a tar file, but not called so: its name must end in .tar")
        wide = head[:2] in (b"\xff\xfe", b"\xfe\xff")
        if (b"\0" in head and not wide) or os.fstat(file.fileno()).st_size > _LONGEST_LIST:
            raise UsageError(
                f"{data} is no list of paths: expected a folder, a tar file, or a text file with "
                "one path a line"
            )
        text = head + file.read()
    if wide:  # as Windows writes it
        try:
            text = text.decode("utf-16").encode("utf-8", "surrogateescape")
        except ValueError as error:
            raise UsageError(f"{data} is no list of paths: {error}") from error
    return text.removeprefix(b"\xef\xbb\xbf")


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


# Tar files


def _open_tars(
    data: str, paths: Sequence[Path], split: str | None, channels: int | None, labelled: bool
) -> Source:
    """The images of tars, in their order; those below a folder `split` where that is a part."""
    indexes = [open_index(path) for path in paths]
    within = _within(indexes, split) if split is not None else b""
    held: list[str] = []
    if split == "val" and not within and any(map(len, indexes)):
        tops = sorted({printable(n.split(b"/")[0]) for i in indexes for n in i.names})
        raise UsageError(
            f"{data} has no folder val inside, only {_first(tops)}; expected members val/..., "
            "or a folder with a tar whose name says val"
        )
    rows = [_rows(index, within, split == "train" and not within, held) for index in indexes]
    pairs = list(zip(indexes, rows, strict=True))
    names = ByteStrings.of(i.names[row][len(within) :] for i, chosen in pairs for row in chosen)
    if not len(names) and held:
        raise UsageError(f"{data} has nothing to train on but {_first(held)}")
    if not len(names):
        raise UsageError(_no_image(data, {suffix for i in indexes for suffix in i.others}))
    packed = {index.pack.get("channels") for index in indexes}
    channels = channels or (packed.pop() if packed in ({1}, {3}) else 3)
    labels, classes = None, None
    if labelled:
        said = [i.classes[row] for i, chosen in pairs for row in chosen]
        labels, classes = _tar_labels(data, names, said, _known_classes(indexes, within))
    source = TarSource(data, indexes, rows, names, channels, labels, classes)
    if held:
        source.remarks.append(f"train is {data} without {_first(held)}")
    return source


def _rows(index: TarIndex, within: bytes, train: bool, held: list[str]) -> np.ndarray:
    """Which images lie below `within`; of what is to train on, those that are not held out."""
    chosen = []
    for row, name in enumerate(index.names):
        top = name.split(b"/", 1)[0].lower() if train and b"/" in name else b""
        if top in _RAW_HELD_OUT:
            if top.decode() not in held:
                held.append(top.decode())
        elif name.startswith(within):
            chosen.append(row)
    return np.array(chosen, np.int64)


def _known_classes(indexes: Sequence[TarIndex], within: bytes) -> list[str] | None:
    """The names of the classes that .cls members number, where all tars were packed with the same."""
    known = []
    for index in indexes:
        told = index.pack.get("splits", {})
        chosen = {within[:-1].decode(): told.get(within[:-1].decode(), {})} if within else told
        known += [split.get("classes") for split in chosen.values()] or [None]
    return known[0] if all(classes == known[0] for classes in known) else None


def _tar_labels(
    data: str, names: ByteStrings, said: list[bytes], known: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [N] and class names: from .cls members, where there are none from folders.

    known: class names by number, where the tar was packed here.
    """
    silent = sum(not text for text in said)
    if silent == len(said):
        return _folder_labels(data, names, {n.split(b"/", 1)[0] for n in names if b"/" in n})
    if silent:
        where = next(printable(n) for n, text in zip(names, said, strict=True) if not text)
        raise UsageError(
            f"{data} has no .cls beside {silent:,} of its {len(said):,} images, among them {where}"
        )
    distinct = {text: printable(text) for text in set(said)}
    if known is not None and all(re.fullmatch(rb"[0-9]{1,9}", text) for text in distinct):
        labels = np.array([int(text) for text in said], np.int64)
        if labels.max() < len(known):
            return labels, tuple(known)
    classes = class_order(distinct.values())
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[distinct[text]] for text in said], np.int64), tuple(classes)


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
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _parse_idx(path, file.read, rank)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read whole ({error}); fetch it again") from error


def _parse_idx(path: Path, read: Callable[[int], bytes], rank: int) -> np.ndarray:
    header = read(4 + 4 * rank)
    if len(header) < 4 + 4 * rank or header[:4] != bytes([0, 0, 8, rank]):
        raise UsageError(f"{path} is no IDX file of bytes with {rank} dimensions")
    shape = struct.unpack_from(f">{rank}I", header, 4)
    expected = math.prod(shape)
    # In pieces, so that memory follows what is there and not what a header announces. A bytearray,
    # because torch warns about arrays that cannot be written.
    content = bytearray()
    while len(content) <= expected and (piece := read(1 << 20)):
        content += piece
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(header) + len(content):,} bytes"
        raise UsageError(
            f"{path} holds {found} where its header announces {len(header) + expected:,} bytes; "
            "fetch it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
