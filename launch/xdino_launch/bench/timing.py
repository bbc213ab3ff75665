"""How things are timed here: arms in turn, round after round, and ratios within a round.

Machines that are shared, warm up and throttle make two timings taken minutes apart say little. So
every round runs every arm once, in one fixed order; a ratio is formed within each round, and only
the row of these ratios is judged. One arm always runs twice a round: how far the ratio of the two
is from 1 (the A/A ratio) is what the machine's noise looks like, and no other ratio is shown without
it.
"""

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from xdino.run_directory import commit
from xdino.runtime.atomic import written_beside
from xdino_launch.console import counter, stderr_console

CLAIM_ROUNDS = 9  # fewer rounds are a look, not a measurement
METHOD = (
    "median of the ratios within a round; one-sided 90 % bounds of the median by order statistics"
)
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "faiss-cpu")


@dataclass(frozen=True)
class Arm:
    """Something measured once a round: the round's number -> a value in the report's unit."""

    name: str
    measure: Callable[[int], float]


def again(arm: Arm) -> Arm:
    """The same arm once more, for the A/A ratio."""
    return Arm(f"{arm.name}, again", arm.measure)


def timed(
    work: Callable[[int], object], unit: float = 1.0, device: torch.device | None = None
) -> Callable[[int], float]:
    """What an arm measures that is timed: seconds of `work(round)`, divided by `unit`."""

    def synchronise() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(number: int) -> float:
        synchronise()
        began = time.perf_counter()
        work(number)
        synchronise()
        return (time.perf_counter() - began) / unit

    return measure


@dataclass(frozen=True)
class Interval:
    """A median with its one-sided 90 % bounds; none where there are too few values (below 4)."""

    median: float
    lower: float | None
    upper: float | None


def interval(values: Sequence[float]) -> Interval:
    """The median of `values` and its bounds by order statistics.

    The k-th smallest of n values lies above the true median with the probability that fewer than k
    of n tosses of a coin are heads. The largest k that keeps this at 10 % or less gives the lower
    bound, whatever the distribution: the third smallest of nine.
    """
    ordered, n = sorted(values), len(values)
    rank, chance = 0, 0.0
    while (chance := chance + math.comb(n, rank) / 2**n) <= 0.1:
        rank += 1
    lower, upper = (ordered[rank - 1], ordered[n - rank]) if rank else (None, None)
    return Interval(statistics.median(ordered), lower, upper)


@dataclass(frozen=True)
class Ratio:
    """`over` divided by `under` (names of arms), within each round."""

    name: str
    over: str
    under: str


@dataclass(frozen=True)
class Report:
    """What a benchmark measured.

    settings: what was run. unit: of the arms' values ("ms an image"). values: of each arm, one a
    round. ratios, figures: name -> one value a round (figures are in units of their own, named).
    facts: whatever else must be seen, such as accuracies.
    """

    benchmark: str
    settings: dict[str, Any]
    unit: str
    values: dict[str, list[float]]
    ratios: dict[str, list[float]]
    figures: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.values.values())))

    def to_dict(self, command: Sequence[str]) -> dict[str, Any]:
        """All of it as plain types, with the machine, the commit, the date and the command."""
        return {
            "benchmark": self.benchmark,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": " ".join(command),
            "commit": commit(),
            "machine": machine(),
            "settings": self.settings,
            "rounds": self.rounds,
            "unit": self.unit,
            "method": METHOD,
            "arms": {name: _summary(values) for name, values in self.values.items()},
            "ratios": {name: _summary(values) for name, values in self.ratios.items()},
            "figures": {name: _summary(values) for name, values in self.figures.items()},
            "facts": self.facts,
        }

    def tables(self) -> Iterator[Table]:
        """The arms, then the ratios and figures, for a terminal."""
        arms = Table(title=f"{self.benchmark}: {self.rounds} rounds", title_justify="left")
        for name in ("arm", f"median, {self.unit}", "middle half"):
            arms.add_column(name, justify="left" if name == "arm" else "right")
        for name, values in self.values.items():
            low, high = _middle_half(values)
            arms.add_row(name, f"{statistics.median(values):,.4g}", f"{low:,.4g} to {high:,.4g}")
        yield arms
        ratios = Table()
        for name in ("ratio", "median", "at least (90 %)", "at most (90 %)"):
            ratios.add_column(name, justify="left" if name == "ratio" else "right")
        for name, values in {**self.ratios, **self.figures}.items():
            found = interval(values)
            bounds = (found.lower, found.upper)
            ratios.add_row(
                name, f"{found.median:.3f}", *("-" if b is None else f"{b:.3f}" for b in bounds)
            )
        yield ratios


def _summary(values: Sequence[float]) -> dict[str, Any]:
    found = interval(values)
    return {
        "median": found.median,
        "lower90": found.lower,
        "upper90": found.upper,
        "values": list(values),
    }


def _middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def measure(
    arms: Sequence[Arm],
    rounds: int,
    warm_up: bool = True,
    seconds: float | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Each arm's values, one a round, arms in turn.

    Args:
        warm_up: run every arm once before, unmeasured (as round 0).
        seconds: begin no further round after this time.
        tell: told (rounds done, rounds).
    """
    values: dict[str, list[float]] = {arm.name: [] for arm in arms}
    began = time.monotonic()
    if warm_up:
        for work in dict.fromkeys(arm.measure for arm in arms):
            work(0)
    for number in range(rounds):
        for arm in arms:
            gc.collect()  # the rubbish of one arm is not swept in another's time
            values[arm.name].append(arm.measure(number))
        tell(number + 1, rounds)
        if seconds is not None and time.monotonic() - began > seconds:
            break
    return values


@dataclass(frozen=True)
class Protocol:
    """How often and with what: rounds, threads (0: all cores), seconds after which to stop."""

    rounds: int = 9
    threads: int = 1
    seconds: float | None = None

    @property
    def used_threads(self) -> int:
        return self.threads or cores()

    def measure(self, arms: Sequence[Arm], warm_up: bool = True) -> dict[str, list[float]]:
        """Each arm's values, one a round, on as many threads."""
        tell = counter(stderr_console(), "rounds")
        with on_cores(self.used_threads):
            return measure(arms, self.rounds, warm_up, self.seconds, tell)


def divided(
    values: Mapping[str, Sequence[float]], ratios: Iterable[Ratio]
) -> dict[str, list[float]]:
    """The ratios that name measured arms, a value a round; the A/A ratios (", again") first."""
    pairs = [
        Ratio(f"A/A: {name} / {name.removesuffix(', again')}", name, name.removesuffix(", again"))
        for name in values
        if name.endswith(", again")
    ]
    return {
        ratio.name: [a / b for a, b in zip(values[ratio.over], values[ratio.under], strict=True)]
        for ratio in (*pairs, *ratios)
        if ratio.over in values and ratio.under in values
    }


@contextmanager
def on_cores(threads: int, pinned: bool = False) -> Iterator[None]:
    """`threads` threads for torch; `pinned`: as many cores, for worker processes too (Linux)."""
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(threads)
    if pinned and cores:
        os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if pinned and cores:
            os.sched_setaffinity(0, cores)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator, versions."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("xdino", *PACKAGES)},
    }


def _cpu_model() -> str:
    """The processor's name, with family and model where the name says little."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in file.read_text().splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    name = facts.get("model name") or platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def write(report: Report, path: Path, command: Sequence[str]) -> None:
    """The report as a JSON file. `command`: the arguments of `xdino`."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(report.to_dict(["xdino", *command]), indent=2) + "\n")
