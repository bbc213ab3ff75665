"""What `xdino attention` draws: images, folders and videos told apart, and named for their pictures.

Everything is named before anything is computed: a missing file costs no time. What is drawn is never
read again: --out may lie in a folder of images, pictures that xdino drew are left out of folders, and
a second run draws as many pictures as the first.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np

from xdino.data import image_files
from xdino.data.image_files import DAMAGED, printable
from xdino.data.sources import FileSource, Source, open_source
from xdino.errors import UsageError, asked
from xdino_eval import sheets
from xdino_eval.attention import video
from xdino_eval.attention.video import Frame
from xdino_launch.console import counter, stderr_console

LIMIT = 200  # images of a folder, where nobody says how many
LONGEST_STEM = 160  # bytes of it: file systems end names at 255


@dataclass(frozen=True)
class Item:
    """A picture to be made: a name for its files, and the image, read when it is wanted."""

    stem: str
    read: Callable[[], np.ndarray]
    name: str


@dataclass(frozen=True)
class Film:
    """Frames in order, as often as asked for, and how fast they play; `tick` as of `video.Writer`."""

    stem: str
    fps: Fraction
    frames: Callable[[], Iterator[Frame]]
    tick: Fraction | None = None

    def writer(self, path: Path) -> video.Writer:
        return video.Writer(path, self.fps, self.tick)

    def counted(self) -> Iterator[tuple[int, Frame]]:
        """The frames with their numbers from 1; how far it is, is said on standard error."""
        tell = counter(stderr_console(), f"frames of {self.stem}")
        for number, frame in enumerate(self.frames(), 1):
            yield number, frame
            tell(number, number)


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
            say(f"skipped {sentence}")
        self.reasons[item.stem] = sentence
        if len(self.reasons) >= self.total:
            none = "" if self.total == 1 else f"none of the {self.total:,} images can be drawn: "
            raise UsageError(none + next(iter(self.reasons.values()))) from None


@dataclass
class Work:
    """What the arguments came to."""

    images: list[Item] = field(default_factory=list)
    folders: list[tuple[str, list[Item]]] = field(default_factory=list)
    videos: list[Film] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """The images, those of folders too."""
        return [*self.images, *(item for _, items in self.folders for item in items)]

    def skipped(self) -> Skipped:
        return Skipped(len(self.items) + len(self.videos))


def gather(
    names: Sequence[str],
    channels: int,
    out: Path,
    fps: float | None = None,
    limit: int = LIMIT,
) -> Work:
    """Images, folders of them and videos, told apart; with `fps`, a folder is a film.

    Args:
        out: the folder that pictures will lie in.
        limit: images of a folder that is no film; where it holds more, they are evenly spread.

    Raises:
        UsageError: nothing there, a folder without images, no video where one was named, or pictures
            would be drawn over what is read.
    """
    gathering = _Gathering(channels, out, fps, limit)
    for name in names:
        path = Path(name)
        with asked(name):
            if path.is_dir():
                gathering.add_folder(path)
            elif not path.is_file():
                raise UsageError(f"there is no image, folder or video {path}")
            else:
                gathering.add_file(path)
    own, work = gathering.own, gathering.work
    if own and not (work.images or work.folders or work.videos):
        raise UsageError(f"{own[0]} was drawn by xdino, and is not read again: name a photograph")
    if own:
        say(f"left out {len(own)} pictures in {out} that xdino drew")
    _refuse_overwriting([path for path in map(Path, names) if path not in own], work, out)
    return work


class _Gathering:
    """`own`: pictures of ours that lie where new ones will."""

    def __init__(self, channels: int, out: Path, fps: float | None, limit: int) -> None:
        self.work, self.own = Work(), list[Path]()
        self._channels, self._out, self._limit = channels, out, limit
        self._fps = None if fps is None else Fraction(fps)
        self._taken = set[str]()  # stems

    def add_file(self, path: Path) -> None:
        beside = os.path.realpath(path.parent) == os.path.realpath(self._out)
        if video.is_video(path):
            film = video.Video(path)
            if beside and film.drawn_here:
                self.own.append(path)
            else:
                self.work.videos.append(self._film(film, path))
        elif beside and sheets.drawn_here(path):
            self.own.append(path)
        else:
            read = partial(image_files.read, path, self._channels)
            self.work.images.append(Item(self._unused(path.stem), read, str(path)))

    def _film(self, film: video.Video, path: Path) -> Film:
        """At its own pace, or at the one asked for."""
        stem = self._unused(path.stem)
        if self._fps is None:
            return Film(stem, film.fps, partial(film.timed, self._channels), film.tick)
        return Film(stem, self._fps, partial(_untimed, film, self._channels))

    def add_folder(self, path: Path) -> None:
        if os.path.realpath(path) == os.path.realpath(self._out):
            raise UsageError(
                f"--out is the folder of images {path} itself: name another, or one below it"
            )
        # As a path, for a folder may be called like a data set.
        source = open_source(str(path.absolute()), channels=self._channels)
        chosen = _photographs(source, self._out)
        if not chosen:
            raise UsageError(f"{path} holds no image but pictures that xdino drew")
        for sentence in source.notices():  # videos, for one, are named by themselves
            say(sentence)
        if len(chosen) < len(source):
            say(f"left out {len(source) - len(chosen):,} pictures in {path} that xdino drew")
        if self._fps is None and len(chosen) > self._limit:
            say(
                f"drawing {self._limit:,} of the {len(chosen):,} images in {path}, evenly spread: "
                "--limit N draws more"
            )
            spread = np.linspace(0, len(chosen) - 1, self._limit).round().astype(int)
            chosen = [chosen[i] for i in spread]
        stem = self._unused(Path(os.path.realpath(path)).name)
        items = [self._item(source, i, path) for i in chosen]
        if self._fps is None:
            self.work.folders.append((stem, items))
        else:
            self.work.videos.append(Film(stem, self._fps, partial(_frames_of, items)))

    def _item(self, source: Source, index: int, root: Path) -> Item:
        path, root = Path(source.describe(index)), root.absolute()
        below = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        stem = str(below)  # a film's frames have no files of their own
        if self._fps is None:
            stem = self._unused("-".join(below.with_suffix("").parts))
        return Item(stem, partial(_read, source, index), str(below))

    def _unused(self, name: str) -> str:
        """A stem for new files: `name`, or with a number behind it, for none must write over another.

        In UTF-8, and not too long for what comes behind it: the end of a name tells images apart.
        """
        stem = printable(name).encode()[-LONGEST_STEM:].decode(errors="ignore")
        found, number = stem, 2
        while found in self._taken:
            found, number = f"{stem}-{number}", number + 1
        self._taken.add(found)
        return found


def _photographs(source: Source, out: Path) -> list[int]:
    """The images of `source` that were not drawn here, and do not lie in `out` itself."""
    if not isinstance(source, FileSource):
        return list(range(len(source)))
    real, place = cache(os.path.realpath), os.path.realpath(out)

    def ours(path: str) -> bool:
        return real(os.path.dirname(path)) == place or sheets.drawn_here(Path(path))

    return [i for i in range(len(source)) if not ours(source.path(i))]


_OURS = re.compile(  # how a picture's name ends, behind that of its image
    r"-(sheet|overlay|pca|components|xca-(sheet|block\d+)|"
    r"(layer|block)\d+-((head\d+|mean)-?)?(overlay|mask)?)"
)
_OF_ALL = re.compile(r"(pca-)?sheet(-\d+)?")  # how the sheet of several images is called


def _refuse_overwriting(read: Sequence[Path], work: Work, out: Path) -> None:
    """Refuse a photograph that is called as a picture of another will be, in the same place.

    Raises:
        UsageError: there is one.
    """
    place = os.path.realpath(out)
    stems = {item.stem for item in work.items} | {film.stem for film in work.videos}
    several = len(work.items) > 1
    for path in read:
        beside = os.path.realpath(path.parent) == place
        if beside and several and path.suffix == ".png" and _OF_ALL.fullmatch(path.stem):
            raise UsageError(f"{path} would be drawn over: choose another --out")
        ending = _OURS.search(path.stem)
        if ending is None or ending.end() < len(path.stem) or path.is_dir():
            continue
        if path.stem[: ending.start()] in stems and beside:
            raise UsageError(f"{path} would be drawn over: choose another --out")


def _read(source: Source, index: int) -> np.ndarray:
    if isinstance(source, FileSource):
        return image_files.read(Path(source.path(index)), source.channels)
    try:
        return source.read(index)
    except DAMAGED as error:
        raise UsageError(f"{source.describe(index)} cannot be read: {error}") from None


def _untimed(film: video.Video, channels: int) -> Iterator[Frame]:
    return (Frame(pixels) for pixels in film.frames(channels))


def _frames_of(items: Sequence[Item]) -> Iterator[Frame]:
    skipped = Skipped(len(items))
    for item in items:
        try:
            yield Frame(item.read())
        except UsageError as error:
            skipped.add(item, error)


def say(sentence: str) -> None:
    """On standard error; names of files may hold anything."""
    stderr_console().print(printable(sentence), markup=False, soft_wrap=True)
