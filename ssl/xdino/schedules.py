"""Schedules as arrays indexed by iteration (= completed optimisation steps).

The published shapes, kept with their two oddities: after a warm-up the peak appears twice, and the
final value is approached but never reached.

A run of T epochs that is extended by N keeps the values of its T epochs. Behind them every schedule
is what it would be there, had the run been planned for T + N epochs: with S steps an epoch and s_E
the schedule of E epochs,

    s(i) = s_T(i)          i < T S
    s(i) = s_{T+N}(i)      T S <= i < (T + N) S

but the learning rate rises to that curve instead of jumping: over W = w N S steps, w being the share
that warming up has of the run's own epochs, and r the last learning rate before the extension,

    lr(T S + j) = r + (j + 1) / (W + 1) (lr_{T+N}(T S + j) - r)      j < W

So a re-warmed cosine (as in SGDR, arXiv 1608.03983, and Ibrahim et al. 2024, arXiv 2403.08763) whose
peak grows with the length of the extension: a few epochs more disturb little, as many more as there
were begin at half the peak. The last values kept constant would train nothing: at the end of a run
the learning rate is min_lr, and a teacher of momentum 1 stands still. A second extension counts from
T + N. How much the shape helps was not measured.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

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


def risen(last: float, curve: Array, steps: int) -> Array:
    """`curve`, but for its first `steps` values, which rise (or fall) to it from `last`."""
    share = np.minimum((np.arange(len(curve)) + 1) / (steps + 1), 1)
    return np.where(share < 1, last + share * (curve - last), curve)


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

    def extended(self, longer: "Schedules", rise: int) -> "Schedules":
        """These, and behind them what `longer` has beyond them; see above.

        Args:
            longer: the same run planned for all the epochs, with this one's warm-ups.
            rise: steps in which the learning rate comes from its last value to that of `longer`.
        """
        done, joined = len(self), dict[str, Any]()
        for field in dataclasses.fields(self):
            own, others = getattr(self, field.name), getattr(longer, field.name)
            if isinstance(own, np.ndarray):
                joined[field.name] = np.concatenate((own, others[done:]))
        joined["lr"][done:] = risen(float(self.lr[-1]), longer.lr[done:], rise)
        return dataclasses.replace(self, **joined)
