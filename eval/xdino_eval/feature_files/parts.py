"""What DATA is divided into for a table of features, and what its images are called there."""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdino.config import MAX_PIXELS
from xdino.data import open_source, open_splits
from xdino.data.listing import printable
from xdino.data.sources import FileSource, Source, TarSource, splits_of
from xdino.errors import UsageError
from xdino_eval.feature_files.rows import Part

BOTH = ("train", "val")


def open_parts(
    data: str, channels: int | None = None, split: str | None = None, max_pixels: int = MAX_PIXELS
) -> list[Part]:
    """The parts of `data` that are asked for, with labels where it has class folders (or `.cls`).

    Args:
        data: whatever `open_source` reads: a folder, flat or not, a list, a tar, a named source.
        split: "train", "val" or "both"; None = what `data` is divided into, all of it where it is
            not.

    Raises:
        UsageError: nothing there; no such split; the classes of train and val differ.
    """
    if split not in (None, "both", *BOTH):
        raise UsageError(f'split must be "train", "val" or "both", got "{split}"')
    wanted: tuple[str | None, ...] = {None: splits_of(data), "both": BOTH}.get(split, (split,))
    if wanted == BOTH:
        try:
            sources = open_splits(data, channels, max_pixels)
        except UsageError:
            sources = (
                _one(data, "train", channels, max_pixels),
                _one(data, "val", channels, max_pixels),
            )
            if all(source.labels is not None for source in sources):
                raise  # of the same classes they must be
        return [_part(name, source, data) for name, source in zip(BOTH, sources, strict=True)]
    (name,) = wanted
    return [_part(name or "", _one(data, name, channels, max_pixels), data)]


def _one(data: str, split: str | None, channels: int | None, max_pixels: int) -> Source:
    """With labels, or without them and a remark that says why there are none."""
    try:
        return open_source(data, split, channels, labelled=True, max_pixels=max_pixels)
    except UsageError as error:
        source = open_source(data, split, channels, max_pixels=max_pixels)
        source.remarks.append(f"features without labels: {error}")
        return source


def _part(split: str, source: Source, data: str) -> Part:
    return Part(split, source, Names(source, data))


class Names(Sequence[str]):
    """What the images of a source are called: their paths below `data`, with forward slashes.

    Of a list of paths as they stand in it; of a tar what its members are called; of images without
    names their numbers.
    """

    def __init__(self, source: Source, data: str) -> None:
        self.source, self.folder = source, ""
        root = Path(data).expanduser()
        if isinstance(source, TarSource):
            self.folder = source.within
        elif isinstance(source, FileSource) and root.is_dir() and len(source):
            member = os.fsdecode(source.member(0))
            below = os.path.relpath(source.path(0).removesuffix(member) or ".", root)
            self.folder = "" if below == "." else below

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = printable(self.source.member(index)).replace(os.sep, "/")
        return posixpath.join(self.folder, name)
