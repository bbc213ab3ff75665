"""How long a run will take, from the steps that it has made; and how durations and sizes are written."""

import time
from collections.abc import Callable
from typing import Any

from xdino.values import span

LEAST_SECONDS = 3.0  # between the first logged step and the first forecast
LEAST_STEPS = 2


class Remaining:
    """The first forecast of a run under way; what is left later, `console.Pace` says.

    Its pace is that since the first logged step, with everything between steps: states that are
    written, and evaluations. What comes before is left out, for kernels are compiled in it.

    Args:
        iteration: at which it starts; iterations: at which it ends.
    """

    def __init__(
        self, iteration: int, iterations: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.iteration, self.iterations, self.clock = iteration, iterations, clock
        self._began = clock()
        self._first: tuple[float, int] | None = None
        self._last = 0
        self._told = False

    def look(self, row: dict[str, Any]) -> str | None:
        """Take a row of metrics.jsonl; the first forecast, once, when there is one."""
        now, done = self.clock(), int(row["iteration"])
        back, self._last = done <= self._last, done
        if self._first is None or back:
            self._first = now, done
            return None
        began, first = self._first
        left = (now - began) / (done - first) * (self.iterations - done)
        early = now - began < LEAST_SECONDS or done - first < LEAST_STEPS
        if self._told or early or done >= self.iterations:
            return None
        self._told = True
        memory = row.get("peak_memory_mb", row.get("resident_mb"))
        held = f", {binary_bytes(memory * 2**20)}" if memory else ""
        return (
            f"about {span(now - self._began + left)} for "
            f"{self.iterations - self.iteration:,} steps{held}; revised as it goes"
        )


def binary_bytes(size: float) -> str:
    """
    >>> binary_bytes(2 * 2**30), binary_bytes(300_000_000), binary_bytes(1234)
    ('2.0 GiB', '286 MiB', '1 KiB')
    """
    for unit, one in (("TiB", 2**40), ("GiB", 2**30)):
        if size >= one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
