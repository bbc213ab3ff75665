"""Tars at addresses, as a row that images are read from (`tars.store.Store`).

Each is read through once, to learn where its images lie; what is found is kept in the user's cache
folder. Then an image is a piece of its tar's copy on this machine, or where there is none yet of the
tar itself. Copies are made in the background as long as there is room.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from xdino.data.remote.shard_cache import UNREACHED, ShardCache, Wanted
from xdino.data.remote.transport import Transport
from xdino.data.tars.index import keep_index, kept_index
from xdino.data.tars.scanning import Piece, TarIndex, scan
from xdino.errors import RunFailed, UsageError
from xdino.runtime.kept import in_cache

_AT_ONCE = 8  # tars that are read through
_ASKING = 32  # that are asked for their sizes
_BLOCK = 1 << 20  # bytes that headers are read in


class RemoteTars:
    """Tars at `addresses`, all of one store.

    Raises:
        UsageError: one is not there. RunFailed: the store does not answer.
    """

    least = 0  # an index of all is always worth keeping

    def __init__(self, addresses: Sequence[str], transport: Transport) -> None:
        self.names, self._transport = list(addresses), transport
        self._wishes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._wished: set[int] = set()
        self._copies: dict[int, Path] = {}
        self._copier: threading.Thread | None = None

    @cached_property
    def _wanted(self) -> list[Wanted]:
        with ThreadPoolExecutor(_ASKING) as pool:
            facts = pool.map(self._transport.facts, self.names)
            return [Wanted(name, *told) for name, told in zip(self.names, facts, strict=True)]

    @cached_property
    def _cache(self) -> ShardCache:
        return ShardCache(self._wanted)

    def facts(self) -> np.ndarray:
        return np.array([(shard.size, shard.stamp) for shard in self._wanted], np.int64)

    def place(self, key: str) -> Path:
        return in_cache(
            Path("/".join(["", *self.names])[:4000] + f".{len(self.names)}.{key}.index")
        )

    def folder(self) -> Path | None:
        return None

    # Where images lie

    def indexes(self) -> list[TarIndex]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._index, range(len(self.names))))

    def _index(self, tar: int) -> TarIndex:
        shard = self._wanted[tar]
        file = in_cache(Path(f"/{shard.address}.index.npz"))
        facts = (shard.size, shard.stamp)
        index = kept_index(file, shard.address, facts)
        if index is None:
            copy = self._copy(tar) or self._cache.make(shard, self._transport.read)
            if copy is not None:
                self._copies[tar] = copy
            blocks = _Blocks(lambda size, offset: self.read(tar, size, offset), shard.size)
            index = scan(shard.address, Piece(shard.address, blocks, shard.size))
            keep_index(index, file, facts)
        return index

    # Their bytes

    def read(self, tar: int, size: int, offset: int) -> bytes:
        copy = self._copy(tar)
        if copy is not None:
            try:
                with open(copy, "rb", buffering=0) as file:
                    return os.pread(file.fileno(), size, offset)
            except OSError:  # it made room for others
                self._copies.pop(tar, None)
        else:
            self._wish(tar)
        try:
            return self._transport.read(self.names[tar], size, offset)
        except UsageError as error:  # it was there when the data were opened
            raise RunFailed(str(error)) from error

    def _copy(self, tar: int) -> Path | None:
        found = self._copies.get(tar)
        if found is None:
            found = self._cache.copy_of(self._wanted[tar])
            if found is not None:
                self._copies[tar] = found
        return found

    def _wish(self, tar: int) -> None:
        """Have a copy of this tar made, unless that was tried."""
        if tar in self._wished or not self._cache.most:
            return
        self._wished.add(tar)
        self._wishes.put(tar)
        if self._copier is None:
            self._copier = threading.Thread(
                target=self._make_copies, name="xdino-shards", daemon=True
            )
            self._copier.start()

    def _make_copies(self) -> None:
        while True:
            tar = self._wishes.get()
            try:
                copy = self._cache.make(self._wanted[tar], self._transport.read)
            except UNREACHED:  # whoever reads the next image says so
                continue
            if copy is not None:
                self._copies[tar] = copy


class _Blocks:
    """Reading of headers, which are small and lie one after the other, in blocks."""

    def __init__(self, read: Callable[[int, int], bytes], end: int) -> None:
        self._read, self._end = read, end
        self._first, self._block = 0, b""

    def __call__(self, size: int, offset: int) -> bytes:
        if not self._first <= offset <= offset + size <= self._first + len(self._block):
            self._first = offset
            self._block = self._read(max(size, min(_BLOCK, self._end - offset)), offset)
        start = offset - self._first
        return self._block[start : start + size]
