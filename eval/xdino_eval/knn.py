"""Weighted nearest neighbours: the accuracy of frozen features without anything trained.

Each of the k most similar training images votes for its class with weight exp(similarity / T)
(Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4; DINO, section 3.2 and table 2, with
k = 20 and T = 0.07). The published loop searches once for each k, keeps a [queries, classes] vote
for every class of ImageNet, and refuses small splits. Here the bank is searched once, at the
largest k, in blocks of queries; smaller k are slices of it, and any number of images or classes
will do. Where the published sort leaves the order to chance, it is fixed: among equal similarities
the earlier training image is the nearer, among equal votes the lower class wins, and a class
without a vote is never a prediction.

Letters: N images of the bank (training), M queries, D width, K classes, b queries of a block.
"""

import time
import warnings
from collections.abc import Sequence

import faiss
import numpy as np
import torch
from torch import Tensor

from xdino.errors import UsageError
from xdino_eval.accuracy import class_indices, ranks, top1_top5
from xdino_eval.features import Features
from xdino_eval.results import Row

KS = (10, 20, 100, 200)
BLOCK = 2048  # queries: bounds the votes to 16 MB for 1,000 classes


def normalise(features: Tensor) -> Tensor:
    """float [N, D] -> the same of unit length; a zero row stays zero."""
    return torch.nn.functional.normalize(features, dim=1)


def neighbours(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `bank` with the largest inner product with each query, exactly.

    Args:
        bank: float32 [N, D]. queries: float32 [b, D]. k: at most N.

    Returns:
        Similarities, float32 [b, k], descending, and rows of the bank, int64 [b, k]; where
        similarities are equal the lower row comes first, and is the one that is kept.
    """
    similarity, index = faiss.knn(
        queries, bank, min(k + 1, len(bank)), metric=faiss.METRIC_INNER_PRODUCT
    )
    if k < len(bank):
        # faiss keeps any of several equals. Where the cut runs through equals, choose again.
        through = np.flatnonzero(similarity[:, k - 1] == similarity[:, k])
        similarity, index = similarity[:, :k].copy(), index[:, :k].copy()
        for row in through:
            every = bank @ queries[row]  # [N]
            least = np.partition(every, len(every) - k)[len(every) - k]
            above, equal = np.flatnonzero(every > least), np.flatnonzero(every == least)
            index[row] = np.concatenate([above, equal[: k - len(above)]])
            similarity[row] = every[index[row]]
    order = np.lexsort((index, -similarity), axis=-1)
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(index, order, 1)


def classify(
    train_features: Tensor | np.ndarray,
    train_labels: Tensor | np.ndarray,
    test_features: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 of the weighted vote, in per cent, for each k.

    Features are taken as given: pass them through `normalise` for cosine similarity.

    Args:
        train_features: float [N, D], the bank. train_labels: int [N], any values.
        test_features: float [M, D], the queries. test_labels: int [M].
        ks: how many neighbours vote. More than the bank holds means the whole bank, with a warning.
        temperature: T, in units of similarity.

    Raises:
        ValueError: an empty split, k < 1, T <= 0, shapes that do not match, or a feature that is
            not finite.
    """
    bank, bank_labels = _checked("training", train_features, train_labels)
    queries, query_labels = _checked("test", test_features, test_labels)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"training features have {bank.shape[1]} numbers, test features {queries.shape[1]}"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"every k must be 1 or more, got {list(ks)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if max(ks) > len(bank):
        warnings.warn(
            f"k = {max(ks)} asks for more neighbours than the {len(bank)} training images; "
            "all of them vote",
            stacklevel=2,
        )
    clipped = {k: min(k, len(bank)) for k in sorted(ks)}
    classes, bank_class, query_class = class_indices(bank_labels, query_labels)
    found: dict[int, list[Tensor]] = {k: [] for k in clipped}
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        similarity, index = neighbours(bank, queries[block], max(clipped.values()))
        # Measured from the nearest, no temperature overflows, and a vote never vanishes.
        nearer = torch.from_numpy(similarity - similarity[:, :1]).double()
        weight = (nearer / temperature).exp().clamp_min(1e-300)  # [b, k]
        voter = torch.from_numpy(bank_class[index])  # [b, k]
        votes = torch.zeros(len(weight), len(classes), dtype=torch.float64)
        target = torch.from_numpy(query_class[block])
        counted = 0
        for k, reach in clipped.items():
            votes.scatter_add_(1, voter[:, counted:reach], weight[:, counted:reach])
            counted = reach
            found[k].append(ranks(votes, target, floor=0.0))
    return {k: top1_top5(torch.cat(found[k])) for k in ks}


def evaluate(
    train: Features,
    val: Features,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
) -> list[Row]:
    """Result rows (not signed yet) of cosine k-NN with `train` as the bank and `val` as queries.

    Raises:
        UsageError: a split without labels.
    """
    train_labels, val_labels = labels_of(train), labels_of(val)
    began = time.perf_counter()
    scores = classify(
        normalise(train.features),
        train_labels,
        normalise(val.features),
        val_labels,
        ks,
        temperature,
    )
    seconds = time.perf_counter() - began
    return [
        row_of("k-NN", {"k": k, "temperature": temperature}, scores[k], train, val, seconds=seconds)
        for k in ks
    ]


def labels_of(features: Features) -> Tensor:
    """The labels, int64 [N]. Raises UsageError where there are none."""
    if features.labels is None:
        raise UsageError(f"{features.data} has no labels to score against")
    return features.labels


def row_of(
    protocol: str,
    settings: dict[str, object],
    score: tuple[float, float],
    train: Features,
    val: Features,
    seconds: float,
    notes: Sequence[str] = (),
) -> Row:
    """A result row, not signed yet, of an evaluation on features; skipped images are noted."""
    skipped = [
        f"{len(split.skipped)} images of {split.data} could not be read"
        for split in (train, val)
        if split.skipped
    ]
    return Row(
        protocol=protocol,
        settings=dict(settings),
        top1=score[0],
        top5=score[1],
        data=train.data if train.data == val.data else f"{train.data} -> {val.data}",
        transform=val.transform,
        train_size=len(train.features),
        val_size=len(val.features),
        seconds=round(seconds, 3),
        notes=[*skipped, *notes],
    )


def _checked(
    split: str, features: Tensor | np.ndarray, labels: Tensor | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    table = torch.as_tensor(features).detach().cpu().float().contiguous().numpy()
    marks = torch.as_tensor(labels).detach().cpu().numpy()
    if table.ndim != 2 or not len(table):
        raise ValueError(f"{split} features must be [images, width] and not empty: {table.shape}")
    if marks.shape != (len(table),):
        raise ValueError(f"{len(table)} {split} features, but labels of shape {marks.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"a {split} feature is not finite")
    return table, marks
