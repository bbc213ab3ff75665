"""Images inside of tar files as a source: each is read at its offset."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xdino.data.listing import ByteStrings, printable
from xdino.data.source import StoredSource, names_and_sizes
from xdino.data.tars.scanning import TarIndex
from xdino.data.tars.store import HELD_OPEN, LocalTars, Store


@dataclass(frozen=True)
class TarTable:
    """Where N images lie in the tars of `store`.

    names: below the split. tar: int32 [N], in which of the tars; offsets, sizes: int64 [N], in bytes.
    sides: for each tar the shorter side in pixels that its images were shrunk to, or None.
    others: how many members are no images, by suffix.
    """

    store: Store
    names: ByteStrings
    tar: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    sides: list[int | None]
    others: dict[str, int]

    @classmethod
    def of(
        cls, store: Store, indexes: Sequence[TarIndex], rows: Sequence[np.ndarray],
        names: ByteStrings,
    ) -> "TarTable":  # fmt: skip
        """The images `rows` of each of the tars."""
        pairs = list(zip(indexes, rows, strict=True))
        others: dict[str, int] = {}
        for index in indexes:
            for suffix, count in index.others.items():
                others[suffix] = others.get(suffix, 0) + count
        return cls(
            store,
            names,
            np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows]),
            np.concatenate([index.offsets[chosen] for index, chosen in pairs]),
            np.concatenate([index.sizes[chosen] for index, chosen in pairs]),
            [index.pack.get("shorter_side") for index in indexes],
            others,
        )


class TarSource(StoredSource):
    """Images inside plain tar files, read at their offsets: by threads and forked processes at once."""

    within = ""  # the folder inside, "train/", that names are below
    packed_channels = 3  # as the tars say, whatever was asked for
    keeps = True  # whether all of it follows from the tars alone
    _HELD_OPEN = HELD_OPEN

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
        self._store, self._tar = table.store, table.tar
        if isinstance(self._store, LocalTars):
            self._store.hold_open(self._HELD_OPEN)
        self.left_out = dict(table.others)

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
        data = self._store.read(tar, size, offset)
        if len(data) != size:
            raise OSError(f"{self._store.names[tar]} is shorter than when it was indexed")
        return data

    def member(self, index: int) -> bytes:
        return self._names[index]

    def describe(self, index: int) -> str:
        tar = os.fsencode(self._store.names[int(self._tar[index])])
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
        return names + where + self._store.facts().tobytes()
