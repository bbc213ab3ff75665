"""Random numbers that follow from where they are used, never from what was drawn before.

An image's draws are a function of (seed, epoch, index, repeat): `repeat` tells apart the copies of one
image in an epoch (repeated augmentation). A batch's draws are a function of (seed, iteration, part).
So they are the same in any thread, on any process and after any restart.

Letters: B images.
"""

import numpy as np

from xdino.runtime import rng


def counters(epoch: int, indices: np.ndarray, repeats: np.ndarray | int = 0) -> np.ndarray:
    """The places of images `indices` int64 [B] in an epoch: uint64 [B, 3], for `uniforms`."""
    columns = np.broadcast_arrays(indices, epoch, repeats)
    return np.stack(columns, axis=-1).astype(np.uint64)


def uniforms(seed: int, stream: rng.Stream, places: np.ndarray, count: int) -> np.ndarray:
    """float64 [B, count] in (0, 1), both ends left out; `places` are uint64 [B, 3].

    Raises:
        ValueError: a seed outside [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    raw = rng.raw_of_places(stream, seed, places, count)
    return ((raw >> np.uint64(12)) + 0.5) * 2.0**-52
