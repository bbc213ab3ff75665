"""The page of a suite of transfers: one table, and the protocol of every number in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from xdino.data.image_files import printable
from xdino.runtime.atomic import write_text
from xdino_eval.results import Row
from xdino_launch.report.run import plain

NAME = "report.html"


def write_transfer(folder: Path, rows: Sequence[Row], titles: Mapping[str, str]) -> Path:
    """folder/report.html.

    Args:
        rows: of all cells; their settings say which set and which column. titles: of the columns.

    Raises:
        RunFailed: it cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("xdino_launch.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(plain(value)),
    )
    columns = list(dict.fromkeys(str(row.settings["column"]) for row in rows))
    sets = {
        name: {row.settings["column"]: row for row in rows if row.settings["set"] == name}
        for name in dict.fromkeys(str(row.settings["set"]) for row in rows)
    }
    text = environment.get_template("transfer.html.j2").render(
        columns=columns,
        titles={name: titles.get(name, name) for name in columns},
        sets=sets,
        rows=rows,
        features=rows[0].features,
        checkpoint=rows[0].checkpoint,
    )
    write_text(folder / NAME, text)
    return folder / NAME
