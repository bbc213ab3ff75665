"""Repeated augmentation (Hoffer et al., 2020): an image several times in a row, cut differently.

The published sampler takes an epoch's permutation with every image three times in a row, deals it
out to the processes one by one, and gives each of the P processes N // 256 * 256 / P images: an epoch
sees a third of the images.

Letters: N images of the data, P processes.
"""

import numpy as np

from xdino.data import epoch_order
from xdino.errors import UsageError

TIMES, MULTIPLE = 3, 256


def images_per_epoch(n: int, world_size: int = 1) -> int:
    """How many images each process takes in an epoch."""
    return n // MULTIPLE * MULTIPLE // world_size


def deal(
    permutation: np.ndarray, rank: int = 0, world_size: int = 1, times: int = TIMES
) -> tuple[np.ndarray, np.ndarray]:
    """A process' images of an epoch, and which repeat of its image each of them is: int64 [n] each.

    permutation: the epoch's order [N] before the repetition.
    """
    n = images_per_epoch(len(permutation), world_size)
    return dealt(permutation, rank, np.arange(n), world_size, times)


def dealt(
    permutation: np.ndarray,
    rank: int | np.ndarray,
    numbers: np.ndarray,
    world_size: int = 1,
    times: int = TIMES,
) -> tuple[np.ndarray, np.ndarray]:
    """Of what `deal` gives to process `rank`, the images of these numbers."""
    place = rank + world_size * numbers
    return permutation[place // times], place % times


def repeated_order(
    n: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1, times: int = TIMES
) -> tuple[np.ndarray, np.ndarray]:
    """`deal` of our own permutation (`data.epoch_order`).

    Raises:
        UsageError: fewer images than one portion, of which the published sampler makes none.
    """
    if n < MULTIPLE:
        raise UsageError(
            f"repeated augmentation takes images by {MULTIPLE}, but the data holds {n:,}: "
            "switch it off (1 repeat)"
        )
    return deal(epoch_order(n, seed, epoch), rank, world_size, times)
