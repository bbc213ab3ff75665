"""How a run looks to whoever started it: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Container, Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from xdino.job import Listener
from xdino.values import span
from xdino_eval.results import Row
from xdino_launch.remaining import Remaining

QUIET_SECONDS = 10.0  # between two plain lines
LONGEST_SETTING = 16  # characters of a setting that a table shows
WIDE = 120  # columns of a terminal on which a table of results has all of its own
NOTHING = "-"  # where a row has no such number
TEXTS = ("protocol", "settings", "features", "data")


class _Bar(Progress):
    """A run's bar on one line and its numbers on the next: both whole on 80 columns."""

    numbers = ""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers)


class Pace:
    """How long a run still takes, by the rows of late: whatever its speed, evaluations included."""

    ROWS = 20

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._rows: deque[tuple[int, float]] = deque(maxlen=self.ROWS)

    def left(self, iteration: int, now: float) -> str:
        """ "2 h 10 min left", from the second row on; nothing at the end."""
        self._rows.append((iteration, now))
        first, began = self._rows[0]
        if iteration <= first or iteration >= self._iterations:
            return ""
        each = (now - began) / (iteration - first)
        return f"{span((self._iterations - iteration) * each)} left"


class ConsoleListener(Listener):
    """Draws a run on standard error, so that standard output stays for results."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()
        self.progress: _Bar | None = None
        self._last_line = 0.0
        self._iterations = 0
        self._pace = Pace(0)
        self._remaining: Remaining | None = None
        #: The row of the network before its first step, if it was scored; scores are told beside it.
        self.untrained: dict[str, Any] = {}
        self._began = "untrained"
        self._score = ""

    def __enter__(self) -> "ConsoleListener":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def started(self, facts: dict[str, Any]) -> None:
        self._iterations = facts["iterations"]
        self._pace = Pace(self._iterations)
        self._remaining = Remaining(facts["iteration"], facts["iterations"])
        if facts.get("doing") == "fine-tuning":
            self._began = "at first"
        images = f"{facts['total_batch']} image{'s' if facts['total_batch'] > 1 else ''}"
        verb = "continuing" if facts["iteration"] else facts.get("doing", "pretraining")
        self.notice(
            f"{verb} on {facts['images']:,} images of {facts['data']}: iteration "
            f"{facts['iteration']:,} of {facts['iterations']:,}, {facts['steps_per_epoch']:,} an "
            f"epoch, {images} a step, peak lr {facts['peak_lr']:.3g}, "
            f"{facts['precision']} on {facts['device']}"
        )
        if self.console.is_terminal:
            self.progress = _Bar(self.console)
            self.progress.add_task(
                "", total=self._iterations, completed=facts["iteration"], epoch=0, left=""
            )
            self.progress.start()

    def step(self, row: dict[str, Any]) -> None:
        numbers = _numbers(row)
        if "loss" not in row and (scores := _scores(row, self.untrained, self._began)):
            if row["iteration"] == 0:
                self.untrained = row
            numbers += scores
            self._score = scores[0]
        left = self._pace.left(row["iteration"], time.monotonic()) if "loss" in row else ""
        if self._remaining is not None and (forecast := self._remaining.look(row)):
            self.notice(forecast)
        if self.progress is not None:
            task = self.progress.task_ids[0]
            self.progress.update(task, completed=row["iteration"], epoch=row["epoch"])
            if "loss" in row:
                self.progress.numbers = " · ".join(filter(None, [*numbers, self._score]))
                self.progress.update(task, left=left)
        due = time.monotonic() - self._last_line >= QUIET_SECONDS
        due = due or row["iteration"] == self._iterations
        if "loss" not in row or (self.progress is None and due):
            if "loss" in row:
                self._last_line = time.monotonic()
            where = f"epoch {row['epoch']} · iteration {row['iteration']:,}/{self._iterations:,}"
            self.notice(" · ".join([where, *numbers, *([left] if left else [])]))

    def notice(self, sentence: str) -> None:
        """Wrapped on a terminal, between words; one line elsewhere, for whoever searches a log."""
        self.console.print(sentence, soft_wrap=not self.console.is_terminal, markup=False)


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


def _scores(row: dict[str, Any], untrained: dict[str, Any], began: str = "untrained") -> list[str]:
    """What an evaluation found: "knn_top1 41.2 (untrained 9.8, chance 1.6)"."""
    shown = []
    for key, value in row.items():
        if key in _NO_SCORES or key.startswith("chance_"):
            continue
        guess = row.get(f"chance_{key.partition('_')[2]}")
        beside = [] if key not in untrained else [f"{began} {_brief(untrained[key])}"]
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


def print_results(rows: Iterable[Row], console: Console | None = None) -> None:
    """Rows on standard output, whole at 80 columns: what all of them share stands below the table."""
    console, rows = console or stdout_console(), list(rows)
    shared = _shared(rows) if console.width < WIDE else {}
    console.print(results_table(rows, shared))
    for name, value in shared.items():
        if value != NOTHING:
            console.print(f"{name}: {value}")
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        console.print(f"note: {note}", soft_wrap=not console.is_terminal)


def results_table(rows: Iterable[Row], without: Container[str] = ()) -> Table:
    """The rows for a terminal: accuracies in per cent, one line a row, metrics where there are any.

    without: columns to leave out.
    """
    rows = list(rows)
    columns = {name: values for name, values in _columns(rows).items() if name not in without}
    out = Table(title=None, header_style="bold", pad_edge=False)
    for name in columns:
        if name in TEXTS:
            out.add_column(name, overflow="fold")
        elif name.startswith("metrics"):
            out.add_column(name, no_wrap=True)
        else:
            out.add_column(name, justify="right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        out.add_row(*cells)
    return out


def _columns(rows: list[Row]) -> dict[str, list[str]]:
    """What a table shows of the rows, by its heading."""
    settings = [
        ", ".join(
            f"{name} {_short(value)}"
            for name, value in row.settings.items()
            if len(_short(value)) <= LONGEST_SETTING  # the file has them all
        )
        for row in rows
    ]
    unit = "" if any(row.protocol.startswith("quality") for row in rows) else ", per cent"
    named = {f"metrics{unit}": [_lines(row.metrics, ".2f" if unit else ".4g") for row in rows]}
    return {
        "protocol": [row.protocol for row in rows],
        "settings": settings,
        "features": [row.features for row in rows],
        "data": [row.data for row in rows],
        **(named if any(row.metrics for row in rows) else {}),
        "top-1": [_per_cent(row.top1) for row in rows],
        "top-5": [_per_cent(row.top5) for row in rows],
        "train": [f"{row.train_size:,}" for row in rows],
        "val": [f"{row.val_size:,}" for row in rows],
        "s": [f"{row.seconds:.1f}" for row in rows],
    }


def _shared(rows: list[Row]) -> dict[str, str]:
    """What is the same in all rows and needs no column; what no row has, as well."""
    columns = _columns(rows)
    same = {name: columns[name][0] for name in columns if rows and len(set(columns[name])) == 1}
    told = {
        name: same[name]
        for name in ("features", "data", "train", "val", "settings")
        if name in same
    }
    return told | {name: NOTHING for name in ("top-1", "top-5") if same.get(name) == NOTHING}


def _per_cent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _lines(metrics: dict[str, float], form: str) -> str:
    """One line a metric, the values under each other."""
    longest = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{longest}} {value:6{form}}" for name, value in metrics.items())


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"{_short(value[0])}..{_short(value[-1])} ({len(value)})"
    return str(value)
