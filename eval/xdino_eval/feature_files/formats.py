"""One writer a format. Parquet and CSV are written as the rows come, the others are arrays at once.

All hold the same: the split, an image's name, the name and the number of its class, its feature, and
patch features where they are asked for; beside them, where the format has a place for it, which
weights and which transform they are of.
"""

import csv
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from xdino.errors import UsageError
from xdino_eval.feature_files.rows import Rows

ROW_GROUP = 1 << 25  # bytes of features that become one row group of Parquet
HEADER = 64 << 20  # bytes of names in the header of a safetensors file, which takes 100 MB

About = Mapping[str, str]


class Writer(Protocol):
    """Writes one file, which is there once it is closed."""

    def add(self, rows: Rows) -> None: ...

    def close(self) -> list[str]:
        """Sentences that a person should read."""


class ParquetWriter:
    """Columns split, path, class_name, label, feature (float32 [D]), patches (float32 [h * w * D]).

    What there is none of is null. The shape (h, w, D) of patches is in the file's metadata.
    """

    def __init__(self, path: Path, about: About, capacity: Mapping[str, int]) -> None:
        self.path, self.about = path, about
        self.kept: list[Any] = []
        self.bytes = 0
        self.file: Any = None

    def add(self, rows: Rows) -> None:
        import pyarrow as pa

        labels = rows.labels
        columns = {
            "split": pa.array([rows.part.split or None] * len(rows), pa.string()),
            "path": pa.array(rows.names, pa.string()),
            "class_name": pa.array([name or None for name in rows.class_names], pa.string()),
            "label": pa.array(labels, pa.int64(), mask=labels < 0),
            "feature": _lists(rows.features),
        }
        about = dict(self.about)
        if rows.patches is not None:
            columns["patches"] = _lists(rows.patches.flatten(1))
            about["patches"] = json.dumps(list(rows.patches.shape[1:]))
        table = pa.table(columns).replace_schema_metadata(about)
        self.kept.append(table)
        self.bytes += table.nbytes
        if self.bytes >= ROW_GROUP:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        if not self.kept:
            return
        table = pa.concat_tables(self.kept)
        if self.file is None:
            self.file = parquet.ParquetWriter(self.path, table.schema)
        self.file.write_table(table, row_group_size=len(table))
        self.kept, self.bytes = [], 0

    def close(self) -> list[str]:
        self._write()
        if self.file is not None:
            self.file.close()
        return []


def _lists(values: Tensor) -> Any:
    """float32 [n, D] -> an Arrow array of n lists of D."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values.numpy(), np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


class CsvWriter:
    """Columns split, path, class_name, label, feature_0, feature_1, ...; empty where there is none."""

    def __init__(self, path: Path, about: About, capacity: Mapping[str, int]) -> None:
        self.file: TextIO = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - see close
        self.table = csv.writer(self.file, lineterminator="\n")
        self.begun = False

    def add(self, rows: Rows) -> None:
        if not self.begun:
            width = rows.features.shape[1]
            numbered = [f"feature_{i}" for i in range(width)]
            self.table.writerow(["split", "path", "class_name", "label", *numbered])
            self.begun = True
        told = zip(rows.names, rows.class_names, rows.labels.tolist(), strict=True)
        for (name, class_name, label), feature in zip(told, rows.features.tolist(), strict=True):
            known = "" if label < 0 else label
            numbers = [f"{value:.9g}" for value in feature]  # as many digits as float32 has
            self.table.writerow([rows.part.split, name, class_name, known, *numbers])

    def close(self) -> list[str]:
        self.file.close()
        return []


class _Collected:
    """The rows of one split as arrays."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self.tensors: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.class_names: list[str] = []

    def add(self, rows: Rows) -> None:
        found = {
            "features": rows.features,
            "labels": torch.from_numpy(rows.labels),
            "indices": torch.from_numpy(rows.indices),
        }
        if rows.patches is not None:
            found["patches"] = rows.patches
        for name, value in found.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty(
                    (self.capacity, *value.shape[1:]), dtype=value.dtype
                )
            self.tensors[name][self.filled : self.filled + len(rows)] = value
        self.filled += len(rows)
        self.names += rows.names
        self.class_names += rows.class_names

    def arrays(self) -> dict[str, Tensor]:
        """Of the images that could be read, each [n, ...]."""
        return {name: value[: self.filled] for name, value in self.tensors.items()}


class _AtOnce:
    """A format that is written when all rows are there."""

    def __init__(self, path: Path, about: About, capacity: Mapping[str, int]) -> None:
        self.path, self.about, self.capacity = path, about, capacity
        self.splits: dict[str, _Collected] = {}
        self.classes: tuple[str, ...] = ()

    def add(self, rows: Rows) -> None:
        split = rows.part.split
        if split not in self.splits:
            self.splits[split] = _Collected(self.capacity[split])
        self.splits[split].add(rows)
        self.classes = self.classes or rows.part.source.classes or ()

    def prefixed(self) -> dict[str, _Collected]:
        """By what their names in the file begin with: nothing where there is one split alone."""
        if len(self.capacity) == 1:
            return {"": next(iter(self.splits.values()))}
        return {f"{name}_": split for name, split in self.splits.items()}


class NpzWriter(_AtOnce):
    """Arrays features [n, D], labels (-1 for none), indices, names, class_names, patches [n, h, w, D].

    Of two splits train_features, val_features and so on. `about`: JSON.
    """

    def close(self) -> list[str]:
        arrays: dict[str, np.ndarray] = {}
        for prefix, split in self.prefixed().items():
            arrays |= {prefix + name: value.numpy() for name, value in split.arrays().items()}
            arrays[f"{prefix}names"] = np.array(split.names, np.str_)
            arrays[f"{prefix}class_names"] = np.array(split.class_names, np.str_)
        about = json.dumps(dict(self.about))
        with open(self.path, "wb") as file:
            np.savez(file, about=np.array(about), **arrays)  # type: ignore[arg-type]
        return []


class SafetensorsWriter(_AtOnce):
    """Tensors as `NpzWriter`'s arrays; names and classes (of the labels, in order) as JSON in its
    header."""

    def close(self) -> list[str]:
        tensors: dict[str, Tensor] = {}
        told, said = {**self.about, "classes": json.dumps(self.classes)}, []
        for prefix, split in self.prefixed().items():
            tensors |= {prefix + name: value for name, value in split.arrays().items()}
            told[f"{prefix}names"] = json.dumps(split.names)
        if sum(map(len, told.values())) > HEADER:
            told = dict(self.about)
            said = ["so many names are no part of a safetensors file: .parquet and .npz have them"]
        whole = {name: value.contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(whole, self.path, metadata=told)
        return said


WRITERS: dict[str, Any] = {
    ".parquet": ParquetWriter,
    ".npz": NpzWriter,
    ".csv": CsvWriter,
    ".safetensors": SafetensorsWriter,
}


def suffix_of(path: Path, patches: bool) -> str:
    """Which of `WRITERS` a file is for; of a name without a suffix safetensors.

    Raises:
        UsageError: none of them; the packages for it are not installed; patches in CSV.
    """
    suffix = path.suffix.lower() or ".safetensors"
    if suffix not in WRITERS:
        *others, last = WRITERS
        raise UsageError(
            f"features are written as {', '.join(others)} or {last}, and {path} is called none of "
            "them"
        )
    if suffix == ".csv" and patches:
        raise UsageError(
            "CSV has no place for patch features: write .parquet, .npz or .safetensors"
        )
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            f"{path} needs pyarrow: install it with pip install 'xdino[parquet]', or write .npz, "
            ".csv or .safetensors"
        )
    return suffix
