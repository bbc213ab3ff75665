"""Weighted nearest neighbours: the accuracy of frozen features without anything trained.

Each of the k most similar training images votes for its class with weight exp(similarity / T)
(Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4; DINO, section 3.2 and table 2, with
k = 20 and T = 0.07). The published loop searches once for each k, keeps a [queries, classes] vote
for every class of ImageNet, and refuses small splits. Here the bank is searched once, at the
largest k, in blocks (see `search`); smaller k are slices of it, all temperatures vote on it, and any
number of images or classes will do. Where the published sort leaves the order to chance, it is
fixed: among equal similarities the earlier training image is the nearer, among equal votes the
lower class wins, and a class without a vote is never a prediction.

Letters: N images of the bank (training), M queries, D width, K classes, b queries of a block.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdino.errors import UsageError
from xdino.runtime import distributed
from xdino_eval.accuracy import class_indices, ranks
from xdino_eval.knn.keys import recall, unpack, without_self
from xdino_eval.knn.search import EXACT, Searcher, SearchOptions, searcher
from xdino_eval.knn.sharding import ShardedSearcher
from xdino_eval.knn.tables import Table, as_float32, normalise, read, take

KS = (10, 20, 100, 200)
VOTES = 2048  # queries that vote at a time: bounds the votes to 16 MB for 1,000 classes
SAMPLE = 1000  # queries on which an index is compared with the exact search

Grid = dict[tuple[int, float], tuple[float, float]]
"""(k, temperature) -> top-1 and top-5 in per cent."""


@dataclass(frozen=True)
class Split:
    """Rows with labels: a whole split, or this process's share of one that all processes hold.

    table: float [n, D], this process's rows. labels: int64 [N], those of all processes in order of
    rank. counts: rows of each process. name: how a sentence calls it.
    """

    table: Table
    labels: np.ndarray
    counts: tuple[int, ...]
    name: str

    @property
    def rank(self) -> int:
        return distributed.rank() if len(self.counts) > 1 else 0

    def offset(self, rank: int) -> int:
        """The number, among all rows, of the first of `rank`."""
        return sum(self.counts[:rank])

    def rows(self, chosen: np.ndarray) -> "Split":
        """Only the rows `chosen`, int64, ascending numbers among all rows."""
        starts = [self.offset(rank) for rank in range(len(self.counts) + 1)]
        cuts = np.searchsorted(chosen, starts)
        own = chosen[cuts[self.rank] : cuts[self.rank + 1]] - starts[self.rank]
        counts = tuple(np.diff(cuts).tolist())
        return Split(take(self.table, own), self.labels[chosen], counts, self.name)


@dataclass(frozen=True)
class Scores:
    """What a search came to. recall: of each k, where an index was searched."""

    grid: Grid
    recall: dict[int, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


Array = Tensor | np.ndarray | Sequence[Any]


def knn(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """How well the nearest neighbours by cosine similarity tell the classes: top-1 and top-5 in per
    cent, for each k.

    Args:
        train_features: float [N, D], what votes. train_labels: [N], numbers or names.
        test_features: float [M, D], what is asked for. test_labels: [M].
        k: how many neighbours vote, or several such numbers.
        temperature: T, in units of similarity.

    Returns:
        {k: (top1, top5)}.

    Raises:
        ValueError: as `classify`.

    >>> knn([[1.0, 0.1], [0.1, 1.0]], ["cat", "dog"], [[2.0, 0.0]], ["cat"], k=1)
    {1: (100.0, 100.0)}
    """
    bank, queries = (normalise(as_float32(part)) for part in (train_features, test_features))
    marks = [np.asarray(torch.as_tensor(m).cpu() if isinstance(m, Tensor) else m)
             for m in (train_labels, test_labels)]  # fmt: skip
    if any(mark.ndim != 1 for mark in marks):
        raise ValueError(f"labels must be one an image, got shapes {[m.shape for m in marks]}")
    _, numbers = np.unique(np.concatenate(marks), return_inverse=True)
    ours, theirs = numbers[: len(marks[0])], numbers[len(marks[0]) :]
    ks = [k] if isinstance(k, int) else list(k)
    return classify(bank, ours, queries, theirs, ks, temperature)


def classify(
    train_features: Tensor | np.ndarray,
    train_labels: Tensor | np.ndarray,
    test_features: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    options: SearchOptions | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 of the weighted vote, in per cent, for each k.

    Features are taken as given: pass them through `normalise` for cosine similarity.

    Args:
        train_features: float [N, D], the bank. train_labels: int [N], any values.
        test_features: float [M, D], the queries. test_labels: int [M].
        ks: how many neighbours vote. More than the bank holds means the whole bank, with a warning.
        temperature: T, in units of similarity.
        options: None = exactly, on the device that the training features are on.

    Raises:
        ValueError: an empty split, k < 1, T <= 0, shapes that do not match, or a feature that is
            not finite.
    """
    if options is None:
        device = train_features.device if isinstance(train_features, Tensor) else EXACT.device
        options = SearchOptions.from_name("auto", device)
    bank = _split("training", train_features, train_labels)
    queries = _split("test", test_features, test_labels)
    check(bank, queries, ks, [temperature])
    warn_of_small_bank(ks, len(bank.labels))
    found = scores(bank, queries, ks, [temperature], options).grid
    return {k: found[k, temperature] for k in ks}


def _split(name: str, features: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Split:
    marks = torch.as_tensor(labels).detach().cpu().numpy()
    if len(features.shape) != 2 or not features.shape[0]:
        raise ValueError(
            f"{name} features must be [images, width] and not empty: {tuple(features.shape)}"
        )
    if marks.shape != (len(features),):
        raise ValueError(f"{len(features)} {name} features, but labels of shape {marks.shape}")
    table = features if isinstance(features, np.ndarray) else features.detach().cpu().float()
    return Split(table, marks, (len(features),), name)


def check(bank: Split, queries: Split, ks: Sequence[int], temperatures: Sequence[float]) -> None:
    """Refuse numbers of neighbours, temperatures and widths that nothing can be scored with."""
    if not ks or min(ks) < 1:
        raise UsageError(f"every k must be 1 or more, got {list(ks)}")
    if not temperatures or not min(temperatures) > 0:
        raise UsageError(f"temperature must be positive, got {list(temperatures)}")
    ours, theirs = bank.table.shape[1], queries.table.shape[1]
    if ours != theirs:
        raise ValueError(f"training features have {ours} numbers, test features {theirs}")


def warn_of_small_bank(ks: Sequence[int], voters: int) -> None:
    if max(ks) > voters:
        warnings.warn(
            f"k = {max(ks)} asks for more neighbours than the {voters} training images; "
            "all of them vote",
            stacklevel=3,
        )


def scores(
    bank: Split,
    queries: Split,
    ks: Sequence[int],
    temperatures: Sequence[float],
    options: SearchOptions = EXACT,
    exclude_self: bool = False,
) -> Scores:
    """Top-1 and top-5 of the weighted vote for every k and temperature, from one search.

    Where the splits are shares, every process calls this, and all of them get the scores of all.

    Args:
        exclude_self: `queries` is `bank`, and an image has no vote on itself.
    """
    voters = len(bank.labels) - exclude_self
    reach = sorted({min(k, voters) for k in ks})  # numbers of neighbours that vote
    classes, bank_class, query_class = class_indices(bank.labels, queries.labels)

    def nearest(searcher: Searcher, block: Tensor, number: np.ndarray) -> Tensor:
        keys = searcher.nearest(block, reach[-1] + exclude_self).cpu()
        return without_self(keys, number) if exclude_self else keys

    search = _sharded(bank, options)
    exact = None if options.exact else _sharded(bank, replace(options, engine="auto"))
    sample = np.linspace(0, len(queries.labels) - 1, SAMPLE).astype(np.int64)
    hits = np.zeros((len(temperatures), len(reach), 2), np.int64)
    recalled = np.zeros(len(reach) + 1)  # of each reach, summed over queries; how many these are
    for owner, first, block in _blocks(queries, bank.table.shape[1], options.query_block):
        number = np.arange(first, first + len(block))
        keys = nearest(search, block, number)
        sampled = np.isin(number, sample)
        if exact is not None and sampled.any():
            some = torch.from_numpy(sampled)
            wanted = nearest(exact, block[some], number[sampled])
            shares = [recall(keys[some], wanted, k) for k in reach]
            recalled += np.array([*shares, 1]) * len(wanted)
        if owner == queries.rank:
            target = query_class[number]
            hits += _hits(keys, bank_class, target, len(classes), reach, temperatures)
    if len(queries.counts) > 1:
        hits = np.sum(distributed.gather(hits), axis=0)
    percent = 100.0 * hits / len(queries.labels)
    place = {k: reach.index(min(k, voters)) for k in ks}
    grid = {
        (k, temperature): (float(percent[t, place[k], 0]), float(percent[t, place[k], 1]))
        for k in ks
        for t, temperature in enumerate(temperatures)
    }
    found = {} if exact is None else {k: recalled[place[k]] / recalled[-1] for k in ks}
    return Scores(grid, found, options.index_settings(max(bank.counts)))


def _sharded(bank: Split, options: SearchOptions) -> Searcher:
    """What `options` ask for, over the rows of all processes."""
    own = searcher(bank.table, options) if bank.counts[bank.rank] else None
    if len(bank.counts) == 1 and own is not None:
        return own
    return ShardedSearcher(own, bank.offset(bank.rank), len(bank.labels))


def _blocks(queries: Split, width: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """(process that holds them, number of the first, float32 [b, D]) of blocks of the queries."""
    for owner, count in enumerate(queries.counts):
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            if owner == queries.rank:
                block = read(queries.table, rows, name=queries.name)
            else:
                block = torch.empty(rows.stop - rows.start, width)
            if len(queries.counts) > 1:
                block = distributed.broadcast(block, owner)
            yield owner, queries.offset(owner) + start, block


def _hits(
    keys: Tensor,
    bank_class: np.ndarray,
    query_class: np.ndarray,
    classes: int,
    reach: Sequence[int],
    temperatures: Sequence[float],
) -> np.ndarray:
    """How many of b queries are right among one class and among five: int64 [temperatures, reach, 2]."""
    every, targets = torch.from_numpy(bank_class), torch.from_numpy(query_class)
    hits = np.zeros((len(temperatures), len(reach), 2), np.int64)
    for part, target in zip(keys.split(VOTES), targets.split(VOTES), strict=True):
        similarity, row = unpack(part)
        for place, temperature in enumerate(temperatures):
            rank = vote_ranks(similarity, every[row], target, classes, reach, temperature)
            hits[place] += np.stack([(rank < top).sum(1).numpy() for top in (1, 5)], axis=1)
    return hits


def vote_ranks(
    similarity: Tensor,
    voter: Tensor,
    target: Tensor,
    classes: int,
    reach: Sequence[int],
    temperature: float,
) -> Tensor:
    """The rank of the true class (see `accuracy.ranks`) for each number of voters: int64 [r, b].

    Args:
        similarity: float32 [b, k], descending. voter: int64 [b, k], classes of the neighbours.
        target: int64 [b]. reach: r ascending numbers of neighbours that vote, at most k.
    """
    # Measured from the nearest, no temperature overflows, and a vote never vanishes.
    nearer = (similarity - similarity[:, :1]).double()
    weight = (nearer / temperature).exp().clamp_min(1e-300)  # [b, k]
    votes = torch.zeros(len(weight), classes, dtype=torch.float64)
    found, counted = [], 0
    for k in reach:
        votes.scatter_add_(1, voter[:, counted:k], weight[:, counted:k])
        counted = k
        found.append(ranks(votes, target, floor=0.0))
    return torch.stack(found)
