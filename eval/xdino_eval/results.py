"""One schema for every number: a row says what was measured, on what, and how.

`results.json` is a list of flat objects that a person can read and `jq` can filter. A file is
written beside the old one and renamed, so a reader sees all the old rows or all the new ones. One
process appends at a time.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from xdino.errors import RunFailed
from xdino.files import written_beside

LONGEST_SETTING = 16  # characters of a setting that a table shows


@dataclass(frozen=True)
class Row:
    """One measurement and its protocol.

    `top1` and `top5` are in per cent, None for what is no classification; such a row has named
    `metrics` instead ("mAP medium", "J mean"), in per cent too. `seconds` is the wall clock of the
    evaluation (for cached features without their extraction), sizes count the images that could be
    read. `checkpoint` is a SHA-256 or a name, `features` says which: "teacher, iteration 1234" or
    "raw pixels".
    """

    protocol: str
    settings: dict[str, Any]
    top1: float | None
    top5: float | None
    data: str
    transform: str
    train_size: int
    val_size: int
    checkpoint: str = ""
    features: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def signed(rows: Iterable[Row], checkpoint: str, features: str) -> list[Row]:
    """The rows with their origin filled in: which weights, and which features of them."""
    return [replace(row, checkpoint=checkpoint, features=features) for row in rows]


def load(path: Path | str) -> list[Row]:
    """The rows of `path`; none if there is no such file. Rows from before a field was added lack it.

    Raises:
        RunFailed: the file is damaged or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    names = {f.name for f in fields(Row)}
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("not a list")
        for entry in entries:
            if set(entry) | {"metrics"} != names:  # rows of before metrics have none
                raise ValueError(f"a row with the fields {sorted(entry)}")
        return [Row(**entry) for entry in entries]
    except (ValueError, TypeError) as error:
        raise RunFailed(
            f"{path} does not hold result rows ({error}); nothing was written. "
            "Move it away, or mend it by hand"
        ) from error


def append(path: Path | str, rows: Sequence[Row]) -> None:
    """Add `rows` to the file at `path`, making it if need be.

    Raises:
        ValueError: a row without its origin (see `signed`), or with a number that is not finite.
        RunFailed: the existing file is damaged. It is left as it is.
    """
    for row in rows:
        if not row.checkpoint or not row.features:
            raise ValueError(f"a {row.protocol} row names no checkpoint or no features: sign it")
    path = Path(path)
    everything = [asdict(row) for row in [*load(path), *rows]]
    text = json.dumps(everything, indent=2, allow_nan=False, ensure_ascii=False)
    with written_beside(path) as beside:
        beside.write_text(text + "\n")


def table(rows: Iterable[Row]) -> Table:
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
