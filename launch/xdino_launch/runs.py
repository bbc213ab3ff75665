"""The runs in a folder: how far each is, who is at it, its best scores.

Read without torch, which takes seconds, and without touching a run: what is damaged is left out.
"""

import json
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.lock import holder_of
from xdino.values import span
from xdino_eval import results

DEEPEST = 3  # folders below the given one in which runs are looked for
# Columns of metrics.jsonl that say what a run with labels is worth, and their headings.
MEASURES = {"val_top1": "top-1", "val_miou": "mIoU", "val_box_ap": "box AP"}
LONGEST_HEADER = 10**8  # bytes of a safetensors file's header: the format's own limit


@dataclass(frozen=True)
class RunState:
    """A run as `xdino runs` tells it.

    `state`: "running", "finished", "stopped" (resumable) or "begun" (no weights yet). `knn`, `linear`:
    the best top-1 in per cent, of results.json or while training; `classifier`: that of a fine-tuned
    run, mIoU of a segmenter, box AP of a detector. `changed`: seconds since 1970.
    """

    path: str
    state: str
    iteration: int
    iterations: int | None
    epoch: int | None
    loss: float | None
    knn: float | None
    linear: float | None
    changed: float
    classifier: float | None = None
    measure: str | None = None  # which of the three that is


def find(folders: Iterable[Path]) -> list[Path]:
    """The runs among and below the folders, by name.

    Raises:
        UsageError: a folder is not there or cannot be looked into, or there is no run in any.
    """
    folders = list(folders)
    found: dict[Path, None] = {}
    for folder in folders:
        with asked(f"{folder} cannot be read"):
            if not folder.is_dir():
                raise UsageError(f"there is no folder {folder}")
            os.scandir(folder).close()
        found |= dict.fromkeys(_runs_below(folder, DEEPEST))
    if not found:
        raise UsageError(f"there is no run in {', '.join(map(str, folders))}")
    return list(found)


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
        return
    try:
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:  # not ours to look into
        return
    for entry in below if depth else ():
        if not entry.is_symlink() and not entry.name.startswith("."):
            yield from _runs_below(entry, depth - 1)


def describe(run: Path) -> RunState:
    """What the files of a run say; none of them has to be there or whole."""
    rows = _rows(run / "metrics.jsonl")
    facts = _facts(run / "backbone.safetensors")
    iteration, iterations = facts.get("iteration"), facts.get("iterations")
    last = {key: value for row in rows for key, value in row.items()}
    reached = max((n for n in (iteration, last.get("iteration")) if isinstance(n, int)), default=0)
    state = "begun"
    if holder_of(run) is not None:
        state = "running"
    elif iterations is not None and iteration == iterations:
        state = "finished"
    elif facts:
        state, reached = "stopped", iteration if isinstance(iteration, int) else reached
    files = [run / name for name in ("metrics.jsonl", "backbone.safetensors", "config.yaml")]
    knn, linear = _best(run / "results.json", rows)
    labelled = {key: [_number(row.get(key)) for row in rows if key in row] for key in MEASURES}
    measure = next((key for key, found in labelled.items() if found), None)
    return RunState(
        path=str(run),
        state=state,
        iteration=reached,
        iterations=iterations if isinstance(iterations, int) else None,
        epoch=last.get("epoch") if isinstance(last.get("epoch"), int) else None,
        loss=_number(last.get("loss")),
        knn=knn,
        linear=linear,
        changed=max(path.stat().st_mtime for path in files if path.exists()),
        classifier=max((s for s in labelled.get(measure or "", ()) if s is not None), default=None),
        measure=MEASURES.get(measure or ""),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short when the run was killed
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _facts(path: Path) -> dict[str, Any]:
    """What the header of our own weights says: iteration, iterations."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < LONGEST_HEADER else {}
        facts = json.loads(header["__metadata__"]["xdino"])["facts"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, struct.error):
        return {}
    return facts if isinstance(facts, dict) else {}


def _best(file: Path, logged: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The best top-1 of k-NN and of linear probes, whatever they were scored on."""
    knn = [_number(row.get("knn_top1")) for row in logged]
    linear = [_number(row.get("linear_top1")) for row in logged]
    try:
        judged = results.load(file)
    except RunFailed:
        judged = []
    for row in judged:
        if row.features.startswith(("raw pixels", "untrained")):  # the demo's baselines
            continue
        (knn if "k-NN" in row.protocol else linear if "linear" in row.protocol else []).append(
            row.top1
        )
    best = [max((s for s in scores if s is not None), default=None) for scores in (knn, linear)]
    return best[0], best[1]


def table(runs: Iterable[RunState], now: float | None = None) -> str:
    """A line a run, and the path on it whole; what is not known is a dash.

    Scores of runs that learned with labels have a column where there is one, called as they are, and
    "score" where they are of several kinds.
    """
    now, runs = time.time() if now is None else now, list(runs)
    measures = {run.measure or "top-1" for run in runs if run.classifier is not None}
    tuned = ("score",) if len(measures) > 1 else tuple(measures)
    rows: list[tuple[str, ...]] = [
        ("state", "iteration", "loss", "k-NN", "linear", *tuned, "changed", "run")
    ]
    for run in runs:
        of = f"/{run.iterations:,}" if run.iterations else ""
        rows.append(
            (
                run.state,
                f"{run.iteration:,}{of}",
                *(f"{n:.{d}f}" if n is not None else "-" for n, d in
                  ((run.loss, 3), (run.knn, 1), (run.linear, 1),
                   *((run.classifier, 1) for _ in tuned))),
                f"{span(now - run.changed)} ago",
                run.path,
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 1 <= i <= 4 + len(tuned) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
