"""`xdino attention`: which pictures of what, from images, folders and videos.

Everything is named before anything is computed: a missing file or a wrong layer costs no time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xdino import checkpoint
from xdino.data import Source, open_source
from xdino.errors import RunFailed, UsageError
from xdino.images import UnreadableImage, decode
from xdino.plan import resolve_device
from xdino_eval import attending, attention, pca, pictures, video
from xdino_eval.features import device_of, evaluating
from xdino_launch.console import counter, stderr_console

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


@dataclass(frozen=True)
class Item:
    """A picture to be made: a name for its files, and the image, read when it is wanted."""

    stem: str
    read: Callable[[], np.ndarray]
    name: str


@dataclass
class Work:
    """What the arguments came to."""

    images: list[Item] = field(default_factory=list)
    folders: list[tuple[str, list[Item]]] = field(default_factory=list)
    videos: list["Film"] = field(default_factory=list)


@dataclass(frozen=True)
class Film:
    """Frames in order, as often as asked for, and how fast they play."""

    stem: str
    fps: Fraction
    frames: Callable[[], Iterator[np.ndarray]]


def open_backbone(weights: str, arch: str | None, device: str) -> nn.Module:
    """The frozen backbone on its device. Raises UsageError and RunFailed as `load_backbone`."""
    where = resolve_device(device)
    return checkpoint.load_backbone(weights, arch).to(where)


def gather(names: Sequence[str], channels: int, fps: float | None) -> Work:
    """Images, folders of them and videos, told apart; with `fps`, a folder is a film.

    Raises:
        UsageError: nothing there, a folder without images, no video where one was named.
    """
    work, taken = Work(), set[str]()
    for name in names:
        path = Path(name)
        if path.is_dir():
            source = open_source(str(path), channels=channels)
            if fps is not None:
                frames = partial(_frames_of, source)
                work.videos.append(Film(_unused(path.resolve().name, taken), Fraction(fps), frames))
                continue
            items = [_item_of(source, i, taken, path) for i in range(len(source))]
            work.folders.append((_unused(path.resolve().name, taken), items))
        elif not path.is_file():
            raise UsageError(f"there is no image, folder or video {path}")
        elif video.is_video(path):
            film = video.Video(path)
            rate = film.fps if fps is None else Fraction(fps)
            frames = partial(film.frames, channels)
            work.videos.append(Film(_unused(path.stem, taken), rate, frames))
        else:
            read = partial(_read, path, channels)
            work.images.append(Item(_unused(path.stem, taken), read, str(path)))
    return work


def _unused(stem: str, taken: set[str]) -> str:
    """`stem`, or with a number behind it: pictures must not write over each other."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def _item_of(source: Source, index: int, taken: set[str], root: Path) -> Item:
    path = Path(source.describe(index))
    below = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    stem = _unused("-".join(below.with_suffix("").parts), taken)
    return Item(stem, partial(_read, path, source.channels), str(below))


def _read(path: Path, channels: int) -> np.ndarray:
    try:
        return decode(path.read_bytes(), channels)
    except (UnreadableImage, OSError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from None


def _frames_of(source: Source) -> Iterator[np.ndarray]:
    for index in range(len(source)):
        yield _read(Path(source.describe(index)), source.channels)


# --- attention --------------------------------------------------------------------------------


def draw_attention(backbone: nn.Module, names: Sequence[str], options: Options) -> Iterator[Path]:
    """Pictures of class attention; yields each file written.

    One image: every head, their mean, overlay, masks and a sheet. A folder: these, and sheets of
    all its images. A video: three videos a layer, of the map, of the map laid over, and of its mask.

    Raises:
        UsageError: no class attention in this backbone, no such layer or head, or a file that
            cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gather(names, backbone.in_chans, options.fps)  # type: ignore[arg-type]
    _check(backbone, options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for item in work.images:
            yield from _draw_one(backbone, item, options)[0]
        for name, items in work.folders:
            written: list[Path] = []
            rows = _folder_rows(backbone, items, options, written)
            for page in pictures.folder_sheets(rows, options.out, f"{name}-folder"):
                yield from (*written, page)
                written.clear()
        for film in work.videos:
            yield from _film_attention(backbone, film, options)
    except OSError as error:
        raise RunFailed(f"cannot write into {options.out}: {error}") from None


def _check(backbone: nn.Module, options: Options) -> None:
    """Refuse a backbone, a layer or a head that is not there, on a grey image."""
    grey = _grey(backbone)
    with evaluating(backbone), torch.inference_mode():
        heads = list(attending.class_attention(backbone, grey, options.layers).values())[-1].shape[
            1
        ]
    if options.head is not None and not 1 <= options.head <= heads:
        raise UsageError(f"there is no head {options.head}: choose one from 1 to {heads}")


def _grey(backbone: nn.Module) -> torch.Tensor:
    """One grey image of two by two patches, [1, C, H, W]."""
    side = 2 * attending.patch_size(backbone)
    return torch.zeros(1, int(backbone.in_chans), side, side, device=device_of(backbone))  # type: ignore[arg-type]


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
    files = pictures.draw(maps, image, options.out, item.stem, options.mass, options.head)
    return files, image, maps


def _folder_rows(
    backbone: nn.Module, items: Sequence[Item], options: Options, written: list[Path]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Draw each image; (name, [image, overlay, masked image]) of the last layer for the sheet."""
    tell = counter(stderr_console(), "attention")
    skipped = 0
    for done, item in enumerate(items, 1):
        try:
            files, image, maps = _draw_one(backbone, item, options)
        except UsageError as error:  # one damaged file must not cost a folder of pictures
            skipped += 1
            stderr_console().print(f"skipped {error}", markup=False, soft_wrap=True)
            continue
        written += files
        photograph = pictures.as_rgb(image)
        one = pictures.one_map(maps.layers[-1], options.head)
        view = pictures.view(one, photograph, maps.lattice, options.mass)
        yield item.name, [photograph, view.overlay, pictures.dimmed(photograph, view.mask)]
        tell(done, len(items))
    if skipped == len(items):
        raise UsageError("no image of the folder could be drawn")


def _film_attention(backbone: nn.Module, film: Film, options: Options) -> Iterator[Path]:
    """Three videos a layer; yields them once they are whole."""
    paths: list[Path] = []
    limits: dict[str, tuple[float, float]] = {}
    tell = _tell(film)
    with ExitStack() as stack:
        writers: dict[str, video.Writer] = {}

        def put(name: str, picture: np.ndarray) -> None:
            if name not in writers:
                paths.append(options.out / f"{film.stem}-{name}.mp4")
                writers[name] = stack.enter_context(video.Writer(paths[-1], film.fps))
            writers[name].add(picture)

        for number, frame in enumerate(film.frames(), 1):
            maps = _maps(backbone, frame, f"frame {number} of {film.stem}", options)
            photograph = pictures.as_rgb(frame)
            for name, one in pictures.choose(maps, options.head):
                limits[name] = _calmer(limits.get(name), pictures.limits_of(one))
                view = pictures.view(one, photograph, maps.lattice, options.mass, limits[name])
                put(name, view.heat)
                put(f"{name}-overlay", view.overlay)
                put(f"{name}-mask", pictures.black_white(view.mask))
            tell(number)
    yield from paths


def _tell(film: Film) -> Callable[[int], None]:
    tell = counter(stderr_console(), f"frames of {film.stem}")
    return lambda done: tell(done, done)


def _calmer(before: tuple[float, float] | None, now: tuple[float, float]) -> tuple[float, float]:
    if before is None:
        return now
    low, high = (SMOOTHING * a + (1 - SMOOTHING) * b for a, b in zip(before, now, strict=True))
    return low, high


# --- principal components ---------------------------------------------------------------------


def draw_components(backbone: nn.Module, names: Sequence[str], options: Options) -> Iterator[Path]:
    """Patch tokens as colours, by the first three components of all images and frames together.

    Each image is read and computed anew in every pass (two, or three with `foreground`), so that no
    more than one is in memory.

    Raises:
        UsageError: no patch tokens in this backbone, or a file that cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gather(names, backbone.in_chans, options.fps)  # type: ignore[arg-type]
    attending.grid(backbone, 64, 64)  # refuses a backbone without patches before anything is read
    colours = _Colours(backbone, work, options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        cells = []
        for item in _items(work):
            image = item.read()
            picture = colours.picture(image)
            path = options.out / f"{item.stem}-pca.png"
            pictures.Image.fromarray(picture).save(path)
            yield path
            cells.append((item, path))
        for film in work.videos:
            path = options.out / f"{film.stem}-pca.mp4"
            tell = _tell(film)
            with video.Writer(path, film.fps) as out:
                for number, frame in enumerate(film.frames(), 1):
                    out.add(colours.picture(frame))
                    tell(number)
            yield path
        if len(cells) > 1:
            rows = ((item.name, _pair(item, path)) for item, path in cells)
            yield from pictures.folder_sheets(rows, options.out, "pca-sheet")
    except OSError as error:
        raise RunFailed(f"cannot write into {options.out}: {error}") from None


def _items(work: Work) -> list[Item]:
    return [*work.images, *(item for _, items in work.folders for item in items)]


def _pair(item: Item, path: Path) -> list[np.ndarray]:
    """The image and its components' picture, for the sheet."""
    return [pictures.as_rgb(item.read()), np.asarray(pictures.Image.open(path))]


class _Colours:
    """The components of everything in `work`, and any image in their colours."""

    def __init__(self, backbone: nn.Module, work: Work, options: Options) -> None:
        self._backbone, self._options = backbone, options
        moments = pca.Moments()
        for found in self._tokens(work):
            moments.add(found.tokens)
        try:
            self._components = moments.components()
        except ValueError as error:
            raise UsageError(f"too few patches for components: {error}") from None
        self._foreground: pca.Foreground | None = None
        if options.foreground:
            self._foreground, moments = pca.Foreground(self._components), pca.Moments()
            for found in self._tokens(work):
                self._foreground.look(found)
            for found in self._tokens(work):
                moments.add(found.tokens[torch.from_numpy(self._foreground.of(found).ravel())])
            try:
                self._components = moments.components()
            except ValueError as error:
                raise UsageError(f"too few patches in the foreground: {error}") from None
        ends = pca.Range()
        for found in self._tokens(work):
            values = self._components.project(found.tokens)
            keep = self._kept(found).ravel()
            if keep.any():
                ends.add(values[keep])
        self._low, self._high = ends.ends()

    def _tokens(self, work: Work) -> Iterator[pca.PatchTokens]:
        images: Iterable[np.ndarray] = (item.read() for item in _items(work))
        for image in images:
            yield pca.patch_tokens(self._backbone, image, self._options.size)
        for film in work.videos:
            for frame in film.frames():
                yield pca.patch_tokens(self._backbone, frame, self._options.size)

    def _kept(self, found: pca.PatchTokens) -> np.ndarray:
        if self._foreground is None:
            return np.ones(found.grid, dtype=bool)
        return self._foreground.of(found)

    def picture(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> uint8 [H, W, 3]; black outside of the foreground."""
        found = pca.patch_tokens(self._backbone, image, self._options.size)
        height, width = image.shape[:2]
        values = self._components.project(found.tokens).reshape(*found.grid, 3)
        wide = pictures.stretch(values.transpose(2, 0, 1), found.lattice, height, width)
        colours = pca.rgb(wide.transpose(1, 2, 0), self._low, self._high)
        if self._foreground is not None:
            rows, columns, _ = attention.patch_of_pixel(found.lattice, *found.grid, height, width)
            colours[~self._kept(found)[rows[:, None], columns]] = 0
        return colours


# --- XCA --------------------------------------------------------------------------------------


def draw_channels(backbone: nn.Module, names: Sequence[str], options: Options) -> Iterator[Path]:
    """XCA's channel-by-channel matrices of each image as heat maps; yields each file written.

    Raises:
        UsageError: no XCA in this backbone, a video, or a file that cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gather(names, backbone.in_chans, options.fps)  # type: ignore[arg-type]
    attending.channel_attention(backbone, _grey(backbone))
    if work.videos:
        raise UsageError("--xca draws images, not videos: its matrices have no map over a frame")
    try:
        for item in _items(work):
            inputs, _ = attention.network_input(backbone, item.read(), options.size)
            with evaluating(backbone), torch.inference_mode():
                found = attending.channel_attention(backbone, inputs)
            blocks: list[Any] = [block[0].cpu().numpy() for block in found]
            yield from pictures.draw_channels(blocks, options.out, item.stem)
    except OSError as error:
        raise RunFailed(f"cannot write into {options.out}: {error}") from None
