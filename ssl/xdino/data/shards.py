"""Tar files as a source: images read at their offsets, labels from folders or `.cls` members."""

import os
import re
import resource
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from xdino.data.classes import Labels, folder_labels, numbered
from xdino.data.listing import ByteStrings, first, no_image, printable, size_and_time, status_of
from xdino.data.source import StoredSource
from xdino.data.splits import is_a_part, is_held_out, is_split, splits_among
from xdino.data.tars import TarIndex, open_index
from xdino.errors import UsageError


class TarSource(StoredSource):
    """Images inside plain tar files, read at their offsets.

    names: of the images below the split, in the order of `indexes` and `rows` (for each tar, which
    of its images). Reading is a `pread` without shared position, so that threads and forked
    processes may do it at once.
    """

    within = ""  # the folder inside, "train/", that names are below
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

    def encoded(self, index: int) -> bytes:
        size = int(self._sizes[index])
        self._check_size(size)
        return self._bytes(index, 0, size)

    def sizes(self) -> np.ndarray:
        return self._sizes

    def _ends(self, index: int, most: int) -> bytes:
        size = int(self._sizes[index])
        last = min(size, most)
        return self._bytes(index, 0, last) + self._bytes(index, size - last, last)

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

    def _content(self) -> Iterator[bytes]:
        yield str(self.shrunk_to).encode()
        yield from self._described(self._names, self._sizes)

    def stamps(self) -> bytes:
        facts = np.array([size_and_time(status_of(path)) for path in self._tars], np.int64)
        names = self._names.blob + self._names.ends.tobytes()
        return names + self._sizes.tobytes() + self._offsets.tobytes() + facts.tobytes()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def open_tars(
    data: str, paths: Sequence[Path], split: str | None, channels: int | None, labelled: bool
) -> TarSource:
    """The images of tars, in their order; those below a folder `split` where that is a part."""
    indexes = [open_index(path) for path in paths]
    within = _split_folder(indexes, split) if split is not None else b""
    if split == "val" and not within and any(map(len, indexes)):
        tops = sorted({printable(n.split(b"/")[0]) for i in indexes for n in i.names})
        raise UsageError(
            f"{data} has no folder val inside, only {first(tops)}; expected members val/..., "
            "or a folder with a tar whose name says val"
        )
    held = _held_out(indexes) if split == "train" and not within else []
    rows = [_rows(index, within, held) for index in indexes]
    pairs = list(zip(indexes, rows, strict=True))
    names = ByteStrings.of(i.names[row][len(within) :] for i, chosen in pairs for row in chosen)
    if not len(names) and held:
        raise UsageError(f"{data} has nothing to train on but {first(held)}")
    if not len(names):
        raise UsageError(no_image(data, {suffix for i in indexes for suffix in i.others}))
    packed = {index.pack.get("channels") for index in indexes}
    channels = channels or (packed.pop() if packed in ({1}, {3}) else 3)
    labels, classes = None, None
    if labelled:
        said = [i.classes[row] for i, chosen in pairs for row in chosen]
        labels, classes = _labels(data, names, said, _packed_classes(indexes, within))
    source = TarSource(data, indexes, rows, names, channels, labels, classes)
    source.within = printable(within)
    if held:
        source.remarks.append(f"train is {data} without {first(held)}")
    return source


# Which part of a tar


def splits_of_tar(path: Path) -> list[str]:
    """The splits that a tar is divided into by the folders inside."""
    indexes = [open_index(path)]
    held = _held_out(indexes)
    return splits_among(
        lambda split: _split_folder(indexes, split), lambda: len(_rows(indexes[0], b"", held))
    )


def _split_folder(indexes: Sequence[TarIndex], split: str) -> bytes:
    """`b"train/"` where the folder of that name inside tars is a part of them, b"" where not."""
    raw = {name.rpartition(b"/")[0] for index in indexes for name in index.names}
    folders = {os.fsdecode(folder) for folder in raw}
    tops = {folder.split("/", 1)[0] for folder in folders}  # "" where images lie in no folder
    beside = [top for top in tops if not is_a_part(top)]
    part = split in tops and is_split(
        split, "val" in tops, lambda: beside, lambda: split in folders
    )
    return f"{split}/".encode() if part else b""


def _held_out(indexes: Sequence[TarIndex]) -> list[str]:
    """What folders inside are called that are not to be trained on, in small letters."""
    tops = dict.fromkeys(_top(name) for index in indexes for name in index.names)
    return [top.decode() for top in tops if is_held_out(os.fsdecode(top))]


def _top(name: bytes) -> bytes:
    """The first folder of a member, in small letters; b"" where it lies in none."""
    return name.partition(b"/")[0].lower() if b"/" in name else b""


def _rows(index: TarIndex, within: bytes, held: Sequence[str]) -> np.ndarray:
    """Which images lie below `within` and not below the folders `held`: int64 [n]."""
    out = {folder.encode() for folder in held}
    return np.flatnonzero([n.startswith(within) and _top(n) not in out for n in index.names])


# Labels


def _packed_classes(indexes: Sequence[TarIndex], within: bytes) -> list[str] | None:
    """The names of the classes that .cls members number, where all tars were packed with the same."""
    known = []
    for index in indexes:
        told = index.pack.get("splits", {})
        chosen = {within[:-1].decode(): told.get(within[:-1].decode(), {})} if within else told
        known += [split.get("classes") for split in chosen.values()] or [None]
    return known[0] if all(classes == known[0] for classes in known) else None


def _labels(data: str, names: ByteStrings, said: list[bytes], known: list[str] | None) -> Labels:
    """From .cls members, where there are none from folders.

    known: class names by number, where the tar was packed here.
    """
    silent = sum(not text for text in said)
    if silent == len(said):
        return folder_labels(data, names)
    if silent:
        where = next(printable(n) for n, text in zip(names, said, strict=True) if not text)
        raise UsageError(
            f"{data} has no .cls beside {silent:,} of its {len(said):,} images, among them {where}"
        )
    if known is not None and all(re.fullmatch(rb"[0-9]{1,9}", text) for text in set(said)):
        labels = np.array([int(text) for text in said], np.int64)
        if labels.max() < len(known):
            return labels, tuple(known)
    return numbered(said)
