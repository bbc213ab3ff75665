"""What judges a run while it trains and at its end, on fixed subsets of two labelled sources.

`knn_callback` makes the function that is handed to a trainer. `linear_at_end` is for the backbone
that the run has written: by then nothing can disturb training any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from torch import nn

from xdino import rng
from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino_eval.features import Features, device_of, extract, labels_of
from xdino_eval.knn import classify, normalise
from xdino_eval.linear.grid import grid_probe_features
from xdino_eval.linear.logistic import logistic_probe
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform, Judged

AT_END = "at the end of pretraining, images of a split at most"


def knn_callback(
    train_source: Source,
    val_source: Source,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    limit: int | None = None,
    batch_size: int = 128,
    workers: int = 2,
    precision: str = "fp32",
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a backbone to its k-NN accuracies in per cent.

    The keys are "knn_top1" and "knn_top5" for the first of `ks`, "knn_top1_k100" and so on for
    the others. The network is judged where it lies and comes back in the mode it was in; no random
    number is drawn from any generator that training uses.

    Args:
        limit: at most so many images of each source, the same in every call; None = all.

    Raises:
        UsageError: a source without labels.
    """
    for source in (train_source, val_source):
        if source.labels is None:
            raise UsageError(f"k-NN needs labels, and {source.name} has none")
    if train_source.classes != val_source.classes:
        raise UsageError(
            f"{train_source.name} and {val_source.name} number their classes differently"
        )

    def evaluate(backbone: nn.Module) -> dict[str, float]:
        train, val = (
            _features(backbone, source, limit, batch_size, workers, precision)
            for source in (train_source, val_source)
        )
        scores = classify(
            normalise(train.features),
            labels_of(train),
            normalise(val.features),
            labels_of(val),
            ks,
            temperature,
        )
        out: dict[str, float] = {}
        for place, k in enumerate(ks):
            suffix = f"_k{k}" if place else ""
            out["knn_top1" + suffix], out["knn_top5" + suffix] = scores[k]
        return out

    return evaluate


def _features(
    backbone: nn.Module,
    source: Source,
    limit: int | None,
    batch_size: int,
    workers: int,
    precision: str,
) -> Features:
    """Features of a fixed subset of `source`, the same images in every call."""
    transform = EvalTransform.of(cast(Judged, backbone))
    subset = fixed_subset(len(source), limit)
    return extract(
        backbone, source, transform, batch_size,
        workers=workers, precision=precision, indices=subset,
    )  # fmt: skip


def linear_at_end(
    backbone: nn.Module,
    train_source: Source,
    val_source: Source,
    protocol: str,
    limit: int | None = None,
    batch_size: int = 128,
    workers: int = 2,
    precision: str = "fp32",
) -> Row:
    """A linear probe's row, not signed yet, with the limit on images among its settings.

    Args:
        backbone: judged where it lies. protocol: "logistic" or "grid", both on features extracted
            once.
        limit: at most so many images of each source, the same in every call; None = all.

    Raises:
        UsageError, RunFailed: as the protocol.
    """
    train, val = (
        _features(backbone, source, limit, batch_size, workers, precision)
        for source in (train_source, val_source)
    )
    if protocol == "grid":
        row = grid_probe_features(train, val, device=device_of(backbone)).row
    else:
        row = logistic_probe(train, val).row
    return replace(row, settings={**row.settings, AT_END: limit})


def fixed_subset(number: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the indices 0..number-1, ascending, int64; always the same ones."""
    if limit is None or limit >= number:
        return np.arange(number)
    chosen = rng.subset().choice(number, limit, replace=False)
    return np.sort(chosen)
