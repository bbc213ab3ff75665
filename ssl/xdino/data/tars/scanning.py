"""Plain tar files as rows of images: where each member lies, from the headers.

Many small files are slow to list and to copy; WebDataset's shards are tar files with one sample a
run of consecutive members of the same name up to the first dot: `n01/0.jpg`, `n01/0.cls`. An
uncompressed tar holds every member in one piece, so an index of offsets turns it into random access.

Tars that were joined with `cat` are read through: an end mark ends only what lies before it. A tar
inside of a tar, as ImageNet comes, is a folder of its name: `n01440764.tar` holds `n01440764/...`.

Arrays (.npy) are images where a tar, and every other that is read with it, holds no picture: in folders
the same. Beside pictures they are whatever else a sample has.

Nothing is ever extracted. A member's name is a label here and never a path, so that a member
"../../x.jpg" can reach no place outside. A tar is complete or refused, as every source.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data.decode import ARRAYS, HEAD, SUFFIXES, npy, recognised
from xdino.data.listing import ByteStrings, count_suffix, is_hidden, printable
from xdino.errors import UsageError

#: The member in which `xdino pack` says how a tar was made, JSON. WebDataset's readers skip names
#: with two underscores at both ends.
PACK_MEMBER = "__xdino_pack__"

#: How compressed files start; what compressed them, and what undoes it.
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}

_BLOCK = 512  # a tar's unit
_SMALL = 1 << 20  # bytes of a .cls or of the pack's member, at most


@dataclass(frozen=True)
class TarIndex:
    """The N images of one tar, in its order; arrays among them until `of_pictures` decides.

    path: a file, or an address. names: as the tar has them, a leading "./" left out. offsets, sizes:
    int64 [N], in bytes. classes: what the sample's .cls holds, b"" without one. pack: what `xdino
    pack` wrote, {} in tars of others. others: how many members are no images, by suffix.
    """

    path: Path | str
    names: ByteStrings
    offsets: np.ndarray
    sizes: np.ndarray
    classes: ByteStrings
    pack: dict[str, Any] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_arrays(self) -> bool:
        return any(suffix.encode() in bytes(self.names.blob).lower() for suffix in ARRAYS)

    def without_arrays(self) -> "TarIndex":
        there = np.array([not _is_array(name) for name in self.names], bool)
        others = self.others | {ARRAYS[0]: self.others.get(ARRAYS[0], 0) + int((~there).sum())}
        rows = np.flatnonzero(there)
        return replace(
            self,
            names=ByteStrings.of(self.names[row] for row in rows),
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            classes=ByteStrings.of(self.classes[row] for row in rows),
            others=dict(sorted(others.items())),
        )


def of_pictures(indexes: Sequence[TarIndex]) -> list[TarIndex]:
    """Without arrays, unless there is nothing else in any of them."""
    if not any(index.has_arrays for index in indexes):
        return list(indexes)
    if all(_is_array(name) for index in indexes for name in index.names):
        return list(indexes)
    return [index.without_arrays() for index in indexes]


def _is_array(name: bytes) -> bool:
    return name.lower().endswith(tuple(suffix.encode() for suffix in ARRAYS))


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `end` of a file, which hold a tar. read(size, offset): as os.pread.

    where: what a person calls the file.
    """

    where: str
    read: Callable[[int, int], bytes]
    end: int
    start: int = 0

    def at(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on, none beyond the end."""
        return self.read(max(0, min(size, self.end - offset)), offset)


# Reading headers


class _Headers(io.RawIOBase):
    """A file as tarfile reads it: at most a header's size at once, however much one announces."""

    def __init__(self, piece: Piece, position: int) -> None:
        self._piece, self._at = piece, position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _SMALL:
            raise UsageError(
                f"{self._piece.where} is damaged: it has a header of {size:,} bytes at byte "
                f"{self._at:,}"
            )
        data = self._piece.at(size, self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # there, but not in the types that Python ships for it


def scan(path: Path | str, whole: Piece) -> TarIndex:
    """What the tar `whole`, all of the file `path`, holds.

    Raises:
        UsageError: it is no tar, compressed, cut short, or unclear about what is an image of it.
    """
    samples = _Samples(path, whole)
    _scan_all(whole, samples)
    return samples.index()


def _scan_all(piece: Piece, samples: "_Samples") -> None:
    """Read a tar, and those that were joined to it."""
    start = piece.at(8, piece.start)
    for magic, (_, command) in COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(
                f"{piece.where} is compressed, which allows no random access: {command} it first"
            )
    if not start:
        raise UsageError(f"{piece.where} is empty; expected a tar file")
    position: int | None = piece.start
    while position is not None:
        position = _joined(piece, _scan_one(piece, position, samples), samples)


def _scan_one(piece: Piece, position: int, samples: "_Samples") -> int:
    """Read the headers of the tar that starts at `position`, to its end mark; where that is."""
    before = samples.members
    try:
        with _Tar.open(
            fileobj=_Headers(piece, position), mode="r:", encoding="utf-8",
            errors="surrogateescape",
        ) as tar:  # fmt: skip
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps them all, a kilobyte for each image
                if member.size < 0 or tar.offset <= position:
                    raise tarfile.ReadError(f"a damaged header at byte {position:,}")
                position = tar.offset
                if not samples.inside and _is_tar(member):
                    _scan_inside(piece, member, samples)
                else:
                    samples.add(member)
            end = tar.offset
    except UsageError:
        raise
    except RecursionError as error:
        why = "headers that announce headers, hundreds deep"
        raise UsageError(_cut_short(piece, samples, why)) from error
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError,
            MemoryError) as error:  # fmt: skip
        if samples.members == before:
            raise UsageError(f"{piece.where} is no tar file ({error})") from error
        raise UsageError(_cut_short(piece, samples, str(error))) from error
    # tarfile takes a damaged header, and a file that ends between two members, for the end.
    mark = piece.at(_BLOCK, end)
    if len(mark) < _BLOCK or any(mark):
        what = "a damaged header" if any(mark) else "the end mark is missing"
        raise UsageError(_cut_short(piece, samples, f"{what} at byte {end:,}"))
    return end


def _is_tar(member: tarfile.TarInfo) -> bool:
    """By its name, where it is large enough for a tar: a damaged one must not be left out."""
    parts = member.name.removeprefix("./").split("/")
    hidden = any(is_hidden(_raw(part)) and part not in (".", "..") for part in parts)
    called_so = parts[-1].lower().endswith(".tar") and not hidden
    return called_so and member.isreg() and member.size >= _BLOCK


def _scan_inside(piece: Piece, member: tarfile.TarInfo, samples: "_Samples") -> None:
    """Read the tar that is a member: its images lie in a folder of its name."""
    name = member.name.removeprefix("./").lstrip("/")
    if member.issparse() or member.offset_data + member.size > piece.end:
        raise UsageError(_cut_short(piece, samples, f"{printable(_raw(name))} is not all there"))
    where = f"{piece.where}: its member {printable(_raw(name))}"
    end = member.offset_data + member.size
    samples.inside = f"{name[:-4]}/"
    _scan_all(Piece(where, piece.read, end, member.offset_data), samples)
    samples.inside = ""


def _joined(piece: Piece, end: int, samples: "_Samples") -> int | None:
    """Where another tar starts after the end mark at `end`; None where only padding follows."""
    position = end
    while chunk := piece.at(_SMALL, position):
        rest = chunk.lstrip(b"\0")
        if rest:
            position += (len(chunk) - len(rest)) // _BLOCK * _BLOCK
            header = piece.at(_BLOCK, position)
            try:
                tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                if header[257:262] != b"ustar":
                    return None  # whatever the last block was filled with
                why = f"a damaged header at byte {position:,}"
                raise UsageError(_cut_short(piece, samples, why)) from error
            return position
        position += len(chunk)
    return None


def _cut_short(piece: Piece, samples: "_Samples", why: str) -> str:
    return (
        f"{piece.where} is damaged or cut short after {samples.members:,} members, the last "
        f"{samples.last} ({why}); copy or make it again"
    )


class _Samples:
    """Members as they come -> images; consecutive members of one stem share a .cls.

    inside: the folder, "n01/", that stands for the tar inside which is being read.
    """

    def __init__(self, path: Path | str, whole: Piece) -> None:
        self.path, self._whole, self.inside = path, whole, ""
        self.members, self._last = 0, ""
        self._names: list[bytes] = []
        self._classes: list[bytes] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._pack: dict[str, Any] = {}
        self._others: dict[str, int] = {}
        self._stem: str | None = None
        self._images: list[tuple[bytes, int, int]] = []
        self._arrays: list[tuple[bytes, int, int]] = []
        self._class, self._described = b"", False

    @property
    def last(self) -> str:
        """The name of the last member."""
        return printable(_raw(self._last)) or "none"

    def add(self, member: tarfile.TarInfo) -> None:
        name = self.inside + member.name.removeprefix("./").lstrip("/")
        self.members, self._last = self.members + 1, name
        parts = name.split("/")
        if member.isdir() or any(is_hidden(_raw(p)) and p not in (".", "..") for p in parts):
            return
        suffix = os.path.splitext(name)[1].lower()
        image = suffix in SUFFIXES
        if name == self.inside:
            return count_suffix(self._others, "")
        if not member.isreg() or member.issparse():
            if image:
                raise UsageError(
                    f"{self.path} holds {self.last} as a link or in pieces, not whole; make it again "
                    "with tar --dereference --hard-dereference"
                )
            return
        if name == PACK_MEMBER:
            self._pack = _parse_pack(self.path, self._content(member))
            return
        if not suffix:
            image = recognised(self._whole.at(HEAD, member.offset_data)) is not None
        stem = "/".join([*parts[:-1], parts[-1].partition(".")[0]])
        if stem != self._stem:
            self._flush()
            self._stem = stem
        if image:
            self._images.append((_raw(name), member.offset_data, member.size))
        elif suffix in ARRAYS and self._whole.at(6, member.offset_data) == npy.MAGIC:
            self._arrays.append((_raw(name), member.offset_data, member.size))
        elif suffix == ".cls":
            self._class, self._described = self._content(member).strip(), True
        elif suffix == ".json":
            self._described = True
        else:
            count_suffix(self._others, suffix)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        if member.size > _SMALL:
            raise UsageError(f"{self.path}: {self.last} has {member.size:,} bytes; expected a few")
        return self._whole.at(member.size, member.offset_data)

    def _flush(self) -> None:
        if len(self._images) > 1 and self._described:
            names = " and ".join(printable(name) for name, _, _ in self._images[:2])
            sample = printable(_raw(self._stem or ""))
            raise UsageError(
                f"{self.path} holds several images in the sample {sample} ({names}), which share "
                "one label or description, so that it is unclear which is meant; write shards "
                "with one image a sample (a sample is what has one name up to the first dot)"
            )
        several = len(self._arrays) > 1 and self._described  # features of a sample, perhaps
        images = self._images or ([] if several else self._arrays)
        for _ in self._arrays if images is not self._arrays else ():
            count_suffix(self._others, ARRAYS[0])
        for name, offset, size in images:
            self._names.append(name)
            self._offsets.append(offset)
            self._sizes.append(size)
            self._classes.append(self._class)
        self._images, self._arrays, self._class, self._described = [], [], b"", False

    def index(self) -> TarIndex:
        self._flush()
        return TarIndex(
            self.path,
            ByteStrings.of(self._names),
            np.array(self._offsets, np.int64),
            np.array(self._sizes, np.int64),
            ByteStrings.of(self._classes),
            self._pack,
            dict(sorted(self._others.items())),
        )


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _parse_pack(path: Path | str, text: bytes) -> dict[str, Any]:
    try:
        pack = json.loads(text)
    except (ValueError, RecursionError):
        pack = None
    if not is_pack(pack):
        raise UsageError(f"{path}: its member {PACK_MEMBER} is damaged; pack it again")
    return pack


def is_pack(pack: Any) -> bool:
    """Whether what is read out of it later has the types that `xdino pack` writes."""
    if not isinstance(pack, dict) or not isinstance(pack.get("splits", {}), dict):
        return False
    splits = pack.get("splits", {}).values()
    if not all(isinstance(split, dict) for split in splits):
        return False
    classes = [split.get("classes") or [] for split in splits]
    named = all(isinstance(c, list) and all(isinstance(n, str) for n in c) for c in classes)
    numbers = [pack.get("channels"), pack.get("shorter_side")]
    return named and all(n is None or type(n) is int for n in numbers)
