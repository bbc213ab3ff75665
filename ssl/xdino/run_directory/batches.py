"""How a start of a run shares out the run's images a step, on the processes that there are now.

`train.batch_size` and `train.accumulate` are of a process, so what must stay is their product with the
number of processes. Where nobody gives others, they are worked out. On a CPU a micro-batch keeps its
images over all processes, which share one memory; on GPUs no process takes more than it had, which fit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdino.config import RunConfig
from xdino.errors import UsageError
from xdino.runtime.batch_layout import BatchLayout, shared_out

KEYS = ("train.batch_size", "train.accumulate")
FACT = "batch"  # of a start in environment.json: how the run's first one shared a step out


def of_config(config: RunConfig, processes: int) -> BatchLayout:
    return BatchLayout(config.train.batch_size, config.train.accumulate, processes)


def first_of(before: RunConfig, start: Mapping[str, Any]) -> BatchLayout | None:
    """How the run's first start shared a step out, by its last one; None where nothing tells."""
    processes = start.get("processes")
    if found := BatchLayout.from_dict(start.get(FACT)):
        return found
    if type(processes) is int and processes > 0:  # a run of before this was written down
        return of_config(before, processes)
    return None


def mixes(config: RunConfig) -> bool:
    """Whether images are mixed with each other, so that a process needs an even number."""
    return bool(getattr(config, "mixes", False))


def of_start(
    path: Path,
    before: RunConfig,
    given: RunConfig,
    first: BatchLayout,
    processes: int,
    on_cpu: bool,
) -> BatchLayout:
    """How this start of the run `before` shares a step out.

    Raises:
        UsageError: what is given comes to other images a step, or so many processes cannot share.
    """
    as_given = of_config(given, processes)
    if as_given.total == first.total:
        return as_given
    known = [(first.batch_size, first.accumulate)]
    known += [(before.train.batch_size, before.train.accumulate)]
    if (as_given.batch_size, as_given.accumulate) not in known:
        share, left = divmod(first.total, as_given.micro)
        mend = f"--train.accumulate {share} makes up for it, or" if not left else "for that"
        raise UsageError(
            f"{path} takes {first.total:,} images a step, and {as_given.sentence()} are "
            f"{as_given.total:,}: {mend} leave train.batch_size and train.accumulate out"
        )
    most = None if on_cpu else max(size for size, _ in known)
    try:
        return shared_out(first.total, processes, first.micro, most, mixes(given))
    except UsageError as error:
        raise UsageError(f"{path} goes on as it began: {error}") from None


def told(first: BatchLayout, last: BatchLayout, now: BatchLayout, pairs: bool) -> str | None:
    """A sentence where the last start shared a step out otherwise: how now, and what that changes.

    pairs: images are mixed with each other, within what a process had at a time when the run began.
    """
    if now == last:
        return None
    sentence = f"{now.sentence()} make the run's {now.total:,} images a step"
    a, b = now.batch_size, first.batch_size
    apart = pairs and a % b and b % a
    if now.micro == first.micro and not apart:
        return f"{sentence}: the same numbers but for rounding"
    if now.micro != first.micro:
        sentence += (
            f". BatchNorm and losses that compare images see {now.micro:,} at a time, "
            f"{first.micro:,} when the run began: other numbers, by some per cent of the loss in a "
            "run of 8 images a step"
        )
    return sentence + (f". Mixed are {a:,} images at a time, {b:,} then" if apart else "")
