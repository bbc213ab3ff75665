"""Pictures with masks as a source, looked at before a run, and their micro-batches made by threads.

A picture's view follows from (seed, epoch, index), see `segmentation.views`; which pictures a step
takes, from the seed and its number. A picture whose mask cannot be used counts as unreadable: the next
one stands in, up to `data.max_bad_share`.

Letters: B pictures of a micro-batch on one rank, s side of a crop, C channels, H x W pixels.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xdino.config.bands import Bands
from xdino.data import BadImage, Loader
from xdino.data.decode import UnreadableImage
from xdino.data.files.source import FileSource
from xdino.data.image_files import shown_size
from xdino.data.listing import first
from xdino.data.source import limit_pixels, settle_bands
from xdino.errors import UsageError
from xdino.runtime import rng
from xdino_transfer.segmentation.losses import VOID
from xdino_transfer.segmentation.maps import Maps
from xdino_transfer.segmentation.views import TrainViews

LOOKED_AT = 500  # masks of a split that are read before a run; all, where there are fewer


@dataclass(frozen=True)
class UsableMaps(Maps):
    """The same, where a picture whose mask cannot be used counts as unreadable, and is left out."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return super().read(index)
        except UsageError as error:
            raise UnreadableImage(str(error)) from None


class MaskedPictures(FileSource):
    """The pictures of `maps`, whose masks are read with them.

    asked: channels, `Bands`, or None for what there is; `self.maps` are read so.
    """

    def __init__(self, maps: UsableMaps, asked: int | None = None) -> None:
        super().__init__(maps.where, *_named(maps.images), asked or maps.channels)
        limit_pixels(self, maps.max_pixels)
        settle_bands(self, asked)
        self.maps = replace(maps, channels=self.channels)
        self._masks = FileSource(maps.where, *_named(maps.masks), 1)

    def _content(self) -> Iterator[bytes]:
        """The masks count, too."""
        yield from super()._content()
        yield from self._masks._content()

    def annotated(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A picture uint8 [H, W, C] and its labels uint8 [H, W], VOID where there is none.

        Raises:
            UnreadableImage, OSError: one of the two cannot be used.
        """
        return self.maps.read(index)


def _named(paths: Sequence[Path]) -> tuple[Path, list[bytes]]:
    """The folder that files lie in, and their names below it."""
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return folder, [os.fsencode(path.relative_to(folder)) for path in paths]


def check_masks(maps: Maps, max_bad_share: float) -> list[str]:
    """Look at the masks, or a sample of many; sentences on those that a run will leave out.

    Raises:
        UsageError: too many cannot be used, or there are not two classes to tell apart.
    """
    key = b"".join(os.fsencode(path.name) for path in maps.masks)[-4096:] + b"0123456789abcdef"
    chosen = rng.sample(key, LOOKED_AT, len(maps)).tolist()

    def look(index: int) -> tuple[set[int], str | None]:
        try:
            if isinstance(maps.channels, Bands):  # whose headers are of many kinds
                return {*np.unique(maps.read(index)[1]).tolist()}, None
            width, height = shown_size(maps.images[index])
            return {*np.unique(maps.labels(index, (height, width))).tolist()}, None
        except UnreadableImage as error:
            return set(), f"{maps.describe(index)}: {error}"
        except (UsageError, OSError) as error:
            return set(), str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(look, chosen))
    bad = [why for _, why in found if why is not None]
    notices = []
    if bad:
        of = f"{len(chosen):,} pictures of {maps.where}"
        of += " that were looked at" if len(chosen) < len(maps) else ""
        sentence = f"{len(bad):,} of the {of} cannot be used: {'; '.join(bad[:3])}"
        sentence += " and more" if len(bad) > 3 else ""
        if len(bad) > max_bad_share * len(chosen):
            raise UsageError(f"{sentence} (data.max_bad_share allows {max_bad_share:.2%})")
        notices.append(f"{sentence}; they are left out")
    every = set().union(*(seen for seen, _ in found))
    classes = every - {VOID}
    if len(chosen) < len(maps):
        return notices
    if len(classes) < 2:
        only = f"only {maps.classes[classes.pop()]}" if classes else "no class at all"
        void = f" ({VOID} counts as none: number classes from 0)" if VOID in every else ""
        raise UsageError(
            f"the masks of {maps.where} show {only}: there is nothing to tell apart{void}"
        )
    if absent := [name for number, name in enumerate(maps.classes) if number not in classes]:
        notices.append(f"no mask of {maps.where} shows {first(absent)}")
    return notices


@dataclass(frozen=True)
class MaskedBatch:
    """One micro-batch of one rank.

    images: float32 [B, C, s, s], normalised; labels: uint8 [B, s, s], VOID where there is none;
    indices: int64 [B] of what was asked for.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    iteration: int
    epoch: int


@dataclass(eq=False)
class MaskedLoader(Loader[MaskedBatch]):
    """As `data.CropLoader`, each picture in one crop with its labels."""

    source: MaskedPictures
    view: TrainViews
    batch_size: int
    seed: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    workers: int = 2
    prefetch: int = 3
    pin_memory: bool = False
    max_bad_share: float = 0.05
    known_bad: InitVar[Iterable[BadImage]] = ()

    bad: dict[int, tuple[str, str]] = field(init=False, default_factory=dict)
    wait_seconds: float = field(init=False, default=0.0)
    threads = "xdino-masks"

    def __post_init__(self, known_bad: Iterable[BadImage]) -> None:
        self._begin(known_bad)

    def take(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.source.annotated(index)

    def _prepare(self, iteration: int, micro: int) -> tuple[MaskedBatch, list[Callable[[], None]]]:
        epoch, indices = self.indices_at(iteration, micro)
        side, B = self.view.crop, self.batch_size
        shape = (B, self.source.channels, side, side)
        images = torch.empty(shape, pin_memory=self.pin_memory)
        labels = torch.empty((B, side, side), dtype=torch.uint8, pin_memory=self.pin_memory)

        def fill(first: int, last: int) -> None:
            for row in range(first, last):
                index = int(indices[row])
                shown, (image, wanted) = self._read(index)
                drawn = self.view.draw(self.seed, epoch, index)
                try:
                    images[row], labels[row] = self.view(image, wanted, drawn)
                except Exception as error:
                    error.add_note(f"while cutting {self.source.describe(shown)}")
                    raise

        batch = MaskedBatch(images, labels, indices, iteration, epoch)
        return batch, self._tasks(fill)
