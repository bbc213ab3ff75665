"""A classifier as a command judges it: read, checked against what it is shown, and where it runs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from xdino.backbone import Backbone
from xdino.data import Source
from xdino.data.decode import HEAD, SUFFIXES, recognised
from xdino.data.files import FileSource
from xdino.data.listing import printable
from xdino.data.sources import limit_pixels, open_source
from xdino.errors import asked
from xdino.runtime.device import resolve_device
from xdino.runtime.places import DATA_SETS
from xdino_eval.attention import video
from xdino_eval.extraction import Options
from xdino_eval.results import Row, signed
from xdino_launch.evaluation.subject import check_views, options_for
from xdino_transfer.classification import files, predicting, scoring
from xdino_transfer.classification.files import LoadedClassifier
from xdino_transfer.classification.predicting import Prediction
from xdino_transfer.datasets import is_archive, open_scored


@dataclass(frozen=True)
class Judged:
    """A classifier, and how images are shown to it."""

    loaded: LoadedClassifier
    options: Options
    max_bad_share: float
    max_pixels: int | None

    @classmethod
    def open(
        cls,
        weights: str,
        arch: str | None = None,
        size: int | None = None,
        crop_ratio: float | None = None,
        batch_size: int = 128,
        workers: int = 2,
        device: str = "auto",
        precision: str = "fp32",
        max_bad_share: float = scoring.ALLOWED,
        max_pixels: int | None = None,
    ) -> "Judged":
        """Read everything, or say in a sentence what is wrong.

        Args:
            size: of the square, in pixels; None = the network's own.
            crop_ratio: that square as a share of the resized shorter side; None = what timm says of a
                network of its own, else 1, the published full crop.

        Raises:
            UsageError, RunFailed: as `read_classifier`; a size that the network does not take.
        """
        loaded = files.read_classifier(weights, arch)
        ratio = loaded.crop_ratio or scoring.FULL_CROP if crop_ratio is None else crop_ratio
        transform = scoring.cropped(loaded.classifier.spec, ratio, size)
        where = resolve_device(device)
        backbone = cast(Backbone, loaded.classifier.backbone)
        check_views(backbone, transform, where, batch_size, size is not None)
        options = options_for(where, batch_size, workers, precision)
        return cls(loaded, replace(options, transform=transform), max_bad_share, max_pixels)

    @property
    def channels(self) -> int:
        return len(self.loaded.mean)

    def score(self, source: Source, train_size: int = 0) -> list[Row]:
        """The signed row of `source`."""
        for sentence in source.notices():
            self.options.notice(sentence)
        rows = scoring.score(
            self.loaded.classifier, source, self.options, train_size, self.max_bad_share
        )
        facts = self.loaded.facts
        told = {key: facts[key] for key in ("init", "recipe") if facts.get(key) is not None}
        rows = [
            replace(row, settings=row.settings | told, notes=[*row.notes, *self.loaded.remarks])
            for row in rows
        ]
        return signed(rows, self.loaded.origin.sha256, self.loaded.name)

    def predict(self, found: "Sequence[Source | Film]", top: int) -> list[Prediction]:
        """The `top` likeliest classes of every image and frame, in order.

        Raises:
            RunFailed: as `predicting.predict`.
        """
        classifier, predictions = self.loaded.classifier, list[Prediction]()
        for each in found:
            if isinstance(each, Film):
                predictions += predicting.predict_frames(
                    classifier, each.frames(), self.options, top
                )
                continue
            for sentence in each.notices():
                self.options.notice(sentence)
            predictions += predicting.predict(
                classifier, each, self.options, top, self.max_bad_share
            )
        return predictions


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


def gather(names: Sequence[str], judged: Judged) -> list[Source | Film]:
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
            found.append(_Named(name, Path(), paths, judged.channels))
            images.clear()

    for name in names:
        with asked(name):
            path = Path(name).expanduser()
            single = path.is_file()
        if single and video.is_video(path):
            close()
            found.append(Film(path, judged.channels))
        elif single and _is_image(path):
            images.append(path)
        else:
            close()
            found.append(_source(name, path, judged.channels))
    close()
    for source in found:
        if isinstance(source, Source) and judged.max_pixels is not None:
            limit_pixels(source, judged.max_pixels)
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
