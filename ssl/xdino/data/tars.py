"""Plain tar files as rows of images: where each member lies, read once from the headers.

Many small files are slow to list and to copy; WebDataset's shards are tar files with one sample a
run of consecutive members of the same name up to the first dot: `n01/0.jpg`, `n01/0.cls`. An
uncompressed tar holds every member in one piece, so an index of offsets turns it into random
access. The index is kept beside the file (`.NAME.index.npz`) where that can be written, and made
anew when the file's size or time changes.

Tars that were joined with `cat` are read through: an end mark ends only what lies before it.

Nothing is ever extracted. A member's name is a label here and never a path, so that a member
"../../x.jpg" can reach no place outside. A tar is complete or refused, as every source.
"""

import contextlib
import io
import json
import os
import stat
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data.decode import HEAD, SUFFIXES, recognised
from xdino.data.listing import ByteStrings, count_suffix, is_hidden, printable
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import written_beside

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

_VERSION = 2  # of the kept index
_BLOCK = 512  # a tar's unit
_SMALL = 1 << 20  # bytes of a .cls or of the pack's member, at most


@dataclass(frozen=True)
class TarIndex:
    """The N images of one tar, in its order.

    names: as the tar has them, a leading "./" left out. offsets, sizes: int64 [N], in bytes.
    classes: what the sample's .cls holds, b"" without one. pack: what `xdino pack` wrote, {} in
    tars of others. others: how many members are no images, by suffix.
    """

    path: Path
    names: ByteStrings
    offsets: np.ndarray
    sizes: np.ndarray
    classes: ByteStrings
    pack: dict[str, Any] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def open_index(path: Path) -> TarIndex:
    """The index of a tar, kept or made now.

    Raises:
        UsageError: it cannot be read, is no tar, compressed, cut short, or unclear about what is
            an image of it.
    """
    with asked(f"{path} cannot be read"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no ordinary file; an index of offsets needs one")
        index = _kept(path, status)
        if index is None:
            index = _scan(path)
            _keep(index, status)
    return index


# Reading headers


class _Headers(io.RawIOBase):
    """A file as tarfile reads it: at most a header's size at once, however much one announces."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor, self._at = path, descriptor, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _SMALL:
            raise UsageError(
                f"{self._path} is damaged: it has a header of {size:,} bytes at byte {self._at:,}"
            )
        data = os.pread(self._descriptor, size, self._at)
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


def _scan(path: Path) -> TarIndex:
    with open(path, "rb") as file:
        descriptor = file.fileno()
        start = os.pread(descriptor, 8, 0)
        for magic, (_, command) in COMPRESSED.items():
            if start.startswith(magic):
                raise UsageError(
                    f"{path} is compressed, which allows no random access: {command} it first"
                )
        if not start:
            raise UsageError(f"{path} is empty; expected a tar file")
        samples = _Samples(path, descriptor)
        position: int | None = 0
        while position is not None:
            end = _scan_one(path, descriptor, position, samples)
            position = _joined(path, descriptor, end, samples)
        return samples.index()


def _scan_one(path: Path, descriptor: int, position: int, samples: "_Samples") -> int:
    """Read the headers of the tar that starts at `position`, to its end mark; where that is."""
    headers = _Headers(path, descriptor)
    headers.seek(position)
    try:
        with _Tar.open(
            fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps them all, a kilobyte for each image
                if member.size < 0 or tar.offset <= position:
                    raise tarfile.ReadError(f"a damaged header at byte {position:,}")
                position = tar.offset
                samples.add(member)
            end = tar.offset
    except UsageError:
        raise
    except RecursionError as error:
        why = "headers that announce headers, hundreds deep"
        raise UsageError(_cut_short(path, samples, why)) from error
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError,
            MemoryError) as error:  # fmt: skip
        if not samples.members:
            raise UsageError(f"{path} is no tar file ({error})") from error
        raise UsageError(_cut_short(path, samples, str(error))) from error
    # tarfile takes a damaged header, and a file that ends between two members, for the end.
    mark = os.pread(descriptor, _BLOCK, end)
    if len(mark) < _BLOCK or any(mark):
        what = "a damaged header" if any(mark) else "the end mark is missing"
        raise UsageError(_cut_short(path, samples, f"{what} at byte {end:,}"))
    return end


def _joined(path: Path, descriptor: int, end: int, samples: "_Samples") -> int | None:
    """Where another tar starts after the end mark at `end`; None where only padding follows."""
    position = end
    while chunk := os.pread(descriptor, _SMALL, position):
        rest = chunk.lstrip(b"\0")
        if rest:
            position += (len(chunk) - len(rest)) // _BLOCK * _BLOCK
            header = os.pread(descriptor, _BLOCK, position)
            try:
                tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                if header[257:262] != b"ustar":
                    return None  # whatever the last block was filled with
                why = f"a damaged header at byte {position:,}"
                raise UsageError(_cut_short(path, samples, why)) from error
            return position
        position += len(chunk)
    return None


def _cut_short(path: Path, samples: "_Samples", why: str) -> str:
    return (
        f"{path} is damaged or cut short after {samples.members:,} members, the last "
        f"{samples.last} ({why}); copy or make it again"
    )


class _Samples:
    """Members as they come -> images; consecutive members of one stem share a .cls."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.members, self._last = 0, ""
        self._names: list[bytes] = []
        self._classes: list[bytes] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._pack: dict[str, Any] = {}
        self._others: dict[str, int] = {}
        self._stem: str | None = None
        self._images: list[tuple[bytes, int, int]] = []
        self._class, self._described = b"", False

    @property
    def last(self) -> str:
        """The name of the last member."""
        return printable(_raw(self._last)) or "none"

    def add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./").lstrip("/")
        self.members, self._last = self.members + 1, name
        parts = name.split("/")
        if member.isdir() or any(is_hidden(_raw(p)) and p not in (".", "..") for p in parts):
            return
        suffix = os.path.splitext(name)[1].lower()
        image = suffix in SUFFIXES
        if not name:
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
            image = recognised(os.pread(self._descriptor, HEAD, member.offset_data)) is not None
        stem = "/".join([*parts[:-1], parts[-1].partition(".")[0]])
        if stem != self._stem:
            self._flush()
            self._stem = stem
        if image:
            self._images.append((_raw(name), member.offset_data, member.size))
        elif suffix == ".cls":
            self._class, self._described = self._content(member).strip(), True
        elif suffix == ".json":
            self._described = True
        else:
            count_suffix(self._others, suffix)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        if member.size > _SMALL:
            raise UsageError(f"{self.path}: {self.last} has {member.size:,} bytes; expected a few")
        return os.pread(self._descriptor, member.size, member.offset_data)

    def _flush(self) -> None:
        if len(self._images) > 1 and self._described:
            names = " and ".join(printable(name) for name, _, _ in self._images[:2])
            sample = printable(_raw(self._stem or ""))
            raise UsageError(
                f"{self.path} holds several images in the sample {sample} ({names}), which share "
                "one label or description, so that it is unclear which is meant; write shards "
                "with one image a sample (a sample is what has one name up to the first dot)"
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
            dict(sorted(self._others.items())),
        )


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _parse_pack(path: Path, text: bytes) -> dict[str, Any]:
    try:
        pack = json.loads(text)
    except (ValueError, RecursionError):
        pack = None
    if not _is_pack(pack):
        raise UsageError(f"{path}: its member {PACK_MEMBER} is damaged; pack it again")
    return pack


def _is_pack(pack: Any) -> bool:
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
            told["others"],
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
    return bool(inside.all()) and _is_pack(index.pack) and isinstance(index.others, dict)
