"""Learning rates of supervised training: the published values, epoch by epoch, and a smooth cosine.

The published code drives timm's cosine once after each epoch, so epochs 0 and 1 both run at the
warm-up's first value, and epoch e > 0 has the value of time e - 1. Only the peak is scaled with the
batch; the lowest rate is not, and may lie above a small peak (then the rate rises).
"""

import numpy as np

from xdino import schedules
from xdino.errors import UsageError
from xdino.schedules import Array


def scaled(lr: float, total_batch: int, per: int = 512) -> float:
    """The peak for a batch: `lr` is meant for `per` images."""
    return lr * total_batch / per


def published(
    epochs: int,
    peak: float,
    warmup_epochs: int = 5,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-5,
) -> Array:
    """One rate an epoch, float64 [epochs]. `min_lr` equal to `peak`: constant after the warm-up.

    Raises:
        UsageError: a warm-up that is longer than the run.
    """
    if not 0 <= warmup_epochs <= epochs:
        raise UsageError(
            f"a warm-up of {warmup_epochs} epochs does not fit into a run of {epochs} epochs"
        )
    time = np.maximum(np.arange(epochs) - 1, 0).astype(np.float64)
    ramp = warmup_lr + time * (peak - warmup_lr) / max(warmup_epochs, 1)
    # The cosine does not know of the warm-up: it has been running for as long when that ends.
    decay = min_lr + 0.5 * (peak - min_lr) * (1 + np.cos(np.pi * time / max(epochs, 1)))
    return np.where(time < warmup_epochs, ramp, decay)


def by_epoch(rates: Array, steps_per_epoch: int) -> Array:
    """One rate an epoch -> one a step, float64 [epochs * steps_per_epoch]."""
    return np.repeat(rates, steps_per_epoch)


def smooth(
    epochs: int, steps_per_epoch: int, peak: float, warmup_epochs: float = 5, min_lr: float = 0.0
) -> Array:
    """Ours, for short runs: warm-up from 0 and half a cosine, one rate a step.

    Raises:
        UsageError: a warm-up that is longer than the run.
    """
    return schedules.cosine(peak, min_lr, epochs, steps_per_epoch, warmup_epochs)
