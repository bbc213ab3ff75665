"""Weighted nearest neighbours: the accuracy of frozen features without anything trained.

Each of the k most similar training images votes for its class with weight exp(similarity / T)
(Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4; DINO, section 3.2 and table 2, with
k = 20 and T = 0.07). The published loop searches once for each k, keeps a [queries, classes] vote
for every class of ImageNet, and refuses small splits. Here the bank is searched once, at the
largest k, in blocks (see `search`); smaller k are slices of it, all temperatures vote on it, and any
number of images or classes will do. Where the published sort leaves the order to chance, it is
fixed: among equal similarities the earlier training image is the nearer, among equal votes the
lower class wins, and a class without a vote is never a prediction.

Protocols: `evaluate` (train votes on val, as published), `leave_one_out` (every image is judged by
the others), `few_shot` (banks of a few images a class, drawn several times).

Letters: N images of the bank (training), M queries, D width, K classes, b queries of a block.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdino import rng
from xdino.errors import UsageError
from xdino.runtime import distributed
from xdino_eval.accuracy import class_indices, ranks
from xdino_eval.features import Features
from xdino_eval.knn.search import (
    EXACT,
    Exact,
    How,
    JoinedTable,
    Searcher,
    Share,
    Table,
    UnitTable,
    read,
    recall,
    searcher,
    take,
    unpack,
    without,
)
from xdino_eval.results import Row

KS = (10, 20, 100, 200)
VOTES = 2048  # queries that vote at a time: bounds the votes to 16 MB for 1,000 classes
SAMPLE = 1000  # queries on which an index is compared with the exact search

Grid = dict[tuple[int, float], tuple[float, float]]
"""(k, temperature) -> top-1 and top-5 in per cent."""


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
    similarity, row = unpack(Exact(bank, EXACT).nearest(read(queries, slice(None)), k))
    return similarity.numpy(), row.numpy()


# --- the vote ---------------------------------------------------------------------------------


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


def vote(
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


def scores(
    bank: Split,
    queries: Split,
    ks: Sequence[int],
    temperatures: Sequence[float],
    how: How = EXACT,
    alone: bool = False,
) -> Scores:
    """Top-1 and top-5 of the weighted vote for every k and temperature, from one search.

    Where the splits are shares, every process calls this, and all of them get the scores of all.

    Args:
        alone: `queries` is `bank`, and an image has no vote on itself.
    """
    reach = sorted({min(k, len(bank.labels) - alone) for k in ks})
    classes, bank_class, query_class = class_indices(bank.labels, queries.labels)
    answers, exact = _searchers(bank, how)
    every = torch.from_numpy(bank_class)
    hits = np.zeros((len(temperatures), len(reach), 2), np.int64)
    sample = np.linspace(0, len(queries.labels) - 1, SAMPLE).astype(np.int64)
    recalled = np.zeros(len(reach) + 1)
    for owner, first, block in _blocks(queries, bank.table.shape[1], how.query_block):
        number = np.arange(first, first + len(block))
        keys = answers.nearest(block, reach[-1] + alone).cpu()
        keys = without(keys, number) if alone else keys
        if exact is not None:
            some = torch.from_numpy(np.isin(number, sample))
            wanted = exact.nearest(block[some], reach[-1] + alone)
            wanted = without(wanted, number[some.numpy()]) if alone else wanted
            shares = [recall(keys[some], wanted, k) for k in reach] if len(wanted) else 0
            recalled += np.append(shares, 1) * len(wanted)
        if owner != queries.rank:
            continue
        for part in torch.arange(len(block)).split(VOTES):
            similarity, row = unpack(keys[part])
            target = torch.from_numpy(query_class[number[part.numpy()]])
            for place, temperature in enumerate(temperatures):
                rank = vote(similarity, every[row], target, len(classes), reach, temperature)
                hits[place] += np.stack([(rank < top).sum(1).numpy() for top in (1, 5)], axis=1)
    if len(queries.counts) > 1:
        hits = np.sum(distributed.gather(hits), axis=0)
    percent = 100.0 * hits / len(queries.labels)
    place_of = {k: reach.index(min(k, len(bank.labels) - alone)) for k in ks}
    return Scores(
        {
            (k, temperature): (float(percent[t, place, 0]), float(percent[t, place, 1]))
            for k, place in place_of.items()
            for t, temperature in enumerate(temperatures)
        },
        {k: recalled[place] / recalled[-1] for k, place in place_of.items()} if exact else {},
        how.index_settings(max(bank.counts)),
    )


def _searchers(bank: Split, how: How) -> tuple[Searcher, Searcher | None]:
    """The searcher that `how` asks for; and the exact one to compare with, where that is not it."""

    def of_all(inner: Searcher | None) -> Searcher:
        if len(bank.counts) == 1 and inner is not None:
            return inner
        return Share(inner, bank.offset(bank.rank), len(bank.labels))

    own = bank.counts[bank.rank] > 0
    answers = of_all(searcher(bank.table, how) if own else None)
    if how.exact:
        return answers, None
    return answers, of_all(Exact(bank.table, replace(how, engine="auto")) if own else None)


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


def classify(
    train_features: Tensor | np.ndarray,
    train_labels: Tensor | np.ndarray,
    test_features: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    how: How = EXACT,
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
    bank = _checked("training", train_features, train_labels)
    queries = _checked("test", test_features, test_labels)
    _check_widths(bank, queries)
    _check_grid(ks, [temperature])
    _warn_of_small_bank(ks, len(bank.labels))
    found = scores(bank, queries, ks, [temperature], how).grid
    return {k: found[k, temperature] for k in ks}


# --- protocols on features --------------------------------------------------------------------

Pieces = Features | Sequence[Features]
"""The features of a split, in one piece or in several, one after the other."""


@dataclass(frozen=True)
class Part:
    """A split of unit features, and what a row says of it (of all processes where it is shared)."""

    split: Split
    data: str
    transform: str
    skipped: int


def evaluate(
    train: Pieces,
    val: Pieces,
    ks: Sequence[int] = KS,
    temperature: float | Sequence[float] = 0.07,
    how: How = EXACT,
    shared: bool = False,
) -> list[Row]:
    """Result rows (not signed yet) of cosine k-NN with `train` as the bank and `val` as queries.

    A row for every k and temperature, from one search.

    Args:
        shared: every process of the group calls this with its share of both splits (possibly
            nothing), and gets the rows of the whole.

    Raises:
        UsageError: a split without labels or images, or a feature that is not finite.
    """
    bank, queries = (part_of(split, how, shared, name) for split, name in
                     ((train, "training"), (val, "test")))  # fmt: skip
    return _rows("k-NN", bank, queries, ks, temperature, how)


def leave_one_out(
    features: Pieces,
    ks: Sequence[int] = KS,
    temperature: float | Sequence[float] = 0.07,
    how: How = EXACT,
    shared: bool = False,
    classes: Sequence[str] | None = None,
) -> list[Row]:
    """Rows as of `evaluate` where every image is a query and all the others are the bank.

    Raises:
        UsageError: as `evaluate`; or a class with a single image, which nobody could vote for.
    """
    part = part_of(features, how, shared, "training")
    few = _classes_below(2, part.split.labels, classes)
    if few:
        raise UsageError(
            f"leave-one-out needs 2 images of every class, and {part.data} has fewer of {few}"
        )
    return _rows("k-NN, leave-one-out", part, part, ks, temperature, how, alone=True)


def few_shot(
    train: Pieces,
    val: Pieces,
    shots: Sequence[int],
    repeats: int = 5,
    seed: int = 0,
    ks: Sequence[int] = KS,
    temperature: float | Sequence[float] = 0.07,
    how: How = EXACT,
    shared: bool = False,
    classes: Sequence[str] | None = None,
) -> list[Row]:
    """Rows as of `evaluate` with banks of `shots` images a class; accuracies are means over draws.

    A row for every number of shots, k and temperature; the spread (standard deviation of a sample)
    stands in its settings, every draw in its notes. A draw follows from (seed, repeat) alone, and
    fewer shots are the first of more.

    Raises:
        UsageError: as `evaluate`; or a class with fewer images than `shots`.
    """
    if not shots or min(shots) < 1 or repeats < 1:
        raise UsageError(f"shots and repeats must be 1 or more, got {list(shots)} and {repeats}")
    bank, queries = (part_of(split, how, shared, name) for split, name in
                     ((train, "training"), (val, "test")))  # fmt: skip
    few = _classes_below(max(shots), bank.split.labels, classes)
    if few:
        raise UsageError(
            f"{max(shots)} shots need {max(shots)} images of every class, and {bank.data} has "
            f"fewer of {few}"
        )
    rows = []
    for n in shots:
        draws = []
        for repeat in range(repeats):
            chosen = drawn(bank.split.labels, n, seed, repeat)
            few_images = replace(bank, split=bank.split.rows(chosen))
            draws.append(_rows(f"few-shot k-NN, {n} a class", few_images, queries, ks, temperature,
                               how, quiet=True))  # fmt: skip
        rows += [_mean_of(same, n, seed) for same in zip(*draws, strict=True)]
    return rows


def drawn(labels: np.ndarray, shots: int, seed: int, repeat: int) -> np.ndarray:
    """`shots` images of every class: ascending rows, int64 [shots * K], of labels int64 [N]."""
    draws = rng.raw(rng.Stream.FEW_SHOT, seed, repeat, len(labels))
    order = np.lexsort((draws, labels))
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, count)  # within the class
    return np.sort(order[place < shots])


def _mean_of(draws: Sequence[Row], shots: int, seed: int) -> Row:
    top1, top5 = (np.array([getattr(row, top) for row in draws]) for top in ("top1", "top5"))
    spread = [float(top.std(ddof=1)) if len(draws) > 1 else 0.0 for top in (top1, top5)]
    listed = ", ".join(f"{value:.2f}" for value in top1)
    return replace(
        draws[0],
        settings={
            **draws[0].settings,
            "shots": shots,
            "repeats": len(draws),
            "seed": seed,
            "top1_std": round(spread[0], 4),
            "top5_std": round(spread[1], 4),
        },
        top1=float(top1.mean()),
        top5=float(top5.mean()),
        seconds=round(sum(row.seconds for row in draws), 3),
        notes=[
            *draws[0].notes,
            f"mean of {len(draws)} draws, standard deviation {spread[0]:.2f} (top-1) and "
            f"{spread[1]:.2f} (top-5); top-1 of each: {listed}",
        ],
    )


def part_of(pieces: Pieces, how: How, shared: bool = False, name: str = "training") -> Part:
    """A split of unit features; where it is `shared`, with what all processes know of theirs.

    Raises:
        UsageError: no labels, or no images.
    """
    pieces = [pieces] if isinstance(pieces, Features) else list(pieces)
    full = [piece for piece in pieces if len(piece.features)]
    told = [
        (None if piece.labels is None else piece.labels.numpy(), piece.features.shape[1])
        for piece in full
    ]
    skipped = sum(len(piece.skipped) for piece in pieces)
    broken = sum(_not_finite(piece.features) for piece in full)
    facts = (told, skipped, broken)
    everyone = distributed.gather(facts) if shared else [facts]
    counted = [label for told, *_ in everyone for label, _ in told]
    widths = {width for told, *_ in everyone for _, width in told}
    if not counted:
        raise UsageError(f"{pieces[0].data} has no {name} image: there is nothing to score")
    if broken := sum(broken for *_, broken in everyone):
        raise UsageError(f"{broken} {name} features of {pieces[0].data} are not finite")
    if len(widths) > 1:
        raise ValueError(f"features of one split have different widths: {sorted(widths)}")
    if any(label is None for label in counted):
        raise UsageError(f"{pieces[0].data} has no labels to score against")
    tables: list[Table] = [piece.features for piece in full] or [torch.empty(0, *widths)]
    table = tables[0] if len(tables) == 1 else JoinedTable(tables)
    whole = isinstance(table, Tensor) and how.bank_block is None
    counts = tuple(
        sum(len(label) for label, _ in told if label is not None) for told, *_ in everyone
    )
    split = Split(
        normalise(table) if whole else UnitTable(table),  # type: ignore[arg-type]
        np.concatenate([label for label in counted if label is not None]),
        counts,
        name,
    )
    return Part(
        split, pieces[0].data, pieces[0].transform, sum(skipped for _, skipped, _ in everyone)
    )


def _not_finite(features: Tensor) -> int:
    """How many rows hold a number that is not finite; read in blocks, for it may lie on disk."""
    return sum(int((~block.isfinite().all(1)).sum()) for block in features.split(1 << 16))


def _rows(
    protocol: str,
    bank: Part,
    queries: Part,
    ks: Sequence[int],
    temperature: float | Sequence[float],
    how: How,
    alone: bool = False,
    quiet: bool = False,
) -> list[Row]:
    temperatures = [temperature] if isinstance(temperature, int | float) else list(temperature)
    _check_grid(ks, temperatures)
    _check_widths(bank.split, queries.split)
    voters = len(bank.split.labels) - alone
    if not quiet:
        _warn_of_small_bank(ks, voters)
    began = time.perf_counter()
    found = scores(bank.split, queries.split, ks, temperatures, how, alone)
    seconds = round(time.perf_counter() - began, 3)
    rows = []
    for k in ks:
        notes = [
            f"{part.skipped} images of {part.data} could not be read"
            for part in ((bank,) if alone else (bank, queries))
            if part.skipped
        ]
        settings: dict[str, Any] = dict(found.settings)
        if k > voters:
            notes.append(f"k = {k}, but all {voters} images of the bank voted: it has no more")
        if k in found.recall:
            sampled = min(SAMPLE, len(queries.split.labels))
            settings["recall"] = round(found.recall[k], 6)
            notes.append(
                f"{how.engine} found {100 * found.recall[k]:.2f} % of the exact {min(k, voters)} "
                f"nearest neighbours of {sampled:,} queries"
            )
        rows += [
            Row(
                protocol=protocol,
                settings={"k": k, "temperature": T, **settings},
                top1=found.grid[k, T][0],
                top5=found.grid[k, T][1],
                data=bank.data if bank.data == queries.data else f"{bank.data} -> {queries.data}",
                transform=queries.transform,
                train_size=len(bank.split.labels),
                val_size=len(queries.split.labels),
                seconds=seconds,
                notes=list(notes),
            )
            for T in temperatures
        ]
    return rows


# --- what is asked for ------------------------------------------------------------------------


def _checked(split: str, features: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Split:
    marks = torch.as_tensor(labels).detach().cpu().numpy()
    if len(features.shape) != 2 or not features.shape[0]:
        raise ValueError(
            f"{split} features must be [images, width] and not empty: {tuple(features.shape)}"
        )
    if marks.shape != (len(features),):
        raise ValueError(f"{len(features)} {split} features, but labels of shape {marks.shape}")
    table = features if isinstance(features, np.ndarray) else features.detach().cpu().float()
    return Split(table, marks, (len(features),), split)


def _check_widths(bank: Split, queries: Split) -> None:
    ours, theirs = bank.table.shape[1], queries.table.shape[1]
    if ours != theirs:
        raise ValueError(f"training features have {ours} numbers, test features {theirs}")


def _check_grid(ks: Sequence[int], temperatures: Sequence[float]) -> None:
    if not ks or min(ks) < 1:
        raise UsageError(f"every k must be 1 or more, got {list(ks)}")
    if not temperatures or not min(temperatures) > 0:
        raise UsageError(f"temperature must be positive, got {list(temperatures)}")


def _warn_of_small_bank(ks: Sequence[int], voters: int) -> None:
    if max(ks) > voters:
        warnings.warn(
            f"k = {max(ks)} asks for more neighbours than the {voters} training images; "
            "all of them vote",
            stacklevel=3,
        )


def _classes_below(count: int, labels: np.ndarray, classes: Sequence[str] | None) -> str:
    """ "cat (1), dog (2) and 7 more" of the classes with fewer images; empty where none has."""
    values, counts = np.unique(labels, return_counts=True)
    few = [
        f"{classes[v] if classes else f'class {v}'} ({c})"
        for v, c in zip(values.tolist(), counts.tolist(), strict=True)
        if c < count
    ]
    return ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
