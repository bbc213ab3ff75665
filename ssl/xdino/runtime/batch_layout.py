"""How the images of a step are shared out among processes and micro-batches.

A run keeps its images a step, by which its schedules and its order of images were laid out, and so
does its number of micro-batches where that can be: BatchNorm and whatever else compares images see a
micro-batch of all processes at a time, so that as many images at a time give the same numbers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from xdino.errors import UsageError


@dataclass(frozen=True)
class BatchLayout:
    """batch_size: images a process and micro-batch. accumulate: micro-batches a step."""

    batch_size: int
    accumulate: int
    processes: int

    @property
    def micro(self) -> int:
        """Images of a micro-batch over all processes."""
        return self.batch_size * self.processes

    @property
    def total(self) -> int:
        """Images a step."""
        return self.micro * self.accumulate

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Any) -> "BatchLayout | None":
        """What `to_dict` gave; None where it is something else."""
        names = ("batch_size", "accumulate", "processes")
        if not isinstance(told, Mapping):
            return None
        found = {name: told[name] for name in names if type(told.get(name)) is int}
        return cls(**found) if len(found) == len(names) and min(found.values()) > 0 else None

    def sentence(self) -> str:
        """ "2 processes x 8 images x 1 micro-batch"."""
        return (
            f"{counted(self.processes, 'process', 'es')} x {counted(self.batch_size, 'image')} x "
            f"{counted(self.accumulate, 'micro-batch', 'es')}"
        )


def counted(number: int, what: str, plural: str = "s") -> str:
    """
    >>> counted(2, "process", "es")
    '2 processes'
    """
    return f"{number:,} {what}{plural if number != 1 else ''}"


def shared_out(
    total: int,
    processes: int,
    micro: int | None = None,
    most: int | None = None,
    pairs: bool = False,
) -> BatchLayout:
    """`total` images a step on so many processes.

    Args:
        micro: images of a micro-batch over all processes, to which the nearest is taken; None for as
            many as `most` allows.
        most: images of a process at a time at most.
        pairs: images are mixed with each other, so a process needs an even number.

    Raises:
        UsageError: they cannot be shared evenly; with the nearest numbers of processes that can.
    """
    share, left = divmod(total, processes)
    sizes = [] if left else _sizes(share, most, pairs)
    if not sizes:
        even = " into pairs" if pairs and not left else " evenly"
        raise UsageError(
            f"{total:,} images a step cannot be shared{even} by "
            f"{counted(processes, 'process', 'es')}: start {_nearest(total, processes, pairs)}"
        )
    wanted = total if micro is None else micro
    size = min(sizes, key=lambda size: (abs(size * processes - wanted), -size))
    return BatchLayout(size, share // size, processes)


def _sizes(share: int, most: int | None, pairs: bool) -> list[int]:
    """Of the images that a process has of a step, how many it may take at a time."""
    small = [n for n in range(1, int(share**0.5) + 1) if share % n == 0]
    found = {*small, *(share // n for n in small)}
    return [n for n in found if (most is None or n <= most) and not (pairs and n % 2)]


def _nearest(total: int, processes: int, pairs: bool) -> str:
    """ "2 or 4": the numbers of processes below and above that share evenly."""
    fits = [n for n in range(1, total + 1) if total % n == 0 and not (pairs and total // n % 2)]
    below, above = [n for n in fits if n < processes], [n for n in fits if n > processes]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1])) or "with an even number of images"
