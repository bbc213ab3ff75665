"""`xdino transfer`: a suite of data sets, from weights to one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from xdino.backbone import Backbone
from xdino_eval.extraction import Options
from xdino_eval.results import Row
from xdino_launch.report.transfer import write_transfer
from xdino_transfer.suite import COLUMN, SET, Going, Make, Suite, frozen_columns

TITLES = {"knn": "k-NN", "linear": "linear"}  # of columns


def transfer(backbone: Backbone, file: Path, folder: Path, options: Options) -> list[Row]:
    """Go through the suite in `file`, in `folder`; the rows of all cells, in its order.

    The report of what there is lies in folder/report.html, also where cells failed.

    Raises:
        UsageError: a suite that is not as it must be; a folder of something else.
        RunFailed: a cell failed; the others are done.
    """
    makes: Mapping[str, Make] = frozen_columns(backbone, options)
    suite = Suite.read(file, makes)
    columns = {name: makes[name](told) for name, told in suite.columns.items()}
    origin = backbone.origin
    going = Going(suite, columns, folder, origin.sha256, backbone.in_chans, options.notice)
    try:
        return going.run()
    finally:
        if rows := going.done():
            write_transfer(folder, rows, TITLES)


def table(rows: Sequence[Row]) -> Table:
    """A line for each data set, a column for each way to use the backbone: top-1 in per cent."""
    out = Table(header_style="bold", pad_edge=False)
    columns = list(dict.fromkeys(str(row.settings[COLUMN]) for row in rows))
    out.add_column("data set", overflow="fold")
    for title in ("train", "val", *(TITLES.get(name, name) for name in columns)):
        out.add_column(title, justify="right", no_wrap=True)
    for name in dict.fromkeys(str(row.settings[SET]) for row in rows):
        mine = [row for row in rows if row.settings[SET] == name]
        last = {row.settings[COLUMN]: row for row in mine}
        cells = [_per_cent(last.get(column)) for column in columns]
        out.add_row(name, f"{mine[0].train_size:,}", f"{mine[0].val_size:,}", *cells)
    return out


def _per_cent(row: Row | None) -> str:
    return "-" if row is None or row.top1 is None else f"{row.top1:.2f}"
