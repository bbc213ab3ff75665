"""The schedules of a configuration, laid out over its iterations."""

import math

import numpy as np
import torch

from xdino import config as configuration
from xdino import schedules
from xdino.config import Config
from xdino.errors import UsageError
from xdino.plan import feasibility
from xdino.schedules import Schedules

LARGEST_RATE = (
    1e30  # of what multiplies weights: float32 ends at 3e38, and Adam divides by 0.1 first
)


def schedules_of(config: Config, steps: int, total_batch: int) -> Schedules:
    """What changes along the run, laid out.

    Raises:
        UsageError: they are longer than memory, or larger than float32.
    """
    train = config.train
    feasibility.check_memory(
        f"the schedules of {train.all_epochs * steps:,} iterations",
        64 * train.all_epochs * steps,
        torch.device("cpu"),
        "lower train.epochs, or extend by fewer",
    )
    laid_out, epochs = _of_epochs(train.epochs, config, steps, total_batch), train.epochs
    warmup = configuration.in_epochs(config.optim.warmup_epochs, epochs) / epochs
    for further in train.extended:
        epochs += further
        longer = _of_epochs(epochs, config, steps, total_batch)
        laid_out = laid_out.extended(longer, rise=round(warmup * further * steps))
    return laid_out


def _of_epochs(epochs: int, config: Config, steps: int, total_batch: int) -> Schedules:
    """The schedules of a run of so many epochs, its warm-ups as long as those of `train.epochs`."""
    o, shape_of_run = config.optim, (epochs, steps)
    scale = total_batch / 256
    if o.lr_scaling == "sqrt":  # DINOv2's rule (arXiv 2304.07193), which counts from 1024 instead
        scale = math.sqrt(scale)
    temperature_epochs = round(
        configuration.in_epochs(config.loss.warmup_teacher_temp_epochs, config.train.epochs)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        laid_out = Schedules(
            lr=schedules.cosine(
                o.lr * scale,
                o.min_lr,
                *shape_of_run,
                warmup_epochs=configuration.in_epochs(o.warmup_epochs, config.train.epochs),
            ),
            weight_decay=schedules.cosine(o.weight_decay, o.weight_decay_end, *shape_of_run),
            momentum=schedules.cosine(
                config.teacher.momentum, config.teacher.momentum_end, *shape_of_run
            ),
            teacher_temp=schedules.teacher_temperature(
                config.loss.warmup_teacher_temp,
                config.loss.teacher_temp,
                *shape_of_run,
                temperature_epochs,
            ),
            frozen_iterations=o.freeze_last_layer * steps,
        )
        shrink = laid_out.lr * laid_out.weight_decay
    for values, key in (
        (laid_out.lr, "optim.lr or optim.min_lr"),
        (laid_out.weight_decay, "optim.weight_decay or optim.weight_decay_end"),
        (shrink, "optim.lr times optim.weight_decay"),
    ):
        if not np.all(np.abs(values) <= LARGEST_RATE):
            raise UsageError(
                f"{key} is too large: above {LARGEST_RATE:g}, weights overflow at once"
            )
    return laid_out
