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
from torch import nn

from xdino.errors import UsageError, world
from xdino_eval import attending, attention, sheets
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


def gathered(backbone: nn.Module, names: Sequence[str], options: Options) -> Work:
    """What is to be drawn, in the backbone's number of channels."""
    channels: Any = backbone.in_chans
    return gather(names, channels, options.out, options.fps)


def make_folder(out: Path) -> None:
    """Make the folder of the pictures before anything is computed for them."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    with world(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)


def draw_attention(backbone: nn.Module, names: Sequence[str], options: Options) -> Iterator[Path]:
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


def _check(backbone: nn.Module, options: Options) -> None:
    """Refuse a backbone, a layer or a head that is not there, on a grey image."""
    grey = _grey(backbone)
    with evaluating(backbone), torch.inference_mode():
        *_, last = attending.class_attention(backbone, grey, options.layers).values()
    heads = last.shape[1]  # [B, heads, 1 + N]
    if options.head is not None and not 1 <= options.head <= heads:
        raise UsageError(f"there is no head {options.head}: choose one from 1 to {heads}")


def _grey(backbone: nn.Module) -> torch.Tensor:
    """One grey image of two by two patches, [1, C, H, W]."""
    side, channels = 2 * attending.patch_size(backbone), backbone.in_chans
    return torch.zeros(1, int(channels), side, side, device=device_of(backbone))  # type: ignore[arg-type]


def _maps(backbone: nn.Module, image: np.ndarray, name: str, options: Options) -> attention.Maps:
    try:
        return attention.class_attention_maps(backbone, image, options.size, options.layers)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _draw_one(
    backbone: nn.Module, item: Item, options: Options
) -> tuple[list[Path], np.ndarray, attention.Maps]:
    image = item.read()
    maps = _maps(backbone, image, item.name, options)
    files = figures.draw(maps, image, options.out, item.stem, options.mass, options.head)
    return files, image, maps


def _folder_rows(
    backbone: nn.Module,
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


def _film_attention(backbone: nn.Module, film: Film, options: Options) -> Iterator[Path]:
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


def draw_channels(backbone: nn.Module, names: Sequence[str], options: Options) -> Iterator[Path]:
    """XCA's channel-by-channel matrices of each image as heat maps; yields each file written.

    Raises:
        UsageError: no XCA in this backbone, a video, or a file that cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gathered(backbone, names, options)
    attending.channel_attention(backbone, _grey(backbone))
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
            found = attending.channel_attention(backbone, inputs)
        blocks: list[Any] = [block[0].cpu().numpy() for block in found]
        yield from figures.draw_channels(blocks, options.out, item.stem)
