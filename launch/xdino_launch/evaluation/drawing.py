"""`xdino attention`: pictures of class attention and of XCA, from images, folders and videos.

Everything is checked before anything is computed: a wrong layer costs no time.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdino.backbone import Backbone
from xdino.config.bands import chosen_places
from xdino.errors import UsageError, world
from xdino_eval import attention, sheets
from xdino_eval.attention import captions, channels, figures, video
from xdino_eval.attention.colours import Scale
from xdino_eval.attention.figures import Looked
from xdino_eval.attention.sizes import Shown, shown
from xdino_eval.attention.video import Frame
from xdino_eval.features import device_of, evaluating
from xdino_launch.console import counter, stderr_console
from xdino_launch.evaluation.inputs import LIMIT, Film, Item, Work, gather, say

SMOOTHING = 0.9  # of a video's range of colours from frame to frame: without it pictures flicker
ENOUGH = 32  # images whose maps set the scale of all


@dataclass(frozen=True)
class Options:
    """What `xdino attention` was asked for. `layer` and `head` count from 1; None = all.

    every: a file of each map, too. limit: images of a folder. bands: numbers of those to be seen, from
    1; None: the image's own colours.
    """

    out: Path
    size: int | None = None
    mass: float = attention.MASS
    layer: int | None = None
    head: int | None = None
    fps: float | None = None
    foreground: bool = False
    every: bool = False
    limit: int = LIMIT
    bands: tuple[int, ...] | None = None

    def picture(self, backbone: Backbone, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> uint8 [H, W, 3]: what is drawn upon."""
        places = None if self.bands is None else chosen_places(self.bands, backbone.in_chans)
        return sheets.as_rgb(image, backbone.in_chans, places)

    @property
    def layers(self) -> list[int] | None:
        return None if self.layer is None else [self.layer]


def gathered(backbone: Backbone, names: Sequence[str], options: Options) -> Work:
    """What is to be drawn, in the backbone's number of channels."""
    channels: Any = backbone.in_chans
    return gather(names, channels, options.out, options.fps, options.limit)


def make_folder(out: Path) -> None:
    """Make the folder of the pictures before anything is computed for them."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    with world(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)


def draw_attention(backbone: Backbone, names: Sequence[str], options: Options) -> Iterator[Path]:
    """Pictures of class attention; yields each file written.

    Of each image one overlay; of one image its sheet with all heads, of several one sheet of them;
    with `every` both, and a file of each map. A video: three videos a layer, of the map, of the map
    laid over, and of its mask.

    Raises:
        UsageError: no class attention in this backbone, no such layer or head, or a file that
            cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gathered(backbone, names, options)
    _check(backbone, options)
    make_folder(options.out)
    if work.items:
        yield from _Images(backbone, work, options).draw()
    for film in work.videos:
        yield from _film_attention(backbone, film, options)


class _Images:
    """The images among what is drawn, one after the other, on one scale."""

    def __init__(self, backbone: Backbone, work: Work, options: Options) -> None:
        self._backbone, self._options = backbone, options
        self._items, self._skipped = work.items, work.skipped()
        self._seen: list[Shown] = []
        self._scale = Scale()
        self._written: list[Path] = []
        self._last = ""  # which map is drawn of each image

    def draw(self) -> Iterator[Path]:
        options, several = self._options, len(self._items) > 1
        looked = self._looked()
        first = list(itertools.islice(looked, ENOUGH))
        self._scale = Scale.of(one for _, found in first for one in self._drawn(found.maps))
        rows = (self._pictures(item, found) for item, found in itertools.chain(first, looked))
        if several:
            bar = captions.bar(self._scale)
            for page in figures.folder_sheets(rows, options.out, told=self._told, bar=bar):
                yield from (*self._written, page)
                self._written.clear()
        else:
            for _ in rows:
                yield from self._written
        say_sizes(self._backbone, self._seen, options)

    def _looked(self) -> Iterator[tuple[Item, Looked]]:
        tell = counter(stderr_console(), "attention")
        told = captions.weights(self._backbone)
        for done, item in enumerate(self._items, 1):
            try:
                image = item.read()
                size = shown(self._backbone, image.shape, self._options.size)
                maps = _maps(self._backbone, image, item.name, self._options, size.shorter)
            except UsageError as error:
                self._skipped.add(item, error)
                continue
            self._seen.append(size)
            picture = self._options.picture(self._backbone, image)
            lines = (told, captions.inputs(self._backbone, [size]))
            yield item, Looked(item.name, figures.fitted(picture, 1), maps, lines)
            tell(done, len(self._items))

    def _drawn(self, maps: attention.Maps) -> list[np.ndarray]:
        """The maps that are drawn of an image."""
        if len(self._items) == 1 or self._options.every:
            return figures.every_map(maps, self._options.head)
        return [figures.one_map(maps.layers[-1], self._options.head)]

    def _pictures(self, item: Item, found: Looked) -> tuple[str, list[np.ndarray]]:
        """Draw one image; its row on the sheet of all."""
        options, out = self._options, self._options.out
        how = self._scale, options.mass, options.head
        self._last = figures.told_map(found.maps, options.head)
        if len(self._items) == 1 or options.every:
            path = out / f"{item.stem}-sheet.png"
            self._written.append(figures.draw_sheet(found, path, *how))
        self._written.append(figures.draw_overlay(found, out / f"{item.stem}-overlay.png", *how))
        if options.every:
            picture = options.picture(self._backbone, item.read())
            whole = Looked(item.name, picture, found.maps)
            self._written += figures.draw_each(whole, out, item.stem, *how)
        return figures.row(found, *how)

    def _told(self) -> list[str]:
        """What stands below the sheet of all."""
        mass = self._options.mass
        return [
            f"Each: the image; {self._last}, laid over; the patches that hold {mass:.0%} of it, and "
            f"what share of all they are (even: {mass:.0%}, and the mask fades)",
            captions.weights(self._backbone),
            captions.inputs(self._backbone, self._seen),
        ]


def say_sizes(backbone: Backbone, seen: Sequence[Shown], options: Options) -> None:
    """Name on standard error the size that was chosen."""
    if seen and options.size is None:
        say(f"{captions.inputs(backbone, seen)}; --size N sets the shorter side instead")


def _check(backbone: Backbone, options: Options) -> None:
    """Refuse a backbone, a layer or a head that is not there, on a grey image."""
    grey = _grey(backbone)
    if options.bands is not None:
        chosen_places(options.bands, backbone.in_chans)
    with evaluating(backbone), torch.inference_mode():
        heads = backbone.class_attention(grey, options.layers)[-1].shape[1]
    if options.head is not None and not 1 <= options.head <= heads:
        raise UsageError(f"there is no head {options.head}: choose one from 1 to {heads}")


def _grey(backbone: Backbone) -> torch.Tensor:
    """One grey image of two by two patches, [1, C, H, W]."""
    side = 2 * (backbone.patch_size or 1)
    return torch.zeros(1, backbone.in_chans, side, side, device=device_of(backbone))


def _maps(
    backbone: Backbone, image: np.ndarray, name: str, options: Options, size: int | None
) -> attention.Maps:
    try:
        return attention.class_attention_maps(backbone, image, size, options.layers)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _film_attention(backbone: Backbone, film: Film, options: Options) -> Iterator[Path]:
    """Three videos a layer; yields them once they are whole."""
    paths: list[Path] = []
    scales: dict[str, Scale] = {}
    with ExitStack() as stack:
        writers: dict[str, video.Writer] = {}

        def put(name: str, picture: np.ndarray, frame: Frame) -> None:
            if name not in writers:
                paths.append(options.out / f"{film.stem}-{name}.mp4")
                writers[name] = stack.enter_context(film.writer(paths[-1]))
            writers[name].add(picture, frame.time, frame.duration)

        for number, frame in film.counted():
            what = f"frame {number} of {film.stem}"
            maps = _maps(backbone, frame.pixels, what, options, options.size)
            photograph = options.picture(backbone, frame.pixels)
            for name, one in figures.choose(maps, options.head):
                scales[name] = _calmer(scales.get(name), Scale.of([one]))
                view = figures.view(one, photograph, maps.lattice, options.mass, scales[name])
                put(name, view.heat, frame)
                put(f"{name}-overlay", view.overlay, frame)
                put(f"{name}-mask", figures.black_white(view.mask), frame)
    yield from paths


def _calmer(before: Scale | None, now: Scale) -> Scale:
    if before is None:
        return now
    return Scale(SMOOTHING * before.top + (1 - SMOOTHING) * now.top)


def draw_channels(backbone: Backbone, names: Sequence[str], options: Options) -> Iterator[Path]:
    """XCA's channel-by-channel matrices of each image as heat maps; yields each file written.

    Raises:
        UsageError: no XCA in this backbone, a video, or a file that cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gathered(backbone, names, options)
    backbone.channel_attention(_grey(backbone))
    if work.videos:
        raise UsageError("--xca draws images, not videos: its matrices have no map over a frame")
    make_folder(options.out)
    skipped = work.skipped()
    for item in work.items:
        try:
            inputs, _ = attention.network_input(backbone, item.read(), options.size)
        except UsageError as error:
            skipped.add(item, error)
            continue
        with evaluating(backbone), torch.inference_mode():
            found = backbone.channel_attention(inputs)
        blocks: list[Any] = [block[0].cpu().numpy() for block in found]
        told = (item.name, captions.weights(backbone))
        yield from channels.draw_channels(blocks, options.out, item.stem, told, options.every)
