"""Schedules as arrays indexed by iteration (= completed optimisation steps).

The published shapes, kept with their two oddities: after a warm-up the peak appears twice, and the
final value is approached but never reached.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xdino.errors import UsageError

Array = NDArray[np.float64]


def cosine(
    base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: float = 0
) -> Array:
    """Linear warm-up from 0 to `base`, then half a cosine down (or up) to `final`.

    Returns:
        float64 `[epochs * steps_per_epoch]`.

    Raises:
        UsageError: a warm-up that is longer than the run.
    """
    total = epochs * steps_per_epoch
    warmup = round(warmup_epochs * steps_per_epoch)
    if not 0 <= warmup <= total:
        raise UsageError(
            f"a warm-up of {warmup_epochs:g} epochs does not fit into a run of {epochs} epochs"
        )
    i = np.arange(total - warmup)
    decay = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / max(len(i), 1)))
    return np.concatenate((np.linspace(0, base, warmup), decay))


def teacher_temperature(
    warmup: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int
) -> Array:
    """A table of one value an epoch: linear from `warmup` to `final`, then constant.

    Returns:
        float64 `[epochs * steps_per_epoch]`, constant within an epoch.

    Raises:
        UsageError: a warm-up that is longer than the run.
    """
    if not 0 <= warmup_epochs <= epochs:
        raise UsageError(
            f"a teacher temperature warm-up of {warmup_epochs} epochs does not fit into a run of "
            f"{epochs} epochs"
        )
    table = np.concatenate(
        (np.linspace(warmup, final, warmup_epochs), np.full(epochs - warmup_epochs, final))
    )
    return np.repeat(table, steps_per_epoch)


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say of one optimisation step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's exponential moving average
    teacher_temp: float
    freeze_last_layer: bool


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run, each float64 `[total iterations]`."""

    lr: Array
    weight_decay: Array
    momentum: Array
    teacher_temp: Array
    frozen_iterations: int  # the head's last layer does not move in the first ones

    def __len__(self) -> int:
        return len(self.lr)

    def at(self, iteration: int) -> StepSettings:
        return StepSettings(
            lr=float(self.lr[iteration]),
            weight_decay=float(self.weight_decay[iteration]),
            momentum=float(self.momentum[iteration]),
            teacher_temp=float(self.teacher_temp[iteration]),
            freeze_last_layer=iteration < self.frozen_iterations,
        )
