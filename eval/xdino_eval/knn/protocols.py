"""k-NN protocols on features: what is the bank, what is asked, and the rows of results.

`evaluate`: train votes on val, as published. `leave_one_out`: every image is judged by the others.
`few_shot`: banks of a few images a class, drawn several times. The features of a split may come in
pieces, and from the processes of a group, each its share.

Letters: N images, D width, K classes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdino.errors import UsageError
from xdino.runtime import distributed, rng
from xdino_eval.features import Features
from xdino_eval.knn.search import EXACT, SearchOptions
from xdino_eval.knn.tables import JoinedTable, Table, UnitTable, normalise
from xdino_eval.knn.vote import KS, SAMPLE, Split, check, scores, warn_of_small_bank
from xdino_eval.results import Row

Pieces = Features | Sequence[Features]
"""The features of a split, in one piece or in several, one after the other."""


@dataclass(frozen=True)
class Part:
    """A split of unit features, and what a row says of it (of all processes where it is shared)."""

    split: Split
    data: str
    transform: str
    skipped: int


@dataclass(frozen=True)
class Draws:
    """Banks of few images: so many of every class, each number of them drawn several times."""

    shots: Sequence[int]
    repeats: int = 5
    seed: int = 0


def evaluate(
    train: Pieces,
    val: Pieces,
    ks: Sequence[int] = KS,
    temperature: float | Sequence[float] = 0.07,
    options: SearchOptions = EXACT,
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
    bank, queries = (part_of(split, options, shared, name) for split, name in
                     ((train, "training"), (val, "test")))  # fmt: skip
    return _rows("k-NN", bank, queries, ks, temperature, options)


def leave_one_out(
    features: Pieces,
    ks: Sequence[int] = KS,
    temperature: float | Sequence[float] = 0.07,
    options: SearchOptions = EXACT,
    shared: bool = False,
    classes: Sequence[str] | None = None,
) -> list[Row]:
    """Rows as of `evaluate` where every image is a query and all the others are the bank.

    Raises:
        UsageError: as `evaluate`; or a class with a single image, which nobody could vote for.
    """
    part = part_of(features, options, shared, "training")
    few = _classes_below(2, part.split.labels, classes)
    if few:
        raise UsageError(
            f"leave-one-out needs 2 images of every class, and {part.data} has fewer of {few}"
        )
    return _rows("k-NN, leave-one-out", part, part, ks, temperature, options, exclude_self=True)


def few_shot(
    train: Pieces,
    val: Pieces,
    draws: Draws,
    ks: Sequence[int] = KS,
    temperature: float | Sequence[float] = 0.07,
    options: SearchOptions = EXACT,
    shared: bool = False,
    classes: Sequence[str] | None = None,
) -> list[Row]:
    """Rows as of `evaluate` with banks of a few images a class; accuracies are means over draws.

    A row for every number of shots, k and temperature; the spread (standard deviation of a sample)
    stands in its settings, every draw in its notes. A draw follows from (seed, repeat) alone, and
    fewer shots are the first of more.

    Raises:
        UsageError: as `evaluate`; or a class with fewer images than `shots`.
    """
    shots, repeats = list(draws.shots), draws.repeats
    if not shots or min(shots) < 1 or repeats < 1:
        raise UsageError(f"shots and repeats must be 1 or more, got {shots} and {repeats}")
    bank, queries = (part_of(split, options, shared, name) for split, name in
                     ((train, "training"), (val, "test")))  # fmt: skip
    few = _classes_below(max(shots), bank.split.labels, classes)
    if few:
        raise UsageError(
            f"{max(shots)} shots need {max(shots)} images of every class, and {bank.data} has "
            f"fewer of {few}"
        )
    rows = []
    for n in shots:
        each = []
        for repeat in range(repeats):
            chosen = sample_shots(bank.split.labels, n, draws.seed, repeat)
            few_images = replace(bank, split=bank.split.rows(chosen))
            protocol = f"few-shot k-NN, {n} a class"
            each.append(_rows(protocol, few_images, queries, ks, temperature, options, quiet=True))
        rows += [_mean_of(same, n, draws.seed) for same in zip(*each, strict=True)]
    return rows


def sample_shots(labels: np.ndarray, shots: int, seed: int, repeat: int) -> np.ndarray:
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


def part_of(
    pieces: Pieces, options: SearchOptions, shared: bool = False, name: str = "training"
) -> Part:
    """A split of unit features; where it is `shared`, with what all processes know of theirs.

    Raises:
        UsageError: no labels, or no images.
    """
    pieces = [pieces] if isinstance(pieces, Features) else list(pieces)
    full = [piece for piece in pieces if len(piece.features)]
    facts = (
        [None if piece.labels is None else piece.labels.numpy() for piece in full],
        {piece.features.shape[1] for piece in full},
        sum(_not_finite(piece.features) for piece in full),
        sum(len(piece.skipped) for piece in pieces),
    )
    everyone = distributed.gather(facts) if shared else [facts]
    labels, widths, broken, skipped = zip(*everyone, strict=True)
    data, width = pieces[0].data, set().union(*widths)
    if not width:
        raise UsageError(f"{data} has no {name} image: there is nothing to score")
    if sum(broken):
        raise UsageError(f"{sum(broken)} {name} features of {data} are not finite")
    if len(width) > 1:
        raise ValueError(f"features of one split have different widths: {sorted(width)}")
    if any(label is None for own in labels for label in own):
        raise UsageError(f"{data} has no labels to score against")
    split = Split(
        _unit_table([piece.features for piece in full] or [torch.empty(0, *width)], options),
        np.concatenate([label for own in labels for label in own]),
        tuple(sum(map(len, own)) for own in labels),
        name,
    )
    return Part(split, data, pieces[0].transform, sum(skipped))


def _unit_table(features: Sequence[Tensor], options: SearchOptions) -> Table:
    """One table of them all, of unit length: at once, or as it is read where it may lie on disk."""
    if len(features) == 1 and options.bank_block is None:
        return normalise(features[0])
    return UnitTable(features[0] if len(features) == 1 else JoinedTable(features))


def _not_finite(features: Tensor) -> int:
    """How many rows hold a number that is not finite; read in blocks, for it may lie on disk."""
    return sum(int((~block.isfinite().all(1)).sum()) for block in features.split(1 << 16))


def _rows(
    protocol: str,
    bank: Part,
    queries: Part,
    ks: Sequence[int],
    temperature: float | Sequence[float],
    options: SearchOptions,
    exclude_self: bool = False,
    quiet: bool = False,
) -> list[Row]:
    temperatures = [temperature] if isinstance(temperature, int | float) else list(temperature)
    check(bank.split, queries.split, ks, temperatures)
    voters = len(bank.split.labels) - exclude_self
    if not quiet:
        warn_of_small_bank(ks, voters)
    began = time.perf_counter()
    found = scores(bank.split, queries.split, ks, temperatures, options, exclude_self)
    seconds = round(time.perf_counter() - began, 3)
    rows = []
    for k in ks:
        notes = [
            f"{part.skipped} images of {part.data} could not be read"
            for part in ((bank,) if exclude_self else (bank, queries))
            if part.skipped
        ]
        settings: dict[str, Any] = dict(found.settings)
        if k > voters:
            notes.append(f"k = {k}, but all {voters} images of the bank voted: it has no more")
        if k in found.recall:
            sampled = min(SAMPLE, len(queries.split.labels))
            settings["recall"] = round(found.recall[k], 6)
            notes.append(
                f"{options.engine} found {100 * found.recall[k]:.2f} % of the exact {min(k, voters)} "
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


def _classes_below(count: int, labels: np.ndarray, classes: Sequence[str] | None) -> str:
    """ "cat (1), dog (2) and 7 more" of the classes with fewer images; empty where none has."""
    values, counts = np.unique(labels, return_counts=True)
    few = [
        f"{classes[v] if classes else f'class {v}'} ({c})"
        for v, c in zip(values.tolist(), counts.tolist(), strict=True)
        if c < count
    ]
    return ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
