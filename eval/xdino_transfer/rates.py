"""Learning rates of detection and segmentation, iteration by iteration (mmcv 1.3's), and groups.

Golden vectors `lr_schedules` (`poly_80000`, `step_700`): `poly` and `steps`.
"""

from collections.abc import Sequence

import numpy as np
from torch import nn

from xdino.errors import UsageError
from xdino.schedules import Array


def _warmed(rates: Array, iterations: int, ratio: float) -> Array:
    """`rates`, the first `iterations` of them times what rises from `ratio` to 1 in a line."""
    i = np.arange(min(iterations, len(rates)))
    rates[: len(i)] *= 1 - (1 - i / max(iterations, 1)) * (1 - ratio)
    return rates


def poly(
    iterations: int,
    peak: float,
    power: float = 1.0,
    warmup: int = 1500,
    warmup_ratio: float = 1e-6,
    min_lr: float = 0.0,
) -> Array:
    """From `peak` down to `min_lr` as (1 - i / iterations) ** power, float64 [iterations].

    Raises:
        UsageError: a warm-up that is longer than the run.
    """
    _check(warmup, iterations)
    left = (1 - np.arange(iterations) / max(iterations, 1)) ** power
    return _warmed((peak - min_lr) * left + min_lr, warmup, warmup_ratio)


def steps(
    epochs: int,
    steps_per_epoch: int,
    peak: float,
    at: Sequence[int] = (27, 33),
    warmup: int = 500,
    warmup_ratio: float = 0.001,
    factor: float = 0.1,
) -> Array:
    """`peak`, times `factor` from each of the epochs `at` on, float64 [epochs * steps_per_epoch].

    The warm-up counts iterations, also where it spans epochs.

    Raises:
        UsageError: a warm-up that is longer than the run.
    """
    _check(warmup, epochs * steps_per_epoch)
    passed = (np.arange(epochs)[:, None] >= np.array(at, np.int64)).sum(1)
    return _warmed(np.repeat(peak * factor**passed, steps_per_epoch), warmup, warmup_ratio)


def _check(warmup: int, iterations: int) -> None:
    if not 0 <= warmup <= iterations:
        raise UsageError(
            f"a warm-up of {warmup:,} iterations does not fit into a run of {iterations:,}"
        )


def only_norms(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups of what is trained: decayed, and what has "norm" in its name, which is not.

    As published: LayerNorms are spared, while BatchNorms, biases, LayerScale and XCA's temperature
    are decayed.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if "norm" in name else decayed).append(parameter)
    groups = (
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    )
    return [{**group, "lr_scale": 1.0} for group in groups if group["params"]]
