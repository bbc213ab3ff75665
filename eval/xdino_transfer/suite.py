"""Many data sets, several ways to use one backbone: what `xdino transfer` goes through, cell by cell.

A suite file has the data sets in its section `data`, and a section for each column:

    data:
      flowers: DATA/flowers102
      insects: DATA/inat
      insects.category: family
    knn:
      k: 20
    linear:
      protocol: logistic

Every finished cell is a row in DIR/results.json at once, and a suite that was stopped goes on at the
first cell that has none.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xdino import values
from xdino.backbone import Backbone
from xdino.config import sections
from xdino.data import Source
from xdino.errors import RunFailed, UsageError, nearest, world
from xdino.runtime.atomic import write_text
from xdino.runtime.lock import Lock
from xdino_eval import results
from xdino_eval.evaluators import KNN, PROBES, Linear
from xdino_eval.extraction import Options
from xdino_eval.results import Row
from xdino_transfer.datasets import open_labelled

FILE, RESULTS = "suite.json", "results.json"  # of the suite's folder
FEATURES = "features"  # of a data set's folder there, until its columns are done
SET, COLUMN = "set", "column"  # of a row's settings: which cell it is
_CATEGORY = "category"


@dataclass(frozen=True)
class DataSet:
    """A place with two labelled splits. category: of iNaturalist, the rank that is told apart."""

    path: str
    category: str = "name"

    def open(self, channels: int) -> tuple[Source, Source]:
        return open_labelled(self.path, channels, self.category)


@dataclass(frozen=True)
class Cell:
    """One column of one data set. folder: for what the column keeps, its own."""

    name: str
    data: DataSet
    train: Source
    val: Source
    folder: Path


Column = Callable[[Cell], list[Row]]
"""Signed rows of a cell; the last of them is what a table shows."""
Make = Callable[[Mapping[str, Any]], Column]
"""A column from the keys of its section. Raises UsageError for keys that it does not have."""


@dataclass(frozen=True)
class Suite:
    """What a file asks for. columns: the keys of each section, as texts."""

    data: dict[str, DataSet]
    columns: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path, known: Mapping[str, Make], usual: Sequence[str] = ()) -> "Suite":
        """
        Args:
            known: the columns that there are. usual: those that a file without one has; () for all.

        Raises:
            UsageError: no such file, no data, an unknown section or key; the message names the nearest.
        """
        if not path.is_file():
            raise UsageError(f"there is no suite file {path}")
        tree = sections(path)
        for name in tree:
            if name != "data" and name not in known:
                raise UsageError(f"{path}: {name} is no section: {nearest(name, ['data', *known])}")
        data = _data_of(path, tree.get("data") or {})
        asked_for = [name for name in known if name in tree] or [*(usual or known)]
        return cls(data, {name: dict(tree.get(name) or {}) for name in asked_for})

    def plain(self) -> dict[str, Any]:
        data = {name: {"path": d.path, _CATEGORY: d.category} for name, d in self.data.items()}
        return {"data": data, "columns": self.columns}


def _data_of(path: Path, told: Mapping[str, Any]) -> dict[str, DataSet]:
    found: dict[str, DataSet] = {}
    for key, value in told.items():
        name, dot, leaf = key.rpartition(".")
        if not isinstance(value, str):
            raise UsageError(
                f"{path}: data.{key} must be a folder or a name, got {values.shown(value)}"
            )
        if dot and leaf == _CATEGORY and name in found:
            found[name] = replace(found[name], category=str(value))
        elif not re.fullmatch(r"\w[\w -]{0,79}", key):
            raise UsageError(
                f"{path}: a data set is called by letters, digits, - and _ (its category by "
                f"NAME.{_CATEGORY} behind it), got {values.shown(key)}"
            )
        else:
            found[key] = DataSet(str(value))
    if not found:
        raise UsageError(f"{path} names no data: write NAME: FOLDER below data:")
    return found


def take(told: Mapping[str, Any], section: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section, each read by its kind (see `xdino.values`).

    Raises:
        UsageError: an unknown key, or a value that is none.
    """
    found = {}
    for key, text in told.items():
        if key not in kinds:
            raise UsageError(f"{section}.{key} is not a known key: {nearest(key, kinds)}")
        try:
            found[key] = values.read(kinds[key], text)
        except ValueError as error:
            raise UsageError(f"{section}.{key} {error}") from None
    return found


# Frozen features


def frozen_columns(backbone: Backbone, options: Options) -> dict[str, Make]:
    """k-NN and a linear probe of a backbone's frozen features, which are computed once for both."""

    def judged(evaluate: Any) -> Column:
        def column(cell: Cell) -> list[Row]:
            kept = replace(options, cache=cell.folder.parent / FEATURES)
            return evaluate(backbone, cell.train, cell.val, kept)

        return column

    def knn(told: Mapping[str, Any]) -> Column:
        keys = take(told, "knn", {"k": int, "temperature": float})
        k, temperature = keys.get("k", 20), keys.get("temperature", 0.07)
        if k < 1 or temperature <= 0:
            raise UsageError(
                f"knn.k must be 1 or more and knn.temperature above 0, got {k}, {temperature:g}"
            )
        return judged(KNN((k,), temperature))

    def linear(told: Mapping[str, Any]) -> Column:
        protocol = take(told, "linear", {"protocol": str}).get("protocol", "logistic")
        if protocol not in PROBES:
            raise UsageError(f'linear.protocol "{protocol}" is none: {nearest(protocol, PROBES)}')
        return judged(Linear(protocol))

    return {"knn": knn, "linear": linear}


# Going through


@dataclass(frozen=True)
class Going:
    """A suite in its folder. weights: SHA-256. say: is told which cell is worked on, and what failed."""

    suite: Suite
    columns: Mapping[str, Column]
    folder: Path
    weights: str
    channels: int
    say: Callable[[str], None] = lambda sentence: None

    def begin(self) -> None:
        """Write down what this folder is for, or see that it is the same.

        Raises:
            UsageError: the folder holds another suite, or something else; a data set is not whole.
        """
        file, mine = self.folder / FILE, {"weights": self.weights, **self.suite.plain()}
        if file.is_file():
            before = _written(file)
            self._refuse_others(before, mine)
            mine = before | {part: before[part] | mine[part] for part in ("data", "columns")}
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UsageError(f"{self.folder} holds something else than a suite: choose a new --run")
        for data in self.suite.data.values():
            data.open(
                self.channels
            )  # what is wrong with the last is told before the first is judged
        write_text(file, json.dumps(mine, indent=2) + "\n")

    def _refuse_others(self, before: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        if before["weights"] != mine["weights"]:
            raise UsageError(f"{self.folder} is of other weights: choose a new --run")
        for part in ("data", "columns"):
            for name, told in mine[part].items():
                if name in before[part] and before[part][name] != told:
                    raise UsageError(
                        f"{self.folder} was begun with another {name} "
                        f"({json.dumps(before[part][name])}): choose a new --run, or a new name"
                    )

    def run(self) -> list[Row]:
        """The rows of all cells, those of before included, in the order of the suite.

        Raises:
            UsageError: as `begin`; another process is at it.
            RunFailed: a cell failed; the others are done.
        """
        self.begin()
        with Lock(self.folder):
            self._fill()
        return self.done()

    def _fill(self) -> None:
        """Every cell that has no row. Raises RunFailed at the end where one failed."""
        failed = []
        for name, data in self.suite.data.items():
            left = [column for column in self.columns if not self.rows(name, column)]
            if not left:
                continue
            train, val = data.open(self.channels)
            for column in left:
                cell = Cell(name, data, train, val, self.folder / name / column)
                self.say(
                    f"{name}: {column}, {len(train):,} images to learn from, {len(val):,} to score"
                )
                try:
                    self._keep(name, column, self.columns[column](cell))
                except RunFailed as error:
                    failed.append(f"{name}, {column}: {error}")
                    self.say(f"failed: {failed[-1]}")
            if all(self.rows(name, column) for column in self.columns):
                shutil.rmtree(self.folder / name / FEATURES, ignore_errors=True)
        if failed:
            raise RunFailed(
                f"{len(failed)} of the suite's cells failed ({'; '.join(failed)}); the others are in "
                f"{self.folder / RESULTS}, and the same command tries these again"
            )

    def done(self) -> list[Row]:
        """The rows of the cells that are done, in the order of the suite; of any other folder none."""
        if not (self.folder / FILE).is_file():
            return []
        cells = [(name, column) for name in self.suite.data for column in self.columns]
        return [row for cell in cells for row in self.rows(*cell)]

    def rows(self, name: str, column: str) -> list[Row]:
        """What a cell came to; nothing before it is done."""
        known = results.load(self.folder / RESULTS)
        cell = {SET: name, COLUMN: column}
        return [row for row in known if cell.items() <= row.settings.items()]

    def _keep(self, name: str, column: str, rows: list[Row]) -> None:
        told = [replace(row, settings={**row.settings, SET: name, COLUMN: column}) for row in rows]
        results.append(self.folder / RESULTS, told)


def _written(file: Path) -> dict[str, Any]:
    with world(f"read {file}"):
        content = file.read_bytes()
    try:
        told = json.loads(content)
        if not all(isinstance(told[part], dict) for part in ("data", "columns")):
            raise TypeError
        return {**told, "weights": str(told["weights"])}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise RunFailed(f"{file} is damaged: choose a new --run") from None
