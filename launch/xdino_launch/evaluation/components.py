"""`xdino attention --pca`: patch tokens as colours, of images, folders and videos together."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xdino.backbone import Backbone
from xdino.errors import UsageError
from xdino_eval import attention, sheets
from xdino_eval.attention import figures, pca
from xdino_launch.evaluation.drawing import Options, gathered, make_folder
from xdino_launch.evaluation.inputs import Item, Work


def draw_components(backbone: Backbone, names: Sequence[str], options: Options) -> Iterator[Path]:
    """Patch tokens as colours, by the first three components of all images and frames together.

    Each image is read and computed anew in every pass (two, or three with `foreground`), so that no
    more than one is in memory.

    Raises:
        UsageError: no patch tokens in this backbone, or a file that cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gathered(backbone, names, options)
    backbone.grid(64, 64)  # refuses a backbone without patches before anything is read
    colours = _Colours(backbone, work, options)
    make_folder(options.out)
    cells = []
    for item in colours.readable():
        path = options.out / f"{item.stem}-pca.png"
        sheets.save(colours.picture(item.read()), path)
        yield path
        cells.append((item, path))
    for film in work.videos:
        path = options.out / f"{film.stem}-pca.mp4"
        with film.writer(path) as out:
            for _, frame in film.counted():
                out.add(colours.picture(frame.pixels), frame.time, frame.duration)
        yield path
    if len(cells) > 1:
        rows = ((item.name, _pair(item, path)) for item, path in cells)
        yield from figures.folder_sheets(rows, options.out, "pca-sheet")


def _pair(item: Item, path: Path) -> list[np.ndarray]:
    """The image and its components' picture, for the sheet."""
    return [sheets.as_rgb(item.read()), np.asarray(Image.open(path))]


class _Colours:
    """The components of everything in `work`, and any image in their colours."""

    def __init__(self, backbone: Backbone, work: Work, options: Options) -> None:
        self._backbone, self._options = backbone, options
        self._work, self._skipped = work, work.skipped()
        self._foreground: pca.Foreground | None = None
        self._components = self._fit("too few patches for components")
        if options.foreground:
            foreground = pca.Foreground(self._components)
            for found in self._tokens():
                foreground.look(found)
            self._foreground = foreground
            self._components = self._fit("too few patches in the foreground")
        ends = pca.Range()
        for found in self._tokens():
            values = self._components.project(found.tokens)
            keep = self._kept(found).ravel()
            if keep.any():
                ends.add(values[keep])
        self._low, self._high = ends.ends()

    def _fit(self, few: str) -> pca.Components:
        """The components of the tokens that are kept, or `few` where they do not suffice."""
        moments = pca.Moments()
        for found in self._tokens():
            moments.add(found.tokens[torch.from_numpy(self._kept(found).ravel())])
        try:
            return moments.components()
        except ValueError as error:
            raise UsageError(f"{few}: {error}") from None

    def readable(self) -> list[Item]:
        """The images, without those that could not be read."""
        return [item for item in self._work.items if item.stem not in self._skipped.reasons]

    def _tokens(self) -> Iterator[pca.PatchTokens]:
        for item in self.readable():
            try:
                found = pca.patch_tokens(self._backbone, item.read(), self._options.size)
            except UsageError as error:
                self._skipped.add(item, error)
            else:
                yield found
        for film in self._work.videos:
            for frame in film.frames():
                yield pca.patch_tokens(self._backbone, frame.pixels, self._options.size)

    def _kept(self, found: pca.PatchTokens) -> np.ndarray:
        if self._foreground is None:
            return np.ones(found.grid, dtype=bool)
        return self._foreground.of(found)

    def picture(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> uint8 [H, W, 3]; black outside of the foreground."""
        found = pca.patch_tokens(self._backbone, image, self._options.size)
        height, width = image.shape[:2]
        values = self._components.project(found.tokens).reshape(*found.grid, 3)
        wide = figures.stretch(values.transpose(2, 0, 1), found.lattice, height, width)
        colours = pca.rgb(wide.transpose(1, 2, 0), self._low, self._high)
        if self._foreground is not None:
            rows, columns, _ = attention.patch_of_pixel(found.lattice, *found.grid, height, width)
            colours[~self._kept(found)[rows[:, None], columns]] = 0
        return colours
