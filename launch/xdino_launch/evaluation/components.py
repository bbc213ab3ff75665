"""`xdino attention --pca`: patch tokens as colours, of images, folders and videos together."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from xdino.backbone import Backbone
from xdino.errors import UsageError
from xdino_eval import attention, sheets
from xdino_eval.attention import captions, figures, pca
from xdino_eval.attention.sizes import Shown, shown
from xdino_eval.sheets import Tile
from xdino_launch.evaluation.drawing import Options, gathered, make_folder, say_sizes
from xdino_launch.evaluation.inputs import Item, Work

PAIR = 640  # pixels of the longer side of an image and of its components beside it


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
    written: list[Path] = []
    rows = _rows(colours, options, written)
    if len(work.items) > 1:
        for page in figures.folder_sheets(rows, options.out, "pca-sheet", colours.told):
            yield from (*written, page)
            written.clear()
    else:
        for _ in rows:
            yield from written
    for film in work.videos:
        path = options.out / f"{film.stem}-pca.mp4"
        with film.writer(path) as out:
            for _, frame in film.counted():
                picture = colours.picture(frame.pixels, frame.pixels.shape[:2], options.size)
                out.add(picture, frame.time, frame.duration)
        yield path
    say_sizes(backbone, colours.seen, options)


def _rows(
    colours: "_Colours", options: Options, written: list[Path]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Draw each image beside its components; its row on the sheet of all."""
    for item in colours.readable():
        image = item.read()
        size = colours.size_of(image)
        photograph = figures.fitted(colours.photograph(image), most=PAIR)
        picture = colours.picture(image, photograph.shape[:2], size.shorter)
        pair = sheets.sheet([Tile([photograph, picture])], 1)
        path = options.out / f"{item.stem}-pca.png"
        lines = [item.name, *colours.told([size])]
        sheets.save(sheets.captioned(pair, lines), path)
        written.append(path)
        if options.every:
            whole = figures.fitted(image, 1, figures.MOST_OF_EACH).shape[:2]
            path = options.out / f"{item.stem}-components.png"
            sheets.save(colours.picture(image, whole, size.shorter), path)
            written.append(path)
        yield item.name, [photograph, picture]


class _Colours:
    """The components of everything in `work`, and any image in their colours.

    seen: how large each image was shown.
    """

    def __init__(self, backbone: Backbone, work: Work, options: Options) -> None:
        self._backbone, self._options = backbone, options
        self.seen: list[Shown] = []
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

    def photograph(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return self._options.picture(self._backbone, image)

    def readable(self) -> list[Item]:
        """The images, without those that could not be read."""
        return [item for item in self._work.items if item.stem not in self._skipped.reasons]

    def _tokens(self) -> Iterator[pca.PatchTokens]:
        self.seen.clear()
        for item in self.readable():
            try:
                image = item.read()
                size = self.size_of(image)
                found = pca.patch_tokens(self._backbone, image, size.shorter)
            except UsageError as error:
                self._skipped.add(item, error)
            else:
                self.seen.append(size)
                yield found
        for film in self._work.videos:
            for frame in film.frames():
                yield pca.patch_tokens(self._backbone, frame.pixels, self._options.size)

    def _kept(self, found: pca.PatchTokens) -> np.ndarray:
        if self._foreground is None:
            return np.ones(found.grid, dtype=bool)
        return self._foreground.of(found)

    def size_of(self, image: np.ndarray) -> Shown:
        return shown(self._backbone, image.shape, self._options.size)

    def told(self, seen: Sequence[Shown] = ()) -> list[str]:
        """The lines below a picture of images that were shown so large."""
        shares = ", ".join(f"{share:.0%}" for share in self._components.explained)
        of = "objects" if self._foreground is not None else "patches"
        return [
            captions.weights(self._backbone),
            captions.inputs(self._backbone, seen or self.seen),
            f"red, green, blue: the first three principal components of all {of} of this command's "
            f"images together; {shares} of their variance",
        ]

    def picture(
        self, image: np.ndarray, drawn: tuple[int, ...], size: int | None = None
    ) -> np.ndarray:
        """uint8 [H, W, C], shown at `size` -> uint8 [*drawn, 3]; black outside of the foreground."""
        found = pca.patch_tokens(self._backbone, image, size)
        height, width = drawn
        values = self._components.project(found.tokens).reshape(*found.grid, 3)
        wide = figures.stretch(values.transpose(2, 0, 1), found.lattice, height, width)
        colours = pca.rgb(wide.transpose(1, 2, 0), self._low, self._high)
        if self._foreground is not None:
            rows, columns, _ = attention.patch_of_pixel(found.lattice, *found.grid, height, width)
            colours[~self._kept(found)[rows[:, None], columns]] = 0
        return colours
