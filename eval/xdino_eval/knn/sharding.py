"""Features extracted in shares, one a process, and in pieces that need not stay in memory.

Shares and pieces are cut between batches, so that each image goes through the network in the batch
that one process would put it in: its feature does not depend on how the work was shared out.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


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
