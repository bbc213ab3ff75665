"""A neighbour as one int64, its key: the similarity's bits above, the row's complement below.

Keys are unique and order as neighbours do (the more similar first, of equals the lower row), so
merging the answers of blocks, engines and processes is `topk` of all of them.

Letters: b queries, k neighbours of each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min
"""A key that comes after all others: no neighbour."""


def pack(similarity: Tensor, row: Tensor) -> Tensor:
    """float32 similarities and int64 rows below 2^32 -> keys, int64 of their broadcast shape."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (0xFFFFFFFF - row)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys -> similarities, float32, and rows, int64, of the same shape."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def merge(keys: Sequence[Tensor], k: int) -> Tensor:
    """The k best of several answers: int64 [b, at most k], the nearest first."""
    together = torch.cat(list(keys), 1)
    return together.topk(min(k, together.shape[1]), dim=1).values


def without_self(keys: Tensor, row: np.ndarray) -> Tensor:
    """Keys int64 [b, k + 1] -> [b, k] without each query's own row, int64 [b].

    Where k + 1 others are as near, the own row is not among them, and the last is dropped.
    """
    own = unpack(keys)[1] == torch.from_numpy(row).to(keys.device)[:, None]
    return keys.masked_fill(own, EMPTY).topk(keys.shape[1] - 1, dim=1).values


def recall(found: Tensor, exact: Tensor, k: int) -> float:
    """The share of the exact k nearest that is among the k found; keys int64 [b, k or more]."""
    k = min(k, exact.shape[1])
    ours, theirs = unpack(found[:, :k])[1], unpack(exact[:, :k])[1]
    return (theirs[:, :, None] == ours[:, None, :]).any(2).double().mean().item()
