"""Banks of features, in memory or mapped from files, read a block of rows at a time.

A bank is any table that can be sliced, so that one larger than memory is never read as a whole.

Letters: N rows of a table, n rows of a block, D width.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xdino.errors import UsageError

CPU = torch.device("cpu")


class Table(Protocol):
    """float [N, D] that can be sliced: an array, a tensor, either of them memory-mapped, ..."""

    @property
    def shape(self) -> Any: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


class JoinedTable:
    """Tables of one width, one below the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = list(tables)
        self._ends = np.cumsum([table.shape[0] for table in tables])
        self.shape = (int(self._ends[-1]), tables[0].shape[1])

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        for table, end in zip(self._tables, self._ends.tolist(), strict=True):
            first = end - table.shape[0]
            if start < end and first < stop:
                parts.append(as_float32(table[max(0, start - first) : min(stop, end) - first]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class UnitTable:
    """`table` with rows of unit length, made so block by block; a zero row stays zero."""

    def __init__(self, table: Table) -> None:
        self._table, self.shape = table, table.shape

    def __getitem__(self, rows: slice) -> Tensor:
        return normalise(as_float32(self._table[rows]))


def normalise(features: Tensor) -> Tensor:
    """float [N, D] -> the same of unit length; a zero row stays zero."""
    return torch.nn.functional.normalize(features, dim=1)


def as_float32(part: Any) -> Tensor:
    """float32 [n, D], contiguous; without a copy where the rows are so already."""
    if not isinstance(part, Tensor):
        array = np.ascontiguousarray(part, dtype=np.float32)
        part = torch.from_numpy(array if array.flags.writeable else array.copy())
    return part.detach().float().contiguous()


def read(table: Table, rows: slice, device: torch.device = CPU, name: str = "training") -> Tensor:
    """float32 [n, D] on `device`. Raises UsageError where a number is not finite."""
    part = as_float32(table[rows])
    # Infinities and NaN survive a sum, thirty times as fast as a look at every number; only where
    # the sum of large numbers has itself run over is that look taken.
    if not part.sum().isfinite() and not part.isfinite().all():
        raise UsageError(f"a {name} feature is not finite")
    return part.to(device)


def take(table: Table, rows: np.ndarray, step: int = 1 << 16) -> Tensor:
    """float32 [n, D]: `rows` (int64 [n], ascending), without more than `step` others in memory."""
    if isinstance(table, Tensor):
        return as_float32(table[torch.from_numpy(rows)])
    chosen = [torch.empty(0, table.shape[1])]
    for start in range(0, table.shape[0], step):
        inside = rows[(rows >= start) & (rows < start + step)] - start
        if len(inside):
            part = as_float32(table[start : start + step])
            chosen.append(part[torch.from_numpy(inside)])
    return torch.cat(chosen)
