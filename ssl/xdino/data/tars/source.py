"""Images inside of tar files as a source: each is read at its offset."""

import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdino.data.listing import ByteStrings, printable, size_and_time, status_of
from xdino.data.source import StoredSource, names_and_sizes
from xdino.data.tars.scanning import TarIndex


@dataclass(frozen=True)
class TarTable:
    """Where N images lie in `tars`.

    names: below the split. tar: int32 [N], in which of the tars; offsets, sizes: int64 [N], in bytes.
    sides: for each tar the shorter side in pixels that its images were shrunk to, or None.
    others: how many members are no images, by suffix.
    """

    tars: list[Path]
    names: ByteStrings
    tar: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    sides: list[int | None]
    others: dict[str, int]

    @classmethod
    def of(
        cls, paths: Sequence[Path], indexes: Sequence[TarIndex], rows: Sequence[np.ndarray],
        names: ByteStrings,
    ) -> "TarTable":  # fmt: skip
        """The images `rows` of each of the tars at `paths`."""
        pairs = list(zip(indexes, rows, strict=True))
        others: dict[str, int] = {}
        for index in indexes:
            for suffix, count in index.others.items():
                others[suffix] = others.get(suffix, 0) + count
        return cls(
            list(paths),
            names,
            np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows]),
            np.concatenate([index.offsets[chosen] for index, chosen in pairs]),
            np.concatenate([index.sizes[chosen] for index, chosen in pairs]),
            [index.pack.get("shorter_side") for index in indexes],
            others,
        )

    @staticmethod
    def facts_of(paths: Sequence[Path]) -> np.ndarray:
        """Sizes and times of change of the tars themselves, as they are now: int64 [tars, 2]."""
        return np.array([size_and_time(status_of(path)) for path in paths], np.int64)


class TarSource(StoredSource):
    """Images inside plain tar files, read at their offsets.

    Reading is a `pread` without shared position, so that threads and forked
    processes may do it at once.
    """

    within = ""  # the folder inside, "train/", that names are below
    packed_channels = 3  # as the tars say, whatever was asked for
    keeps = True  # whether all of it follows from the tars alone
    _HELD_OPEN = 256  # with more files than this each read opens its own: descriptors are few
    _PART = 4  # of the descriptors that the process may have, this part at most is held

    def __init__(
        self,
        name: str,
        table: TarTable,
        channels: int = 3,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        shrunk = sorted({side for side in table.sides if side is not None})
        if shrunk:
            partly = "" if all(table.sides) else "partly "
            name = f"{name} ({partly}shrunk to {', '.join(map(str, shrunk))})"
            self.shrunk_to = shrunk[0]
        super().__init__(name, channels, labels, classes)
        self.table = table
        self._names, self._offsets, self._sizes = table.names, table.offsets, table.sizes
        self._tars, self._tar = table.tars, table.tar
        self.left_out = dict(table.others)
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
        yield from self._described(self.names_and_sizes())

    def names_and_sizes(self) -> bytes:
        """As in `source`; worked out once."""
        self.described = self.described or names_and_sizes(self._names, self._sizes)
        return self.described

    def stamps(self) -> bytes:
        names = bytes(self._names.blob) + self._names.ends.tobytes()
        where = self._sizes.tobytes() + self._offsets.tobytes()
        return names + where + self.table.facts_of(self._tars).tobytes()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
