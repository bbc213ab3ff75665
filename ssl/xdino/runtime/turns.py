"""Batches that the processes of a group take in turn, so that each has the answers to all.

An image goes through the network in the batch that one process would put it in, and answers come in
the order of one process: what is made of them is the same to the bit, however many there are.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import TypeVar

import numpy as np

from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed, stopping

T = TypeVar("T")
# A fit on the first process takes what it takes; one that died is noticed at once.
PATIENCE = timedelta(days=365)


def mine(order: np.ndarray, batch_size: int) -> np.ndarray:
    """Of the images `order` [N] those in the batches that are this process's turn."""
    rank, processes = distributed.rank(), distributed.world_size()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return np.concatenate([order[:0], *batches[rank::processes]])


def of_all(own: Iterator[T], count: int) -> Iterator[T]:
    """What `own` gives of this process's batches -> that of all `count`, in their order, on all.

    Every process must ask for all of it, or for none.

    Raises:
        UsageError, RunFailed, Stopped: as `own` on any of the processes.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    distributed.agree({"the number of batches to look at": count})

    def one(turns: int) -> T | None:
        stopping.asked()
        return next(own) if rank < turns else None

    for start in range(0, count, processes):
        turns = min(processes, count - start)
        item = distributed.together(partial(one, turns))
        for each in distributed.gather(item)[:turns]:
            assert each is not None
            yield each


def on_first(work: Callable[[], T], shared: bool) -> T:
    """`work` on the first process alone where it is `shared`; the others wait for what it gives."""

    def alone() -> T:
        with stopping.abandonable("while evaluating"):
            return work()

    return distributed.from_first(alone, PATIENCE) if shared else work()


def all_hear(work: Callable[[], T], shared: bool) -> T:
    """`work` on every process where it is `shared`; if it fails on one, it has failed on all.

    Raises:
        UsageError, RunFailed, Stopped: as `work`, on any; of what else it raises RunFailed is made.
    """

    def in_sentences() -> T:
        try:
            return work()
        except (UsageError, RunFailed):
            raise
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise RunFailed(str(error) or type(error).__name__) from error

    return distributed.together(in_sentences) if shared else work()
