"""A grid of linear probes for about the price of one.

What a probe over images costs is the backbone, not the head. So one pass over the images trains a
head for every learning rate, weight decay and choice of features side by side (DINOv2,
https://arxiv.org/abs/2304.07193, appendix B.3, whose thirteen learning rates are the default). Over
features extracted once there is nothing but heads: thirteen are thirteen times the arithmetic, in
one product instead of thirteen and shared out over the cores. Each head is the probe of
`linear.sgd_probe` to rounding: the same start, the same batches, a cosine per epoch, an optimiser
state of its own. The published grid reports the best head of the reported split; here a held-out
part of the training split chooses, no head is trained on it, and the reported split scores the
chosen head alone.

Letters: N images, B images of a batch, D width, K classes, G heads on one choice of features.
"""

import itertools
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from xdino.errors import RunFailed, UsageError, nearest
from xdino_eval.backbone_tokens import FEATURES, PooledTokens, needs_both
from xdino_eval.features import Features, Progress, evaluating
from xdino_eval.linear.probe import Trained, Trial, check
from xdino_eval.linear.probe_state import Unfinished
from xdino_eval.linear.sgd import (
    SECONDS_BETWEEN,
    OverImages,
    Sgd,
    continued,
    held_out,
    new_head,
    probe_of,
    shuffled,
    small_products_alone,
)
from xdino_eval.linear.stacked_heads import Heads, threads_for, top1_of_heads, train_heads

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass(frozen=True)
class Grid:
    """Which probes are trained side by side, and how one of them is chosen.

    lrs: for a batch of 256, scaled with the batch. features: "class" is what the backbone returns,
    "patches" the mean of the patch tokens before class attention, "both" the two in a row.
    holdout: the fraction of the training split that chooses, taken evenly from every class.

    Raises:
        UsageError: a value that makes no sense, or one that comes twice.
    """

    lrs: tuple[float, ...] = LRS
    weight_decays: tuple[float, ...] = (0.0,)
    features: tuple[str, ...] = ("class",)
    holdout: float = 0.1

    def __post_init__(self) -> None:
        for name in self.features:
            if name not in FEATURES:
                raise UsageError(f'no choice of features "{name}"; {nearest(name, FEATURES)}')
        for what, values in vars(self).items():
            if isinstance(values, tuple) and not 0 < len(values) == len(set(values)):
                raise UsageError(f"{what} must name each value once, got {list(values)}")
        if not all(0 < lr < math.inf for lr in self.lrs):
            raise UsageError(f"learning rates must be positive, got {list(self.lrs)}")
        if not all(0 <= decay < math.inf for decay in self.weight_decays):
            raise UsageError(f"weight decays must be 0 or more, got {list(self.weight_decays)}")
        if not 0 < self.holdout < 1:
            raise UsageError(f"holdout must lie between 0 and 1, got {self.holdout}")

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(lr, weight decay) of the G heads on one choice of features."""
        return list(itertools.product(self.lrs, self.weight_decays))

    @property
    def head_lrs(self) -> list[float]:
        """The learning rate of each of the G heads."""
        return [lr for lr, _ in self.pairs]

    def columns(self, width: int) -> dict[str, slice]:
        """Where each choice of features lies in what `PooledTokens` returns, `[B, width]`."""
        every, half = slice(0, width), width // 2
        if not needs_both(self.features):
            return dict.fromkeys(self.features, every)
        places = {"class": slice(0, half), "patches": slice(half, width), "both": every}
        return {name: places[name] for name in self.features}


@dataclass(frozen=True)
class Choice:
    """The head that the held-out images choose, and what a results row says of the whole grid."""

    features: str
    lr: float
    weight_decay: float
    head: nn.Linear
    told: dict[str, object]
    notes: list[str]

    def settings(self, how: Sgd, augmentation: str) -> dict[str, object]:
        """The chosen probe's, and the grid that it was chosen from."""
        chosen = replace(how, lr=self.lr, weight_decay=self.weight_decay)
        return chosen.settings(augmentation) | self.told

    def read(self, found: Features, columns: dict[str, slice]) -> Features:
        """The columns that the chosen head reads."""
        return replace(found, features=found.features[:, columns[self.features]])


def choose(
    stacks: dict[str, Heads], grid: Grid, columns: dict[str, slice], held: Features, target: Tensor
) -> Choice:
    """The head with the best top-1 on `held`; of equals the first in the order of the grid.

    Args:
        held: features of held-out images of the training split. target: their classes, [N].

    Raises:
        RunFailed: every head has diverged.
    """
    x, target = (
        value.to(next(iter(stacks.values())).weight.device) for value in (held.features, target)
    )
    best: tuple[float, str, int] | None = None
    table: dict[str, float | None] = {}
    for name, heads in stacks.items():
        for place, top1 in enumerate(top1_of_heads(heads, x[:, columns[name]], target)):
            lr, decay = grid.pairs[place]
            table[f"{name}, lr {lr}, wd {decay}"] = None if top1 is None else round(top1, 4)
            if top1 is not None and (best is None or top1 > best[0]):
                best = (top1, name, place)
    if best is None:
        raise RunFailed("every probe of the grid diverged; lower the learning rates")
    top1, name, place = best
    lr, decay = grid.pairs[place]
    notes = [f"{what}: diverged" for what, score in table.items() if score is None]
    if len(grid.lrs) > 1 and lr in (min(grid.lrs), max(grid.lrs)):
        notes.append(f"lr = {lr:g} is an end of the grid")
    told: dict[str, object] = {
        "features": name,
        "lrs": list(grid.lrs),
        "weight_decays": list(grid.weight_decays),
        "features_tried": list(grid.features),
        "chosen_by": "top-1 on images held out of train, on which no head is trained",
        "holdout": grid.holdout,
        "holdout_size": len(x),
        "holdout_top1": round(top1, 4),
        "holdout_top1_of_grid": table,
    }
    return Choice(name, lr, decay, stacks[name].head(place), told, notes)


def new_stacks(
    grid: Grid, columns: dict[str, slice], classes: int, seed: int, device: torch.device | str
) -> dict[str, Heads]:
    """Untrained heads for every choice of features."""
    decays = torch.tensor([decay for _, decay in grid.pairs], device=device)
    return {
        name: Heads(new_head(place.stop - place.start, classes, seed, device), decays)
        for name, place in columns.items()
    }


def split(classes: np.ndarray, grid: Grid, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, int64, of the images to train on and of those held out.

    Raises:
        UsageError: too few images to hold any out.
    """
    mask = held_out(classes, grid.holdout, seed)
    if not mask.any() or mask.all():
        raise UsageError(
            f"{len(classes)} training images are too few to hold out {grid.holdout:g} of them"
        )
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def grid_probe(images: OverImages, grid: Grid | None = None, how: Sgd | None = None) -> Trained:
    """`linear.sgd_probe` for a whole grid: one pass over augmented images trains every head.

    Args:
        how: but for lr and weight_decay, which are the grid's.

    Raises:
        UsageError: a split without labels, features that the backbone does not give, too few
            images. RunFailed: nothing could be read, or every head diverged.
    """
    grid, how = grid or Grid(), how or Sgd()
    network = PooledTokens(images.backbone, grid.features)
    trial = Trial("linear, SGD grid", images.labels())
    to_train, to_choose = split(trial.train_class, grid, how.seed)
    val = images.look(network, images.val, how.batch_size)  # moves the backbone too
    held = images.look(network, images.train, how.batch_size, to_choose)
    columns = grid.columns(val.features.shape[1])
    stacks = new_stacks(grid, columns, len(trial.classes), how.seed, images.where)
    views = images.augmented(network, trial.train_class, to_train, how)
    unfinished = images.unfinished(grid, how)
    with evaluating(images.backbone):
        start = train_heads(
            stacks, views.batches, columns, grid.head_lrs, how, images.progress, unfinished
        )
    train = views.trained_on()
    train.skipped.extend(held.skipped)
    target = torch.from_numpy(trial.train_class[held.indices.numpy()])
    choice = choose(stacks, grid, columns, held, target)
    settings = choice.settings(how, views.describe())
    notes = [*choice.notes, *continued(start)]
    probe = probe_of(choice.head, trial.classes, choice.features)
    return trial.end(probe, settings, train, choice.read(val, columns), notes, unfinished)


def grid_probe_features(
    train: Features,
    val: Features,
    grid: Grid | None = None,
    how: Sgd | None = None,
    device: torch.device | str = "cpu",
    keep_in: Path | str | None = None,
    progress: Progress | None = None,
    cores: int | None = None,
) -> Trained:
    """`grid_probe` on features extracted once, by `PooledTokens` with the grid's choice of features.

    Args:
        cores: over which the heads are shared out (None: those of this process). Their number
            changes sums in the last digit.

    Raises:
        UsageError: a split without labels, splits of different widths, or too few images.
        RunFailed: a feature is not finite, or every head diverged.
    """
    grid, how = grid or Grid(), how or Sgd()
    trial = Trial("linear, SGD grid on features", check(train, val))
    to_train, to_choose = (torch.from_numpy(i) for i in split(trial.train_class, grid, how.seed))
    columns = grid.columns(train.features.shape[1])
    stacks = new_stacks(grid, columns, len(trial.classes), how.seed, device)
    table, target = train.features[to_train].to(device), torch.from_numpy(trial.train_class)
    batches = partial(shuffled, table, target[to_train].to(device), how)
    unfinished = Unfinished.of(
        keep_in, "grid", train.features, target, grid, how, seconds=SECONDS_BETWEEN
    )
    threads = threads_for(stacks, how.batch_size, cores or os.cpu_count() or 1)
    largest = max(heads.weight.numel() for heads in stacks.values())
    with small_products_alone(how.batch_size * largest):
        start = train_heads(
            stacks, batches, columns, grid.head_lrs, how, progress, unfinished, threads
        )
    held = replace(train, features=train.features[to_choose])
    choice = choose(stacks, grid, columns, held, target[to_choose])
    probe = probe_of(choice.head, trial.classes, choice.features)
    settings, notes = choice.settings(how, "none"), [*choice.notes, *continued(start)]
    trained_on = replace(train, features=table)
    return trial.end(probe, settings, trained_on, choice.read(val, columns), notes, unfinished)
