"""Did pretraining pay? Classifiers side by side: from scratch, on frozen features, from weights.

Their val scores stand over steps and over minutes of training, since frozen features make a step
cheaper. Minutes are worked out from the logged images a second; evaluations are left out. Where a run
has logged no speed, there are steps alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xdino_launch.report.curves import draw_lines, is_number, series
from xdino_launch.report.run import ABSENT, Run, names_of

SCORE = "val_top1"


@dataclass(frozen=True)
class Line:
    """A run in the comparison; `at_step`, `at_minute`: its top-1 where all runs have been."""

    name: str
    start: str
    images: str
    at_step: float | None
    at_minute: float | None
    best: float | None


@dataclass(frozen=True)
class Comparison:
    """step, minute: up to which all runs were scored. curves: inline SVG."""

    lines: list[Line]
    step: int
    minute: float | None
    curves: str


def start_of(run: Run) -> str:
    """What it began with, in words."""
    if run.value("train.init") in (ABSENT, "null", "~", ""):
        return "from scratch"
    blocks = run.value("model.frozen")
    return "fine-tuned" if blocks in (ABSENT, "0") else f"frozen, {blocks} blocks"


def images_of(run: Run) -> str:
    """How many images it learned from, in words."""
    each, share = run.value("data.images_a_class"), run.value("data.fraction")
    if each not in (ABSENT, "null", "~", ""):
        return f"{each} a class"
    return "all" if share in (ABSENT, "1.0", "1") else f"share {share}"


def minutes(run: Run, iterations: np.ndarray) -> np.ndarray | None:
    """Minutes of training up to each of the iterations [N], by the middle of the logged speeds.

    None where no speed was logged: a row right after a saved state has none.
    """
    _, speeds = series(run.metrics, "images_per_second")
    batch = images_a_step(run)
    if not len(speeds) or batch is None:
        return None
    return iterations * batch / max(float(np.median(speeds)), 1e-9) / 60


def images_a_step(run: Run) -> float | None:
    """The total batch; None where the files do not say."""
    said = [run.value("train.batch_size"), run.value("train.accumulate")]
    if not all(word.isdecimal() for word in said):
        return None
    processes: Any = run.starts[-1].get("processes", 1) if run.starts else 1
    return float(said[0]) * float(said[1]) * (processes if is_number(processes) else 1)


def compare(runs: Sequence[Run]) -> Comparison | None:
    """The comparison of two runs or more; None where fewer than two were scored."""
    scored = [(run, *series(run.metrics, SCORE)) for run in runs]
    scored = [(run, x, y) for run, x, y in scored if len(x)]
    if len(scored) < 2:
        return None
    found = [minutes(run, x) for run, x, _ in scored]
    spent = [m for m in found if m is not None]
    timed = len(spent) == len(scored)
    step = min(x[-1] for _, x, _ in scored)
    minute = min(m[-1] for m in spent) if timed else None
    names = names_of([run for run, _, _ in scored])
    lines = [
        Line(
            name,
            start_of(run),
            images_of(run),
            _upto(x, y, step),
            None if minute is None else _upto(spent[place], y, minute),
            max(y[x > 0], default=None),
        )
        for place, (name, (run, x, y)) in enumerate(zip(names, scored, strict=True))
    ]
    labels = [f"{line.name}: {line.start}" for line in lines]
    curves = draw_lines(
        "top-1 over steps, per cent",
        "iteration",
        [(label, x, y) for label, (_, x, y) in zip(labels, scored, strict=True)],
    )
    if timed:
        curves += draw_lines(
            "top-1 over minutes of training, per cent",
            "minutes",
            [(label, m, y) for label, (_, _, y), m in zip(labels, scored, spent, strict=True)],
        )
    return Comparison(lines, int(step), minute, curves)


def _upto(x: np.ndarray, y: np.ndarray, end: float) -> float | None:
    """The last score up to `end`."""
    reached = y[x <= end + 1e-9]
    return float(reached[-1]) if len(reached) else None
