"""Sheets of nearest neighbours: what a frozen network takes to be alike, to be looked at.

A row is a query and its nearest images of the bank, with similarity and class; where both are
labelled, the frame says whether the class is the query's (blue, unbroken) or another (orange,
dashed). The neighbours are those that vote (`vote`): cosine similarity of the features, exact, the
lower row of equals first. Beside the sheets lies a JSON file with the same as numbers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xdino.data.sources import Source
from xdino.errors import UsageError, world
from xdino.runtime.atomic import write_text, written_beside
from xdino_eval.attention.figures import DRAWN
from xdino_eval.features import Features
from xdino_eval.image_files import printable
from xdino_eval.knn.keys import unpack, without_self
from xdino_eval.knn.search import EXACT, SearchOptions, searcher
from xdino_eval.knn.tables import normalise, read
from xdino_eval.plotting import Axes, Figure, FigureCanvasAgg, Rectangle, quiet
from xdino_eval.transform import resize_shorter

RIGHT, WRONG, UNKNOWN = "#1f5fa8", "#c8551b", "#999999"  # told apart by colour-blind people too
PAGE = 8  # queries on a sheet
SIDE = 128  # pixels of a picture's shorter side
FILE = "neighbours.json"
SHEET = "neighbours-{:03}-sheet.png"


@dataclass(frozen=True)
class Neighbour:
    """One image of the bank. index: its place in the source. right: None without labels."""

    index: int
    image: str
    label: str | None
    similarity: float
    right: bool | None


@dataclass(frozen=True)
class Found:
    """A query, its place in its source, and its neighbours, the nearest first."""

    index: int
    image: str
    label: str | None
    neighbours: list[Neighbour] = field(default_factory=list)


def find(
    bank: Features,
    bank_source: Source,
    queries: Features,
    query_source: Source,
    k: int,
    options: SearchOptions = EXACT,
) -> list[Found]:
    """The k nearest images of the bank for every query.

    Args:
        bank, queries: features of the sources, of all images or of some. Where the two sources are
            one object, a query is not its own neighbour.
        k: more than the bank holds means all of it.

    Raises:
        UsageError: k < 1, nothing to search or to ask for, or a feature that is not finite.
    """
    if k < 1:
        raise UsageError(f"a query has 1 neighbour or more, got {k}")
    among_themselves = bank_source is query_source
    if not len(queries.features):
        raise UsageError(f"{queries.data} has no image to find neighbours of")
    if len(bank.features) < 1 + among_themselves:
        raise UsageError(f"{bank.data} has no other image to be a neighbour")
    places, asked = bank.indices.numpy(), queries.indices.numpy()  # ascending, as extracted
    search = searcher(normalise(bank.features), options)
    found = []
    for start in range(0, len(asked), options.query_block):
        rows = slice(start, start + options.query_block)
        block = read(normalise(queries.features[rows]), slice(None), name="query")
        keys = search.nearest(block, min(k + among_themselves, len(places))).cpu()
        if among_themselves:
            keys = without_self(keys, np.searchsorted(places, asked[rows]))
        for place, key in zip(asked[rows].tolist(), keys, strict=True):
            label = class_name(query_source, place)
            similarity, row = unpack(key)
            near = [
                _neighbour(bank_source, index, value, label)
                for index, value in zip(places[row.numpy()].tolist(), similarity.tolist(),
                                        strict=True)
            ]  # fmt: skip
            found.append(Found(place, query_source.describe(place), label, near))
    return found


def _neighbour(source: Source, index: int, similarity: float, wanted: str | None) -> Neighbour:
    label = class_name(source, index)
    right = None if label is None or wanted is None else label == wanted
    return Neighbour(index, source.describe(index), label, round(similarity, 6), right)


def class_name(source: Source, index: int) -> str | None:
    """The name of an image's class; None where the source has no labels."""
    if source.labels is None:
        return None
    label = int(source.labels[index])
    return source.classes[label] if source.classes else str(label)


def write(
    found: Sequence[Found],
    bank_source: Source,
    query_source: Source,
    folder: Path,
    facts: dict[str, Any],
) -> list[Path]:
    """Sheets of PAGE queries and the JSON file; sheets of an earlier, longer list are removed.

    Args:
        facts: what the JSON file says beside the neighbours: weights, data, transform, ...

    Returns:
        The files written, the JSON file last.

    Raises:
        RunFailed: a file cannot be written, or an image not be read again.
    """
    pages = [found[start : start + PAGE] for start in range(0, len(found), PAGE)]
    written = [folder / SHEET.format(number) for number in range(1, len(pages) + 1)]
    with world(f"write neighbour sheets to {folder}"):
        for path, page in zip(written, pages, strict=True):
            with written_beside(path) as beside, quiet():
                canvas = FigureCanvasAgg(sheet(page, bank_source, query_source))
                canvas.print_png(str(beside), metadata=DRAWN)
        for old in set(folder.glob("neighbours-[0-9][0-9][0-9]-sheet.png")) - set(written):
            old.unlink()
        told = {**facts, "queries": [asdict(query) for query in found]}
        write_text(folder / FILE, printable(json.dumps(told, indent=2, ensure_ascii=False)) + "\n")
    return [*written, folder / FILE]


def sheet(page: Sequence[Found], bank_source: Source, query_source: Source) -> Figure:
    """A row a query, itself first."""
    columns = 1 + max(len(query.neighbours) for query in page)
    size = 1.35 * columns, 1.6 * len(page) + 0.2
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.supxlabel("blue: the query's class · orange, dashed: another", fontsize=7)
    grid = figure.subplots(len(page), columns, squeeze=False)
    for row, query in zip(grid, page, strict=True):
        for axes in row:
            axes.set_axis_off()
        _show(row[0], query_source.read(query.index), query.label or "query", "black", "-", "bold")
        for axes, near in zip(row[1:], query.neighbours, strict=False):
            colour, line = {True: (RIGHT, "-"), False: (WRONG, "--"), None: (UNKNOWN, "-")}[
                near.right
            ]
            title = " ".join([f"{near.similarity:.3f}", *([near.label] if near.label else [])])
            _show(axes, bank_source.read(near.index), title, colour, line)
    return figure


def _show(
    axes: Axes, image: np.ndarray, title: str, colour: str, line: str, weight: str = "normal"
) -> None:
    small = image if min(image.shape[:2]) <= SIDE else resize_shorter(image, SIDE)
    rgb = small if small.shape[2] == 3 else np.repeat(small[..., :1], 3, axis=2)
    axes.imshow(rgb, interpolation="nearest")
    title = printable(title)
    shown = title if len(title) <= 22 else f"{title[:21]}…"
    # "$" would begin a formula
    axes.set_title(shown, fontsize=7, fontweight=weight, color=colour, parse_math=False)
    axes.add_patch(
        Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False, linewidth=3,
                  edgecolor=colour, linestyle=line)
    )  # fmt: skip
