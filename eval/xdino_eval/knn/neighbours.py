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
from PIL import Image

from xdino.data.image_files import printable
from xdino.data.sources import Source
from xdino.errors import UsageError, world
from xdino.runtime.atomic import write_text, written_beside
from xdino_eval.features import Features
from xdino_eval.knn.keys import unpack, without_self
from xdino_eval.knn.search import EXACT, SearchOptions, searcher
from xdino_eval.knn.tables import normalise, read
from xdino_eval.sheets import Tile, as_rgb, encode, sheet

RIGHT, WRONG, UNKNOWN = "#1f5fa8", "#c8551b", "#999999"  # told apart by colour-blind people too
PAGE, COLUMNS = 8, 21  # queries on a sheet, and pictures side by side at most
SIDE, CAPTION = 128, 190  # pixels of a picture's longer side, and of what stands above it
NOTE = "blue: the query's class · orange, dashed: another"
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
            with written_beside(path) as beside:
                encode(_sheet(page, bank_source, query_source), beside)
        for old in set(folder.glob("neighbours-[0-9][0-9][0-9]-sheet.png")) - set(written):
            old.unlink()
        told = {**facts, "queries": [asdict(query) for query in found]}
        write_text(folder / FILE, printable(json.dumps(told, indent=2, ensure_ascii=False)) + "\n")
    return [*written, folder / FILE]


def _sheet(page: Sequence[Found], bank_source: Source, query_source: Source) -> Image.Image:
    """A row a query, itself first; several where it has very many neighbours."""
    columns = min(COLUMNS, 1 + max(len(query.neighbours) for query in page))
    shown: list[Tile | None] = []
    for query in page:
        shown += tiles(query, bank_source, query_source)
        shown += [None] * (-len(shown) % columns)
    return sheet(shown, columns, SIDE, NOTE, CAPTION)


def tiles(query: Found, bank_source: Source, query_source: Source) -> list[Tile]:
    """The query and its neighbours as pictures."""
    found = [
        Tile(
            [as_rgb(query_source.read(query.index), query_source.channels)],
            query.label or "query",
            frame="solid",
        ),
    ]
    for near in query.neighbours:
        colour = {True: RIGHT, False: WRONG, None: UNKNOWN}[near.right]
        caption = " ".join([f"{near.similarity:.3f}", *([near.label] if near.label else [])])
        frame = "dashed" if near.right is False else "solid"
        found.append(
            Tile(
                [as_rgb(bank_source.read(near.index), bank_source.channels)], caption, colour, frame
            )
        )
    return found
