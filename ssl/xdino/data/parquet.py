"""Parquet image sets as Hugging Face's `datasets` writes them: a column of images' bytes, one of labels.

A Parquet file gives no single row, only groups of some hundred. Those read last are kept, up to
`KEPT_BYTES`: a set that fits is read once. Of a larger one, image by image in random order, nearly each
would cost its whole group; a notice says so, and that `xdino pack` makes shards of it, group by group.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data import splits
from xdino.data.classes import Labels, class_order
from xdino.data.decode import HEAD, recognised
from xdino.data.listing import entries, first, size_and_time, status_of
from xdino.data.source import StoredSource
from xdino.errors import UsageError, reason

KEPT_BYTES = 1 << 30
_IMAGES, _LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "class", "cls")


class ParquetSource(StoredSource):
    """The images of Parquet files, in their order; `column` holds their bytes."""

    def __init__(
        self,
        name: str,
        tables: Sequence["_Table"],
        channels: int,
        labels: np.ndarray | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        super().__init__(name, channels, labels, classes)
        self._tables = list(tables)
        groups = [(t, group, rows) for t, table in enumerate(tables)
                  for group, rows in enumerate(table.rows)]  # fmt: skip
        self._groups = [(t, group) for t, group, _ in groups]
        self._first = np.cumsum([0, *(rows for _, _, rows in groups)])  # of each group, and the end
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        whole = sum(table.bytes for table in tables)
        if whole > KEPT_BYTES:
            self.remarks.append(
                f"{name} holds {whole / 1e9:.1f} GB in groups of rows, which are read whole for one "
                f"image: slow in random order. `xdino pack {name} --out FOLDER --shards N` makes "
                "shards of it once, and gives the same crops"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def encoded(self, index: int) -> bytes:
        group = int(np.searchsorted(self._first, index, "right")) - 1
        value = self._rows(group)[index - int(self._first[group])].as_py()
        if not value:
            raise OSError("it has no bytes")
        return value

    def _rows(self, group: int) -> Any:
        """The images of a group of rows, an array of Arrow's."""
        with self._lock:  # one reads, and the others wait for what it reads
            found = self._kept.get(group)
            if found is None:
                table, inside = self._groups[group]
                found = self._tables[table].images(inside)
                held = sum(rows.nbytes for rows in self._kept.values())
                while self._kept and held + found.nbytes > KEPT_BYTES:
                    held -= self._kept.popitem(last=False)[1].nbytes
                self._kept[group] = found
            self._kept.move_to_end(group)
            return found

    def sizes(self) -> np.ndarray:
        import pyarrow.compute as pc

        lengths = [
            pc.fill_null(pc.binary_length(self._tables[table].images(group)), -1)
            for table, group in self._groups
        ]
        return np.concatenate([np.asarray(each, np.int64) for each in lengths])

    def _ends(self, index: int, most: int) -> bytes:
        whole = self.encoded(index)
        return whole[:most] + whole[max(0, len(whole) - most) :]

    def member(self, index: int) -> bytes:
        try:
            suffix = recognised(self.encoded(index)[:HEAD]) or ".jpg"
        except OSError:
            suffix = ".jpg"
        folder = "" if self.labels is None else f"{(self.classes or ())[self.labels[index]]}/"
        return f"{folder.replace(' ', '_')}{index:08}{suffix}".encode()

    def describe(self, index: int) -> str:
        table, _ = self._groups[int(np.searchsorted(self._first, index, "right")) - 1]
        start = next(i for i, (t, _) in enumerate(self._groups) if t == table)
        return f"{self._tables[table].path}: row {index - int(self._first[start])}"

    def _content(self) -> Iterator[bytes]:
        facts = [(table.bytes, *table.rows) for table in self._tables]
        yield from self._described(json.dumps(facts).encode().ljust(16))

    def stamps(self) -> bytes:
        facts = [size_and_time(status_of(table.path)) for table in self._tables]
        return np.array(facts, np.int64).tobytes() + b"\0".join(self._content())


class _Table:
    """One file. rows: of each group; bytes: of all images, as the file's footer says."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowException, parquet

        self.path = path
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
            self.schema = self._file.schema_arrow
            told = self._file.metadata
        except (ArrowException, OSError) as error:
            raise UsageError(f"{path} is no Parquet file, or not whole: {reason(error)}") from None
        self.column = self._image_column()
        groups = [told.row_group(i) for i in range(told.num_row_groups)]
        self.rows = [group.num_rows for group in groups]
        self.bytes = sum(group.total_byte_size for group in groups)

    def _image_column(self) -> str:
        """`image.bytes` of a struct, or a column of bytes by itself."""
        import pyarrow as pa

        for name in (*_IMAGES, *(n for n in self.schema.names if n not in _IMAGES)):
            if name not in self.schema.names:
                continue
            kind = self.schema.field(name).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{name}.bytes"
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
        raise UsageError(
            f"{self.path} has no column of images' bytes, only {first(self.schema.names)}; expected "
            "image with bytes, as Hugging Face's datasets write"
        )

    def images(self, group: int) -> Any:
        from pyarrow import ArrowException

        try:
            table = self._file.read_row_group(group, [self.column])
        except (ArrowException, OSError) as error:
            raise OSError(f"a damaged group of rows ({reason(error)})") from None
        column = table.column(0).combine_chunks()
        return column.field("bytes") if "." in self.column else column

    def labels(self) -> tuple[list[Any], list[str] | None]:
        """What each row's label says, and the classes that it numbers where the file names them."""
        name = next((each for each in _LABELS if each in self.schema.names), None)
        if name is None:
            raise UsageError(
                f"{self.path} has no labels: expected a column called {' or '.join(_LABELS)}, got "
                f"{first(self.schema.names)}"
            )
        told = self._file.read([name]).column(0).to_pylist()
        try:
            features = json.loads(self.schema.metadata[b"huggingface"])["info"]["features"]
            known = features[name]["names"]
        except (TypeError, KeyError, ValueError):
            known = None
        return told, known


def parquet_in(path: Path) -> list[Path]:
    """The Parquet files of a folder, or of its folder data, as Hugging Face lays them out."""
    for folder in (path, path / "data"):
        if folder.is_dir():
            names = [Path(folder, e.name.decode(errors="surrogateescape"))
                     for e in entries(str(folder).encode(errors="surrogateescape"))
                     if e.name.lower().endswith(b".parquet")]  # fmt: skip
            if names:
                return names
    return []


def splits_of_parquet(paths: Sequence[Path]) -> list[str]:
    """The splits that the files' names divide them into."""
    return splits.splits_said(paths)


def open_parquet(
    data: str, paths: Sequence[Path], split: str | None, channels: int | None, labelled: bool
) -> ParquetSource:
    """The images of Parquet files, or of those whose names speak of `split`.

    Raises:
        UsageError: one cannot be read, or has no such columns; pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{data} is Parquet: install what reads it with pip install 'xdino[parquet]'"
        ) from None
    remarks: list[str] = []
    if split == "val":
        paths, remarks = splits.val_tars(paths)
        if not paths:
            raise UsageError(f"{data} has no Parquet file that calls itself validation or test")
    elif split == "train":
        paths, remarks = splits.train_tars(paths)
        remarks = [remark.replace("tar", "Parquet file", 1) for remark in remarks]
        if not paths:
            raise UsageError(f"{data} has nothing to train on but what calls itself val or test")
    tables = [_Table(path) for path in paths]
    labels, classes = _labels(data, tables) if labelled else (None, None)
    source = ParquetSource(data, tables, channels or 3, labels, classes)
    if not len(source):
        raise UsageError(f"{data} holds no image")
    source.remarks += remarks
    return source


def _labels(data: str, tables: Sequence[_Table]) -> Labels:
    told = [table.labels() for table in tables]
    said = [value for values, _ in told for value in values]
    known = told[0][1]
    if any(value is None or (isinstance(value, int) and value < 0) for value in said):
        raise UsageError(f"{data} has rows without a label (null or -1)")
    if known is not None and all(isinstance(v, int) and v < len(known) for v in said):
        return np.array(said, np.int64), tuple(known)
    names = [str(value) for value in said]
    classes = class_order(set(names))
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[name] for name in names], np.int64), tuple(classes)
