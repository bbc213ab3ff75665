"""How a run looks to whoever started it: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from xdino.job import Listener
from xdino_eval.results import Row

QUIET_SECONDS = 10.0  # between two plain lines
LONGEST_SETTING = 16  # characters of a setting that a table shows


class ConsoleListener(Listener):
    """Draws a run on standard error, so that standard output stays for results."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()
        self.progress: Progress | None = None
        self._last_line = 0.0
        self._iterations = 0
        #: The row of the network before its first step, if it was scored; scores are told beside it.
        self.untrained: dict[str, Any] = {}
        self._score = ""

    def __enter__(self) -> "ConsoleListener":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def started(self, facts: dict[str, Any]) -> None:
        self._iterations = facts["iterations"]
        verb = "continuing" if facts["iteration"] else "pretraining"
        self.notice(
            f"{verb} on {facts['images']:,} images of {facts['data']}: iteration "
            f"{facts['iteration']:,} of {facts['iterations']:,}, {facts['steps_per_epoch']:,} an "
            f"epoch, {facts['total_batch']} images a step, peak lr {facts['peak_lr']:.3g}, "
            f"{facts['precision']} on {facts['device']}"
        )
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self.progress.add_task(
                "", total=self._iterations, completed=facts["iteration"], epoch=0, numbers=""
            )
            self.progress.start()

    def step(self, row: dict[str, Any]) -> None:
        told = _numbers(row)
        if "loss" not in row and (scores := _scores(row, self.untrained)):
            if row["iteration"] == 0:
                self.untrained = row
            told += scores
            self._score = scores[0]
        numbers = " · ".join(told)
        if self.progress is not None:
            task = self.progress.task_ids[0]
            self.progress.update(task, completed=row["iteration"], epoch=row["epoch"])
            if "loss" in row:
                self.progress.update(task, numbers=" · ".join(filter(None, [numbers, self._score])))
        due = time.monotonic() - self._last_line >= QUIET_SECONDS
        due = due or row["iteration"] == self._iterations
        if "loss" not in row or (self.progress is None and due):
            if "loss" in row:
                self._last_line = time.monotonic()
            self.notice(
                f"epoch {row['epoch']} · iteration {row['iteration']:,}/{self._iterations:,} · "
                + numbers
            )

    def notice(self, sentence: str) -> None:
        self.console.print(sentence, soft_wrap=True, markup=False)


def _numbers(row: dict[str, Any]) -> list[str]:
    shown = []
    if "loss" in row:
        shown = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.2e}"]
        if "images_per_second" in row:
            shown += [
                f"{row['images_per_second']:.0f} images/s",
                f"{100 * row['wait_share']:.0f} % waiting for data",
            ]
    if "skipped" in row:
        shown.append("left out")
    return shown


_NO_SCORES = ("iteration", "epoch", "skipped", "val_images")


def _scores(row: dict[str, Any], untrained: dict[str, Any]) -> list[str]:
    """What an evaluation found: "knn_top1 41.2 (untrained 9.8, chance 1.6)"."""
    shown = []
    for key, value in row.items():
        if key in _NO_SCORES or key.startswith("chance_"):
            continue
        guess = row.get(f"chance_{key.partition('_')[2]}")
        beside = [] if key not in untrained else [f"untrained {_brief(untrained[key])}"]
        beside += [] if guess is None else [f"chance {_brief(guess)}"]
        shown.append(f"{key} {_brief(value)}" + (f" ({', '.join(beside)})" if beside else ""))
    return shown


def _brief(value: float) -> str:
    """A decimal, or what there is of a number below one."""
    return f"{value:.1f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"


def counter(console: Console, verb: str) -> Any:
    """A (done, total) callback that says how far a long evaluation is, at most every few seconds."""
    last = [time.monotonic()]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - last[0] >= QUIET_SECONDS:
            last[0] = time.monotonic()
            console.print(f"{verb}: {done:,} of {total:,}", highlight=False)

    return tell


# Neither markup nor emoji: a folder may be called "[/]" or ":x:".
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def stderr_console() -> Console:
    return Console(stderr=True, **PLAIN)


def stdout_console() -> Console:
    """For results: as wide as the terminal, and wide enough for a table where there is none."""
    return Console(width=None if sys.stdout.isatty() else 140, **PLAIN)


def results_table(rows: Iterable[Row]) -> Table:
    """The rows for a terminal: accuracies in per cent, one line a row, metrics where there are any."""
    rows = list(rows)
    named = any(row.metrics for row in rows)
    out = Table(title=None, header_style="bold", pad_edge=False)
    for name in ("protocol", "settings", "features", "data"):
        out.add_column(name, overflow="fold")
    if named:
        out.add_column("metrics, per cent", no_wrap=True)
    for name in ("top-1", "top-5", "train", "val", "s"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row.protocol,
            ", ".join(
                f"{name} {_short(value)}"
                for name, value in row.settings.items()
                if len(_short(value)) <= LONGEST_SETTING  # the file has them all
            ),
            row.features,
            row.data,
            *([_lines(row.metrics)] if named else []),
            *("-" if value is None else f"{value:.2f}" for value in (row.top1, row.top5)),
            f"{row.train_size:,}",
            f"{row.val_size:,}",
            f"{row.seconds:.1f}",
        )
    return out


def _lines(metrics: dict[str, float]) -> str:
    """One line a metric, the values under each other."""
    longest = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{longest}} {value:6.2f}" for name, value in metrics.items())


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"{_short(value[0])}..{_short(value[-1])} ({len(value)})"
    return str(value)
