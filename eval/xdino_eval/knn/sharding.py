"""Features extracted in shares, one a process, and in pieces that need not stay in memory; one answer
from the shares of all processes.

Shares and pieces are cut between batches, so that each image goes through the network in the batch
that one process would put it in: its feature does not depend on how the work was shared out.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xdino.runtime import distributed
from xdino_eval.knn.keys import EMPTY, merge
from xdino_eval.knn.search import Searcher


def share(count: int, batch_size: int, rank: int = 0, processes: int = 1) -> np.ndarray:
    """The places, int64, of `count` images that process `rank` extracts; possibly none."""
    batches = -(-count // batch_size)
    first, last = (min(count, batches * r // processes * batch_size) for r in (rank, rank + 1))
    return np.arange(first, last)


def cut(places: np.ndarray, batch_size: int, rows: int | None) -> list[np.ndarray]:
    """`places` in pieces of about `rows`, whole batches each; one piece where `rows` is None."""
    if rows is None or not len(places):
        return [places]
    step = -(-rows // batch_size) * batch_size
    return [places[start : start + step] for start in range(0, len(places), step)]


@contextmanager
def folder_for(cache: Path | None, wanted: bool) -> Iterator[Path | None]:
    """`cache`; where there is none and one is `wanted`, a temporary folder (TMPDIR chooses where)."""
    if cache is not None or not wanted:
        yield cache
    else:
        with tempfile.TemporaryDirectory(prefix="xdino-features-") as folder:
            yield Path(folder)


class ShardedSearcher:
    """A searcher of this process's rows that answers for the rows of all processes.

    Every process must ask the same queries in the same order.

    Args:
        inner: searches this process's rows; None where it has none.
        offset: the number, among all rows, of this process's first.
        total: the rows of all processes.
    """

    def __init__(self, inner: Searcher | None, offset: int, total: int) -> None:
        self.inner, self.offset, self.total = inner, offset, total

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        k = min(k, self.total)
        keys = torch.full((len(queries), k), EMPTY)
        if self.inner is not None:
            own = self.inner.nearest(queries, k).cpu()
            keys[:, : own.shape[1]] = own - self.offset  # a key holds the row's complement
        return merge(distributed.gather_tensor(keys), k)
