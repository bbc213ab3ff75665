"""`xdino attention`: which pictures of what, from images, folders and videos.

Everything is named before anything is computed: a missing file or a wrong layer costs no time. What
is drawn is never read again: --out may lie in a folder of images, pictures that xdino drew are left
out of folders, and a second run draws as many pictures as the first.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xdino import checkpoint
from xdino.data.sources import FileSource, Source, open_source
from xdino.errors import UsageError, asked, world
from xdino.runtime.device import resolve_device
from xdino_eval import attending, attention, image_files
from xdino_eval.attention import figures, pca, video
from xdino_eval.attention.video import Frame
from xdino_eval.features import device_of, evaluating
from xdino_eval.image_files import DAMAGED, printable
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
    """Frames in order, as often as asked for, and how fast they play; `tick` as of `video.Writer`."""

    stem: str
    fps: Fraction
    frames: Callable[[], Iterator[Frame]]
    tick: Fraction | None = None

    def writer(self, path: Path) -> video.Writer:
        return video.Writer(path, self.fps, self.tick)


@dataclass
class Skipped:
    """Images among others that could not be drawn. One damaged file must not cost the rest."""

    total: int
    reasons: dict[str, str] = field(default_factory=dict)  # of each stem

    def add(self, item: Item, error: UsageError) -> None:
        """Name the image on standard error.

        Raises:
            UsageError: it was the last of all.
        """
        sentence = str(error)
        if item.name not in sentence:
            sentence = f"{item.name}: {sentence}"
        if item.stem not in self.reasons and self.total > 1:
            stderr_console().print(f"skipped {printable(sentence)}", markup=False, soft_wrap=True)
        self.reasons[item.stem] = sentence
        if len(self.reasons) >= self.total:
            none = "" if self.total == 1 else f"none of the {self.total:,} images can be drawn: "
            raise UsageError(none + next(iter(self.reasons.values()))) from None


def open_backbone(weights: str, arch: str | None, role: str, device: str) -> nn.Module:
    """The frozen backbone on its device. Raises UsageError and RunFailed as `load_backbone`."""
    where = resolve_device(device)
    return checkpoint.load_backbone(weights, arch, role).to(where)


def gather(names: Sequence[str], channels: int, options: Options) -> Work:
    """Images, folders of them and videos, told apart; with `options.fps`, a folder is a film.

    Raises:
        UsageError: nothing there, a folder without images, no video where one was named, or pictures
            would be drawn over what is read.
    """
    work, taken = Work(), set[str]()
    own: list[str] = []  # pictures of ours that lie where new ones will
    for name in names:
        path = Path(name)
        with asked(name):
            if path.is_dir():
                _add_folder(work, path, channels, options, taken)
            elif not path.is_file():
                raise UsageError(f"there is no image, folder or video {path}")
            else:
                _add_file(work, path, channels, options, taken, own)
    if own and not (work.images or work.folders or work.videos):
        raise UsageError(f"{own[0]} was drawn by xdino, and is not read again: name a photograph")
    if own:
        _say(f"left out {len(own)} pictures in {options.out} that xdino drew")
    _refuse_overwriting(
        [path for path in map(Path, names) if str(path) not in own], work, options.out
    )
    return work


def _add_file(
    work: Work, path: Path, channels: int, options: Options, taken: set[str], own: list[str]
) -> None:
    beside = os.path.realpath(path.parent) == os.path.realpath(options.out)
    if video.is_video(path):
        film = video.Video(path)
        if beside and film.drawn_here:
            own.append(str(path))
            return
        rate, tick = (film.fps, film.tick) if options.fps is None else (Fraction(options.fps), None)
        frames = partial(film.timed if tick else partial(_untimed, film), channels)
        work.videos.append(Film(_unused(path.stem, taken), rate, frames, tick))
    elif beside and figures.drawn_here(path):
        own.append(str(path))
    else:
        read = partial(image_files.read, path, channels)
        work.images.append(Item(_unused(path.stem, taken), read, str(path)))


def _untimed(film: video.Video, channels: int) -> Iterator[Frame]:
    return (Frame(pixels) for pixels in film.frames(channels))


def _add_folder(work: Work, path: Path, channels: int, options: Options, taken: set[str]) -> None:
    if os.path.realpath(path) == os.path.realpath(options.out):
        raise UsageError(
            f"--out is the folder of images {path} itself: name another, or one below it"
        )
    # As a path, for a folder may be called like a data set.
    source = open_source(str(path.absolute()), channels=channels)
    chosen = _photographs(source, options.out)
    if not chosen:
        raise UsageError(f"{path} holds no image but pictures that xdino drew")
    if len(chosen) < len(source):
        _say(f"left out {len(source) - len(chosen):,} pictures in {path} that xdino drew")
    stem = _unused(Path(os.path.realpath(path)).name, taken)
    if options.fps is None:
        items = [_item_of(source, i, taken, path) for i in chosen]
        work.folders.append((stem, items))
        return
    own = set[str]()
    items = [_item_of(source, i, own, path) for i in chosen]
    work.videos.append(Film(stem, Fraction(options.fps), partial(_frames_of, items)))


def _photographs(source: Source, out: Path) -> list[int]:
    """The images of `source` that were not drawn here, and do not lie in `out` itself."""
    if not isinstance(source, FileSource):
        return list(range(len(source)))
    real, place = cache(os.path.realpath), os.path.realpath(out)

    def ours(path: str) -> bool:
        return real(os.path.dirname(path)) == place or figures.drawn_here(Path(path))

    return [i for i in range(len(source)) if not ours(source.path(i))]


_OURS = re.compile(  # how a picture's name ends, behind that of its image
    r"-(sheet|pca|xca-(sheet|block\d+)|(layer|block)\d+-((head\d+|mean)-?)?(overlay|mask)?)"
)


def _refuse_overwriting(read: Sequence[Path], work: Work, out: Path) -> None:
    """Refuse a photograph that is called as a picture of another will be, in the same place.

    Raises:
        UsageError: there is one.
    """
    place = os.path.realpath(out)
    stems = {item.stem for item in work.images} | {film.stem for film in work.videos}
    stems |= {item.stem for _, items in work.folders for item in items}
    for path in read:
        ending = _OURS.search(path.stem)
        if ending is None or ending.end() < len(path.stem) or path.is_dir():
            continue
        if path.stem[: ending.start()] in stems and os.path.realpath(path.parent) == place:
            raise UsageError(f"{path} would be drawn over: choose another --out")


def _say(sentence: str) -> None:
    stderr_console().print(printable(sentence), markup=False, soft_wrap=True)


LONGEST_STEM = 160  # bytes of it: file systems end names at 255


def _unused(name: str, taken: set[str]) -> str:
    """A stem for new files: `name`, or with a number behind it, for none must write over another.

    In UTF-8, and not too long for what comes behind it: the end of a name tells images apart.
    """
    stem = printable(name).encode()[-LONGEST_STEM:].decode(errors="ignore")
    found, number = stem, 2
    while found in taken:
        found, number = f"{stem}-{number}", number + 1
    taken.add(found)
    return found


def _item_of(source: Source, index: int, taken: set[str], root: Path) -> Item:
    path, root = Path(source.describe(index)), root.absolute()
    below = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    stem = _unused("-".join(below.with_suffix("").parts), taken)
    return Item(stem, partial(_read, source, index), str(below))


def _read(source: Source, index: int) -> np.ndarray:
    if isinstance(source, FileSource):
        return image_files.read(Path(source.path(index)), source.channels)
    try:
        return source.read(index)
    except DAMAGED as error:
        raise UsageError(f"{source.describe(index)} cannot be read: {error}") from None


def _frames_of(items: Sequence[Item]) -> Iterator[Frame]:
    skipped = Skipped(len(items))
    for item in items:
        try:
            yield Frame(item.read())
        except UsageError as error:
            skipped.add(item, error)


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
    work = gather(names, backbone.in_chans, options)  # type: ignore[arg-type]
    _check(backbone, options)
    _make(options.out)
    skipped = Skipped(len(_items(work)) + len(work.videos))
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


def _make(out: Path) -> None:
    """Make the folder of the pictures before anything is computed for them."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    with world(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)


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
        photograph = figures.as_rgb(image)
        one = figures.one_map(maps.layers[-1], options.head)
        view = figures.view(one, photograph, maps.lattice, options.mass)
        yield item.name, [photograph, view.overlay, figures.dimmed(photograph, view.mask)]
        tell(done, len(items))


def _film_attention(backbone: nn.Module, film: Film, options: Options) -> Iterator[Path]:
    """Three videos a layer; yields them once they are whole."""
    paths: list[Path] = []
    limits: dict[str, tuple[float, float]] = {}
    tell = _tell(film)
    with ExitStack() as stack:
        writers: dict[str, video.Writer] = {}

        def put(name: str, picture: np.ndarray, frame: Frame) -> None:
            if name not in writers:
                paths.append(options.out / f"{film.stem}-{name}.mp4")
                writers[name] = stack.enter_context(film.writer(paths[-1]))
            writers[name].add(picture, frame.time, frame.duration)

        for number, frame in enumerate(film.frames(), 1):
            maps = _maps(backbone, frame.pixels, f"frame {number} of {film.stem}", options)
            photograph = figures.as_rgb(frame.pixels)
            for name, one in figures.choose(maps, options.head):
                limits[name] = _calmer(limits.get(name), figures.limits_of(one))
                view = figures.view(one, photograph, maps.lattice, options.mass, limits[name])
                put(name, view.heat, frame)
                put(f"{name}-overlay", view.overlay, frame)
                put(f"{name}-mask", figures.black_white(view.mask), frame)
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
    work = gather(names, backbone.in_chans, options)  # type: ignore[arg-type]
    attending.grid(backbone, 64, 64)  # refuses a backbone without patches before anything is read
    colours = _Colours(backbone, work, options)
    _make(options.out)
    cells = []
    for item in colours.readable():
        path = options.out / f"{item.stem}-pca.png"
        figures.save(figures.Image.fromarray(colours.picture(item.read())), path)
        yield path
        cells.append((item, path))
    for film in work.videos:
        path = options.out / f"{film.stem}-pca.mp4"
        tell = _tell(film)
        with film.writer(path) as out:
            for number, frame in enumerate(film.frames(), 1):
                out.add(colours.picture(frame.pixels), frame.time, frame.duration)
                tell(number)
        yield path
    if len(cells) > 1:
        rows = ((item.name, _pair(item, path)) for item, path in cells)
        yield from figures.folder_sheets(rows, options.out, "pca-sheet")


def _items(work: Work) -> list[Item]:
    return [*work.images, *(item for _, items in work.folders for item in items)]


def _pair(item: Item, path: Path) -> list[np.ndarray]:
    """The image and its components' picture, for the sheet."""
    return [figures.as_rgb(item.read()), np.asarray(figures.Image.open(path))]


class _Colours:
    """The components of everything in `work`, and any image in their colours."""

    def __init__(self, backbone: nn.Module, work: Work, options: Options) -> None:
        self._backbone, self._options = backbone, options
        self._work, self._skipped = work, Skipped(len(_items(work)) + len(work.videos))
        moments = pca.Moments()
        for found in self._tokens():
            moments.add(found.tokens)
        try:
            self._components = moments.components()
        except ValueError as error:
            raise UsageError(f"too few patches for components: {error}") from None
        self._foreground: pca.Foreground | None = None
        if options.foreground:
            self._foreground, moments = pca.Foreground(self._components), pca.Moments()
            for found in self._tokens():
                self._foreground.look(found)
            for found in self._tokens():
                moments.add(found.tokens[torch.from_numpy(self._foreground.of(found).ravel())])
            try:
                self._components = moments.components()
            except ValueError as error:
                raise UsageError(f"too few patches in the foreground: {error}") from None
        ends = pca.Range()
        for found in self._tokens():
            values = self._components.project(found.tokens)
            keep = self._kept(found).ravel()
            if keep.any():
                ends.add(values[keep])
        self._low, self._high = ends.ends()

    def readable(self) -> list[Item]:
        """The images, without those that could not be read."""
        return [item for item in _items(self._work) if item.stem not in self._skipped.reasons]

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


# --- XCA --------------------------------------------------------------------------------------


def draw_channels(backbone: nn.Module, names: Sequence[str], options: Options) -> Iterator[Path]:
    """XCA's channel-by-channel matrices of each image as heat maps; yields each file written.

    Raises:
        UsageError: no XCA in this backbone, a video, or a file that cannot be read.
        RunFailed: a picture cannot be written.
    """
    work = gather(names, backbone.in_chans, options)  # type: ignore[arg-type]
    attending.channel_attention(backbone, _grey(backbone))
    if work.videos:
        raise UsageError("--xca draws images, not videos: its matrices have no map over a frame")
    _make(options.out)
    skipped = Skipped(len(_items(work)))
    for item in _items(work):
        try:
            inputs, _ = attention.network_input(backbone, item.read(), options.size)
        except UsageError as error:
            skipped.add(item, error)
            continue
        with evaluating(backbone), torch.inference_mode():
            found = attending.channel_attention(backbone, inputs)
        blocks: list[Any] = [block[0].cpu().numpy() for block in found]
        yield from figures.draw_channels(blocks, options.out, item.stem)
