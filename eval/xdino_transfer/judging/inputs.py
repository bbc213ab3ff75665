"""What a classifier is asked about, as a person names it: images, folders, lists, tars, sets, films."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdino.data import Source
from xdino.data.decode import HEAD, SUFFIXES, recognised
from xdino.data.files import FileSource
from xdino.data.listing import printable
from xdino.data.sources import limit_pixels, open_source
from xdino.errors import asked
from xdino.runtime.places import DATA_SETS
from xdino_eval.attention import video
from xdino_transfer.datasets import is_archive, open_scored


@dataclass(frozen=True)
class Film:
    """A video, and its frames with their names."""

    path: Path
    channels: int

    def frames(self) -> Iterator[tuple[str, np.ndarray]]:
        film = video.Video(self.path)
        for number, frame in enumerate(film.timed(self.channels), 1):
            when = "" if frame.time is None else f" ({float(frame.time):.2f} s)"
            yield f"{self.path}, frame {number}{when}", frame.pixels


class _Named(FileSource):
    """Image files that were named one by one, and are called as they were named."""

    def describe(self, index: int) -> str:
        return printable(self.member(index))


def gather(
    names: Sequence[str], channels: int, max_pixels: int | None = None
) -> list[Source | Film]:
    """What a person named, in order: images, folders, lists, tars and named data sets; videos.

    Images that are named side by side are one source.

    Raises:
        UsageError: nothing there, or a folder without images.
    """
    found: list[Source | Film] = []
    images: list[Path] = []

    def close() -> None:
        if images:
            paths = [os.fsencode(path) for path in images]
            name = str(images[0]) if len(images) == 1 else f"{len(images):,} images"
            found.append(_Named(name, Path(), paths, channels))
            images.clear()

    for name in names:
        with asked(name):
            path = Path(name).expanduser()
            single = path.is_file()
        if single and video.is_video(path):
            close()
            found.append(Film(path, channels))
        elif single and _is_image(path):
            images.append(path)
        else:
            close()
            found.append(_source(name, path, channels))
    close()
    for source in found:
        if isinstance(source, Source) and max_pixels is not None:
            limit_pixels(source, max_pixels)
    return found


def _is_image(path: Path) -> bool:
    """By its suffix, or without one by how it begins."""
    if path.suffix:
        return path.suffix.lower() in SUFFIXES
    with asked(f"cannot read {path}"), open(path, "rb") as file:
        return recognised(file.read(HEAD)) is not None


def _source(name: str, path: Path, channels: int) -> Source:
    """All images of a folder, list or tar; of what has a layout or a name of its own, the val split."""
    if path.is_dir() and is_archive(path):
        return open_scored(name, "val", channels)[0]
    named = name.partition(":")[0] in DATA_SETS
    return open_source(name, "val" if named else None, channels)
