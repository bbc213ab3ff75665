"""The film strip: what the network makes of the same few images, evaluation by evaluation.

A frame is a small picture, a row an image: the image as the network is shown it, the mean of its heads'
class attention laid over it, its patches coloured by their first three principal components (of this
frame's patches together), and its nearest images among those that the evaluation read anyway. What a
network does not have is left out: one without patches shows neighbours alone.

Frames lie in RUN/film/, a file of some tens of kilobytes each. There are `MOST` of them at most: of
more, those stay that divide the run most evenly.

Letters: s side of a crop, C channels, T side of a tile.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xdino.backbone import Backbone
from xdino.data.decode import UnreadableImage
from xdino.data.loader import epoch_order
from xdino.data.sources import Source
from xdino.errors import UsageError, world
from xdino.runtime.atomic import written_beside
from xdino_eval.attention import class_attention_maps, figures, pca
from xdino_eval.extraction import fixed_subset
from xdino_eval.features import Features
from xdino_eval.knn.neighbours import RIGHT, UNKNOWN, WRONG, find
from xdino_eval.sheets import as_rgb
from xdino_eval.transform import EvalTransform

FOLDER = "film"
MOST = 16  # frames of a run
IMAGES, NEAREST = 4, 3  # rows of a frame, and neighbours in a row
TRIED = 40  # images, at most, to find so many that can be read
TILE, GAP, BORDER = 96, 3, 3  # pixels
QUALITY = 80  # of WebP

#: The features of a source's images that an evaluation came to, if it did.
Remembered = Callable[[Source], Features | None]


def candidates(train: Source, val: Source, limit: int | None) -> np.ndarray:
    """Places in `val` of images that every evaluation reads, in the order in which they are tried.

    One of each class first. Where train and val are one source without labels, the same order as
    that in which measures without labels take their images.
    """
    read = np.arange(len(val)) if train is val else fixed_subset(len(val), limit)
    tried = read[epoch_order(len(read), 0, 0)]
    if val.labels is None:
        return tried
    _, firsts = np.unique(np.asarray(val.labels)[tried], return_index=True)
    return tried[np.argsort(~np.isin(np.arange(len(tried)), firsts), kind="stable")]


@dataclass(frozen=True)
class Photograph:
    """index: its place in val. crop: uint8 [s, s, C], as evaluations see it."""

    index: int
    crop: np.ndarray


class FilmStrip:
    """Draws frames of a network, and keeps them in a run's folder.

    Args:
        folder: RUN/film.
        train, val: what the network is judged on; one object where nothing is labelled.
        limit: how many images of each an evaluation reads.
    """

    def __init__(self, folder: Path, train: Source, val: Source, limit: int | None) -> None:
        self.folder, self.train, self.val, self.limit = folder, train, val, limit
        self._photographs: list[Photograph] | None = None

    def draw(self, backbone: Backbone, remembered: Remembered) -> Image.Image | None:
        """A frame of the network as it is; None where there is nothing to be drawn.

        It stays where it lies and in the mode that it is in, and draws no random number.
        """
        transform = EvalTransform.of(backbone)
        if self._photographs is None:
            self._photographs = self._read(transform)
        shown = self._photographs
        rows: list[list[np.ndarray]] = [
            [tile(photograph.crop, channels=backbone.in_chans)] for photograph in shown
        ]
        for column in (
            attention_tiles(backbone, shown),
            component_tiles(backbone, shown),
            self._neighbours(transform, remembered),
        ):
            for row, tiles in zip(rows, column, strict=False):
                row += tiles
        return framed(rows) if any(len(row) > 1 for row in rows) else None

    def keep(self, frame: Image.Image, iteration: int) -> None:
        """Write a frame, and remove one where there are more than `MOST`.

        Raises:
            RunFailed: it cannot be written.
        """
        path = self.folder / f"{iteration:010}.webp"
        with world(f"write {path}"), written_beside(path) as beside:
            frame.save(beside, "WEBP", quality=QUALITY)
        have = sorted(frames(self.folder))
        for gone in thinned(have):
            with world(f"remove {self.folder}"):
                frames(self.folder)[gone].unlink(missing_ok=True)

    def forget_after(self, iteration: int) -> None:
        """Remove frames of iterations that a run, gone back to this one, makes again."""
        for number, path in frames(self.folder).items():
            if number > iteration:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _read(self, transform: EvalTransform) -> list[Photograph]:
        found: list[Photograph] = []
        for index in candidates(self.train, self.val, self.limit)[:TRIED].tolist():
            if len(found) == IMAGES:
                break
            with contextlib.suppress(UnreadableImage, OSError):
                found.append(Photograph(index, transform.array(self.val.read(index))))
        return found

    def _neighbours(
        self, transform: EvalTransform, remembered: Remembered
    ) -> list[list[np.ndarray]]:
        """The nearest images of each photograph; the frame says whether the class is the same."""
        bank, queries = remembered(self.train), remembered(self.val)
        if bank is None or queries is None or len(bank.features) < 2:
            return []
        assert self._photographs is not None
        places = {index: row for row, index in enumerate(queries.indices.tolist())}
        rows = [places.get(photograph.index) for photograph in self._photographs]
        if not rows or None in rows:
            return []
        labels = None if queries.labels is None else queries.labels[rows]
        few = replace(queries, features=queries.features[rows], indices=queries.indices[rows],
                      labels=labels)  # fmt: skip
        columns = []
        for found in find(bank, self.train, few, self.val, NEAREST):
            tiles = []
            for near in found.neighbours:
                with contextlib.suppress(UnreadableImage, OSError):
                    picture = tile(
                        transform.array(self.train.read(near.index)), channels=self.train.channels
                    )
                    colour = {True: RIGHT, False: WRONG, None: UNKNOWN}[near.right]
                    tiles.append(bordered(picture, colour, dashed=near.right is False))
            columns.append(tiles)
        return columns


def attention_tiles(backbone: Backbone, shown: Sequence[Photograph]) -> list[list[np.ndarray]]:
    """The mean attention of the last layer over each image; none of a network without any."""
    tiles = []
    try:
        for photograph in shown:
            maps = class_attention_maps(backbone, photograph.crop)
            mean = maps.layers[-1].mean(0)
            seen = tile(photograph.crop, channels=backbone.in_chans)
            tiles.append([figures.view(mean, seen, maps.lattice).overlay])
    except UsageError:
        return []
    return tiles


def component_tiles(backbone: Backbone, shown: Sequence[Photograph]) -> list[list[np.ndarray]]:
    """The patches of each image in the colours of their principal components; none without any."""
    try:
        every = [pca.patch_tokens(backbone, photograph.crop) for photograph in shown]
        moments, ends = pca.Moments(), pca.Range()
        for found in every:
            moments.add(found.tokens)
        components = moments.components()
    except (UsageError, ValueError):
        return []
    for found in every:
        ends.add(components.project(found.tokens))
    low, high = ends.ends()
    tiles = []
    for found in every:
        colours = pca.rgb(components.project(found.tokens), low, high).reshape(*found.grid, 3)
        tiles.append([tile(colours, Image.Resampling.NEAREST)])
    return tiles


def tile(
    image: np.ndarray, method: Image.Resampling = Image.Resampling.BICUBIC, channels: int = 3
) -> np.ndarray:
    """uint8 [s, s, C] -> uint8 [T, T, 3]; channels: of the source."""
    shown = np.ascontiguousarray(as_rgb(image, channels))
    return np.asarray(Image.fromarray(shown).resize((TILE, TILE), method))


def bordered(picture: np.ndarray, colour: str, dashed: bool) -> np.ndarray:
    """With a border inside of its edge."""
    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    dash, step = (TILE // 16, TILE // 8) if dashed else (TILE, TILE)
    far = TILE - BORDER
    for start in range(0, TILE, step):
        end = start + dash - 1
        for edge in (0, far):
            pen.rectangle((start, edge, end, edge + BORDER - 1), fill=colour)
            pen.rectangle((edge, start, edge + BORDER - 1, end), fill=colour)
    return np.asarray(drawn)


def framed(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Rows of tiles on white."""
    step = TILE + GAP
    width = max(map(len, rows))
    sheet = Image.new("RGB", (width * step - GAP, len(rows) * step - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * step, y * step))
    return sheet


def frames(folder: Path) -> dict[int, Path]:
    """iteration -> file, in order."""
    named = [path for path in folder.glob("*.webp") if path.stem.isdecimal() and path.is_file()]
    return {int(path.stem): path for path in sorted(named, key=lambda path: int(path.stem))}


def thinned(iterations: Sequence[int], most: int = MOST) -> list[int]:
    """Which of ascending iterations to leave out so that `most` stay: never the first or the last,
    each time the one whose neighbours lie nearest to each other."""
    kept = list(iterations)
    while len(kept) > max(2, most):
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        kept.pop(1 + int(np.argmin(gaps)))
    return sorted(set(iterations) - set(kept))
