"""Top-1 and top-5 with nothing left to chance: equal scores go to the lower class.

A sort leaves the order of equal scores to its implementation. Here no sort is needed: the rank of
the true class is the number of classes that come before it.

Letters: M images, K classes.
"""

import numpy as np
import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max
"""The rank of a class that is not predicted at all."""


def class_indices(
    train_labels: np.ndarray, test_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the classes of the training split 0..K-1, in ascending order of their labels.

    Args:
        train_labels: int64 [N], any values.
        test_labels: int64 [M].

    Returns:
        The labels that occur in training, int64 [K]; the class of each training image, int64 [N];
        the class of each test image, int64 [M], -1 for a label that training does not have (it can
        only be answered wrongly).
    """
    classes, train_index = np.unique(train_labels, return_inverse=True)
    place = np.searchsorted(classes, test_labels).clip(max=len(classes) - 1)
    return classes, train_index, np.where(classes[place] == test_labels, place, -1)


def ranks(scores: Tensor, target: Tensor, floor: float = -torch.inf) -> Tensor:
    """The place of the true class, 0 = first, among the classes sorted by score.

    Args:
        scores: float [M, K].
        target: int64 [M]; -1 where the true class is not among the K.
        floor: a true class whose score does not exceed this is never a prediction.

    Returns:
        int64 [M]; `NEVER` where the true class is not a prediction at all.
    """
    number = torch.arange(scores.shape[1], device=scores.device)
    column = target.clamp_min(0)[:, None]
    own = scores.gather(1, column)  # [M, 1]
    before = (scores > own) | ((scores == own) & (number < column))  # [M, K]
    counts = (target >= 0) & (own[:, 0] > floor)
    return before.sum(1).masked_fill(~counts, NEVER)


def top1_top5(rank: Tensor) -> tuple[float, float]:
    """Per cent of `rank` (int64 [M], from `ranks`) below 1 and below 5."""
    top1, top5 = (100.0 * (rank < k).sum().item() / len(rank) for k in (1, 5))
    return top1, top5


def average_precision(ranks: np.ndarray, positives: int) -> float:
    """The area under precision over recall, by trapezoids, 0..1.

    Args:
        ranks: ascending ranks of the positives that were found, from 0.
        positives: how many there are.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / 2 / positives)
