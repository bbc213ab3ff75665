"""`xdino attention`: pictures of class attention and of XCA, from images, folders and videos.

Everything is checked before anything is computed: a wrong layer costs no time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdino.backbone import Backbone
from xdino.errors import UsageError, world
from xdino_eval import attention, sheets
from xdino_eval.attention import figures, video
from xdino_eval.attention.video import Frame
from xdino_eval.features import device_of, evaluating
from xdino_launch.console import counter, stderr_console
from xdino_launch.evaluation.inputs import Film, Item, Skipped, Work, gather

SMOOTHING = 0.9  # of a video's range of colours from frame to frame: without it pictures flicker


@dataclass(frozen=True)
class Options:
    """What `xdino attention` was asked for. `layer` and `head` count from 1; None = all."""

    out: Path
    size: int | None = None
    mass: float = attention.MASS
    layer: int | None = None
    head: int | None = None
    fps: float | None = None
    foreground: bool = False

    @property
    def layers(self) -> list[int] | None:
        return None if self.layer is None else [self.layer]


def gathered(backbone: Backbone, names: Sequence[str], options: Options) -> Work:
    """What is to be drawn, in the backbone's number of channels."""
    channels: Any = backbone.in_chans
    return gather(names, channels, options.out, options.fps)


def make_folder(out: Path) -> None:
    """Make the folder of the pictures before anything is computed for them."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    with world(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)


def draw_attention(backbone: Backbone, names: Sequence[str], options: Options) -> Iterator[Path]:
    """Pictures of class attention; yields each file written.

    One image: every head, their mean, overlay, masks and a sheet. A folder: these, and sheets of
    all its images. A video: three videos a layer, of the map, of the map laid over, and of its mask.

    Raises:
        UsageError: no class attention in this backbone, no such layer or head, or a file that
            cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gathered(backbone, names, options)
    _check(backbone, options)
    make_folder(options.out)
    skipped = work.skipped()
    for item in work.images:
        try:
            files = _draw_one(backbone, item, options)[0]
        except UsageError as error:
            skipped.add(item, error)
        else:
            yield from files
    for name, items in work.folders:
        written: list[Path] = []
        rows = _folder_rows(backbone, items, options, written, skipped)
        for page in figures.folder_sheets(rows, options.out, f"{name}-folder"):
            yield from (*written, page)
            written.clear()
    for film in work.videos:
        yield from _film_attention(backbone, film, options)


def _check(backbone: Backbone, options: Options) -> None:
    """Refuse a backbone, a layer or a head that is not there, on a grey image."""
    grey = _grey(backbone)
    with evaluating(backbone), torch.inference_mode():
        heads = backbone.class_attention(grey, options.layers)[-1].shape[1]
    if options.head is not None and not 1 <= options.head <= heads:
        raise UsageError(f"there is no head {options.head}: choose one from 1 to {heads}")


def _grey(backbone: Backbone) -> torch.Tensor:
    """One grey image of two by two patches, [1, C, H, W]."""
    side = 2 * (backbone.patch_size or 1)
    return torch.zeros(1, backbone.in_chans, side, side, device=device_of(backbone))


def _maps(backbone: Backbone, image: np.ndarray, name: str, options: Options) -> attention.Maps:
    try:
        return attention.class_attention_maps(backbone, image, options.size, options.layers)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _draw_one(
    backbone: Backbone, item: Item, options: Options
) -> tuple[list[Path], np.ndarray, attention.Maps]:
    image = item.read()
    maps = _maps(backbone, image, item.name, options)
    files = figures.draw(maps, image, options.out, item.stem, options.mass, options.head)
    return files, image, maps


def _folder_rows(
    backbone: Backbone,
    items: Sequence[Item],
    options: Options,
    written: list[Path],
    skipped: Skipped,
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Draw each image; (name, [image, overlay, masked image]) of the last layer for the sheet."""
    tell = counter(stderr_console(), "attention")
    for done, item in enumerate(items, 1):
        try:
            files, image, maps = _draw_one(backbone, item, options)
        except UsageError as error:
            skipped.add(item, error)
            continue
        written += files
        photograph = sheets.as_rgb(image)
        one = figures.one_map(maps.layers[-1], options.head)
        view = figures.view(one, photograph, maps.lattice, options.mass)
        yield item.name, [photograph, view.overlay, figures.dimmed(photograph, view.mask)]
        tell(done, len(items))


def _film_attention(backbone: Backbone, film: Film, options: Options) -> Iterator[Path]:
    """Three videos a layer; yields them once they are whole."""
    paths: list[Path] = []
    limits: dict[str, tuple[float, float]] = {}
    with ExitStack() as stack:
        writers: dict[str, video.Writer] = {}

        def put(name: str, picture: np.ndarray, frame: Frame) -> None:
            if name not in writers:
                paths.append(options.out / f"{film.stem}-{name}.mp4")
                writers[name] = stack.enter_context(film.writer(paths[-1]))
            writers[name].add(picture, frame.time, frame.duration)

        for number, frame in film.counted():
            maps = _maps(backbone, frame.pixels, f"frame {number} of {film.stem}", options)
            photograph = sheets.as_rgb(frame.pixels)
            for name, one in figures.choose(maps, options.head):
                limits[name] = _calmer(limits.get(name), figures.limits_of(one))
                view = figures.view(one, photograph, maps.lattice, options.mass, limits[name])
                put(name, view.heat, frame)
                put(f"{name}-overlay", view.overlay, frame)
                put(f"{name}-mask", figures.black_white(view.mask), frame)
    yield from paths


def _calmer(before: tuple[float, float] | None, now: tuple[float, float]) -> tuple[float, float]:
    if before is None:
        return now
    low, high = (SMOOTHING * a + (1 - SMOOTHING) * b for a, b in zip(before, now, strict=True))
    return low, high


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
        yield from figures.draw_channels(blocks, options.out, item.stem)
