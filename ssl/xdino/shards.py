"""Plain tar files as rows of images: where each member lies, read once from the headers.

Many small files are slow to list and to copy; WebDataset's shards are tar files with one sample a
run of consecutive members of the same name up to the first dot: `n01/0.jpg`, `n01/0.cls`. An
uncompressed tar holds every member in one piece, so an index of offsets turns it into random
access. The index is kept beside the file (`.NAME.index.npz`) where that can be written, and made
anew when the file's size or time changes.

Nothing is ever extracted. A member's name is a label here and never a path, so that a member
"../../x.jpg" can reach no place outside. A tar is complete or refused, as every source.
"""

import contextlib
import json
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xdino.errors import RunFailed, UsageError
from xdino.files import written_beside
from xdino.images import SUFFIXES

#: The member in which `xdino pack` says how a tar was made, JSON. WebDataset's readers skip names
#: with two underscores at both ends.
PACK_MEMBER = "__xdino_pack__"

_VERSION = 1  # of the kept index
_BLOCK = 512  # a tar's unit
_SMALL = 1 << 20  # bytes of a .cls or of the pack's member, at most
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_SPLIT_WORDS = {"train": "train(ing)?", "val": "val(id|idation)?"}


class ByteStrings(Sequence[bytes]):
    """Many short strings as one run of bytes: 1.28 million paths are 50 MB, not 150."""

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends  # int64 [N + 1], from 0

    @classmethod
    def of(cls, parts: Iterable[bytes]) -> "ByteStrings":
        blob, ends = bytearray(), [0]
        for part in parts:
            blob += part
            ends.append(len(blob))
        return cls(bytes(blob), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return self.blob[self.ends[index] : self.ends[index + 1]]


@dataclass(frozen=True)
class TarIndex:
    """The N images of one tar, in its order.

    names: as the tar has them, a leading "./" left out. offsets, sizes: int64 [N], in bytes.
    classes: what the sample's .cls holds, b"" without one. pack: what `xdino pack` wrote, {} in
    tars of others. others: suffixes of members that are no images.
    """

    path: Path
    names: ByteStrings
    offsets: np.ndarray
    sizes: np.ndarray
    classes: ByteStrings
    pack: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def tars_in(folder: Path, split: str | None = None) -> list[Path]:
    """The tar files directly in `folder`, sorted; of a split, those whose names say so.

    "train-0001.tar" and "imagenet1k-validation-00.tar" say so.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".tar" and not path.name.startswith(".") and path.is_file()
    )
    if split is None:
        return found
    says = re.compile(rf"(.*[-_.])?{_SPLIT_WORDS[split]}[-_.]", re.IGNORECASE)
    return [path for path in found if says.match(path.name)]


def open_index(path: Path) -> TarIndex:
    """The index of a tar, kept or made now.

    Raises:
        UsageError: it cannot be read, is no tar, compressed, cut short, or unclear about what is
            an image of it.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no ordinary file; an index of offsets needs one")
        index = _kept(path, status)
        if index is None:
            index = _scan(path)
            _keep(index, status)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    return index


# Reading headers


def _scan(path: Path) -> TarIndex:
    with open(path, "rb") as file:
        start = file.read(8)
        for magic, command in _COMPRESSED.items():
            if start.startswith(magic):
                raise UsageError(
                    f"{path} is compressed, which allows no random access: {command} it first"
                )
        if not start:
            raise UsageError(f"{path} is empty; expected a tar file")
        file.seek(0)
        samples = _Samples(path, file.fileno())
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # tarfile keeps them all, a kilobyte for each image.
                    tar.members.clear()  # type: ignore[attr-defined]
                    samples.add(member)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            if not samples.members:
                raise UsageError(f"{path} is no tar file ({error})") from error
            raise UsageError(_cut_short(path, samples, str(error))) from error
        # tarfile takes a damaged header, and a file that ends between two members, for the end.
        mark = os.pread(file.fileno(), _BLOCK, end)
        if len(mark) < _BLOCK or any(mark):
            what = "a damaged header" if any(mark) else "the end mark is missing"
            raise UsageError(_cut_short(path, samples, f"{what} at byte {end:,}"))
        return samples.index()


def _cut_short(path: Path, samples: "_Samples", why: str) -> str:
    return (
        f"{path} is damaged or cut short after {samples.members:,} members, the last "
        f"{samples.last} ({why}); copy or make it again"
    )


class _Samples:
    """Members as they come -> images; consecutive members of one stem share a .cls."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.members, self.last = 0, ""
        self._names, self._classes = [], []  # type: list[bytes], list[bytes]
        self._offsets, self._sizes = [], []  # type: list[int], list[int]
        self._pack: dict[str, Any] = {}
        self._others: set[str] = set()
        self._stem: str | None = None
        self._images: list[tuple[bytes, int, int]] = []
        self._class, self._described = b"", False

    def add(self, member: tarfile.TarInfo) -> None:
        self.members, self.last = self.members + 1, member.name
        name = member.name.removeprefix("./").lstrip("/")
        parts = name.split("/")
        if member.isdir() or any(p.startswith(".") and p not in (".", "..") for p in parts):
            return  # hidden names: macOS leaves "._photo.jpg" beside photos
        image = name.lower().endswith(SUFFIXES)
        if not member.isreg() or member.issparse():
            if image:
                raise UsageError(
                    f"{self.path} holds {name} as a link or in pieces, not whole; make it again "
                    "with tar --dereference --hard-dereference"
                )
            return
        if name == PACK_MEMBER:
            self._pack = _parse_pack(self.path, self._content(member))
            return
        stem = "/".join([*parts[:-1], parts[-1].partition(".")[0]])
        if stem != self._stem:
            self._flush()
            self._stem = stem
        suffix = os.path.splitext(name)[1].lower()
        if image:
            raw = name.encode("utf-8", "surrogateescape")
            self._images.append((raw, member.offset_data, member.size))
        elif suffix == ".cls":
            self._class, self._described = self._content(member).strip(), True
        elif suffix == ".json":
            self._described = True
        else:
            self._others.add(suffix or "none")

    def _content(self, member: tarfile.TarInfo) -> bytes:
        if member.size > _SMALL:
            raise UsageError(
                f"{self.path}: {member.name} has {member.size:,} bytes; expected a few"
            )
        return os.pread(self._descriptor, member.size, member.offset_data)

    def _flush(self) -> None:
        if len(self._images) > 1 and self._described:
            names = " and ".join(os.fsdecode(name) for name, _, _ in self._images[:2])
            raise UsageError(
                f"{self.path} holds several images in the sample {self._stem} ({names}), so that "
                "it is unclear which is meant; write shards with one image a sample"
            )
        for name, offset, size in self._images:
            self._names.append(name)
            self._offsets.append(offset)
            self._sizes.append(size)
            self._classes.append(self._class)
        self._images, self._class, self._described = [], b"", False

    def index(self) -> TarIndex:
        self._flush()
        return TarIndex(
            self.path,
            ByteStrings.of(self._names),
            np.array(self._offsets, np.int64),
            np.array(self._sizes, np.int64),
            ByteStrings.of(self._classes),
            self._pack,
            tuple(sorted(self._others)),
        )


def _parse_pack(path: Path, text: bytes) -> dict[str, Any]:
    try:
        pack = json.loads(text)
    except ValueError:
        pack = None
    if not isinstance(pack, dict):
        raise UsageError(f"{path}: its member {PACK_MEMBER} is damaged; pack it again")
    return pack


# The index on disk


def _index_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.index.npz")


def _keep(index: TarIndex, status: os.stat_result) -> None:
    told = {
        "version": _VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "pack": index.pack,
        "others": index.others,
    }
    arrays = {
        "told": np.frombuffer(json.dumps(told).encode(), np.uint8),
        "names": np.frombuffer(index.names.blob, np.uint8),
        "name_ends": index.names.ends,
        "classes": np.frombuffer(index.classes.blob, np.uint8),
        "class_ends": index.classes.ends,
        "offsets": index.offsets,
        "sizes": index.sizes,
    }
    # A folder that cannot be written costs the time of another scan, nothing else.
    with (
        contextlib.suppress(RunFailed),
        written_beside(_index_path(index.path)) as beside,
        open(beside, "wb") as file,
    ):
        np.savez(file, allow_pickle=False, **arrays)


def _kept(path: Path, status: os.stat_result) -> TarIndex | None:
    """The index beside `path`, or None where it is absent, damaged or of another file."""
    try:
        with np.load(_index_path(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(arrays["told"].tobytes())
        now = (_VERSION, status.st_size, status.st_mtime_ns)
        if (told["version"], told["size"], told["mtime_ns"]) != now:
            return None
        index = TarIndex(
            path,
            ByteStrings(arrays["names"].tobytes(), arrays["name_ends"]),
            arrays["offsets"],
            arrays["sizes"],
            ByteStrings(arrays["classes"].tobytes(), arrays["class_ends"]),
            told["pack"],
            tuple(told["others"]),
        )
        return index if _sound(index, status.st_size) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _sound(index: TarIndex, size: int) -> bool:
    """Whether all that a kept index names lies inside the file and its own strings."""
    n = len(index.offsets)
    numbers = (index.offsets, index.sizes, index.names.ends, index.classes.ends)
    if any(array.dtype != np.int64 or array.ndim != 1 for array in numbers):
        return False
    if not (len(index.sizes) == len(index.names) == len(index.classes) == n):
        return False
    for strings in (index.names, index.classes):
        if strings.ends[0] != 0 or strings.ends[-1] != len(strings.blob):
            return False
        if (np.diff(strings.ends) < 0).any():
            return False
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.sizes <= size - index.offsets)
    return bool(inside.all()) and isinstance(index.pack, dict)
