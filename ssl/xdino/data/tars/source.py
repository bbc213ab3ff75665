"""Images inside of tar files as a source: each is read at its offset."""

import os
import resource
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from xdino.data.listing import ByteStrings, printable, size_and_time, status_of
from xdino.data.source import StoredSource
from xdino.data.tars.scanning import TarIndex


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
