"""What the evaluation commands share: a backbone, two labelled splits, how images are shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from xdino import checkpoint, config, data
from xdino.backbone import Backbone
from xdino.config import Crops
from xdino.data.files import split_folder
from xdino.data.sources import limit_pixels
from xdino.errors import RunFailed, UsageError
from xdino.plan import feasibility
from xdino.run_directory import CONFIG_FILE
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino_eval import results
from xdino_eval.extraction import Options
from xdino_eval.features import Features
from xdino_eval.knn.sharding import cut, share
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform
from xdino_launch.console import counter, stderr_console

Splits = Callable[[str, int], tuple[data.Source, data.Source]]
NONE = torch.empty(0, dtype=torch.int64)
NO_FEATURES = Features(torch.empty(0, 0), NONE, NONE)


@dataclass(frozen=True)
class Subject:
    """A frozen backbone, the data it is judged on, and how images are shown to it."""

    backbone: Backbone
    train: data.Source
    val: data.Source
    options: Options

    @classmethod
    def open(
        cls,
        weights: str,
        data: str,
        arch: str | None = None,
        role: str = "teacher",
        size: int | None = None,
        resize: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        batch_size: int = 128,
        workers: int = 2,
        device: str = "auto",
        precision: str = "fp32",
        cache: str | None = None,
        max_pixels: int | None = None,
        splits: Splits | None = None,
    ) -> "Subject":
        """Load and open everything, or say in a sentence what is wrong.

        Args:
            max_pixels: an image of more is skipped; None = as the splits were opened.
            splits: opens train and val; None = `open_splits`.

        Raises:
            UsageError, RunFailed: as `load_backbone` and `open_splits`.
        """
        backbone = checkpoint.load_backbone(weights, arch, role)
        train, val = (splits or open_splits)(data, backbone.in_chans)
        for sentence in dict.fromkeys([*train.notices(), *val.notices()]):
            if distributed.rank() == 0:
                stderr_console().print(sentence, soft_wrap=True)
        if max_pixels is not None:
            limit_pixels(train, max_pixels)
            limit_pixels(val, max_pixels)
        try:
            transform = EvalTransform.of(backbone, size, resize, mean, std)
        except ValueError as error:
            raise UsageError(str(error)) from None
        where = resolve_device(device)
        check_views(backbone, transform, where, batch_size, size is not None)
        options = options_for(where, batch_size, workers, precision)
        kept = Path(cache) if cache else None
        return cls(backbone, train, val, replace(options, transform=transform, cache=kept))

    def on_all(self) -> "Subject":
        """The same, each of several processes with its share of the images, where none are kept.

        Raises:
            RunFailed: as `check_alike`.
        """
        if self.options.cache is not None:
            return self
        distributed.together(self.check_alike)
        return replace(self, options=replace(self.options, shared=distributed.world_size() > 1))

    def keeping_features(self, folder: Path | None) -> "Subject":
        """The same with another folder for features; None = none are kept."""
        return replace(self, options=replace(self.options, cache=folder))

    def check_alike(self) -> None:
        """Raises RunFailed where processes have other weights or see other images."""
        if distributed.world_size() == 1:
            return
        for what, own in {
            "weights": self.backbone.origin.sha256,
            "images of train": data.fingerprint(self.train),
            "images of val": data.fingerprint(self.val),
        }.items():
            everyone = distributed.gather(own)
            if len(set(everyone)) > 1:
                other = next(r for r, theirs in enumerate(everyone) if theirs != everyone[0])
                raise RunFailed(f"processes 0 and {other} see different {what} under one name")

    def features(self) -> tuple[Features, Features]:
        """Features of both splits; unreadable images are named on standard error."""
        return self.options.features(self.backbone, self.train, self.val)

    def features_of(
        self,
        split: str,
        source: data.Source,
        indices: np.ndarray | None = None,
        part: str = "",
        tokens: Sequence[str] = ("class",),
    ) -> Features:
        """Features of one source, see `Options.features_of`; of chosen images possibly none."""
        some = indices is not None
        return self.options.features_of(self.backbone, split, source, indices, part, tokens, some)

    def share(self, split: str, source: data.Source, rows: int | None = None) -> list[Features]:
        """This process's share of the features of a source, every process its own.

        In pieces of about `rows` images, which lie in the cache's folder; None is one piece.

        Raises:
            RunFailed: as `extract` on any of the processes.
        """
        rank, processes = distributed.rank(), distributed.world_size()
        if processes == 1 and rows is None:
            return [self.features_of(split, source)]
        batch_size = self.options.batch_size
        places = share(len(source), batch_size, rank, processes)
        pieces = cut(places, batch_size, rows)
        transform = self.options.transform_for(self.backbone)
        shown = f"{transform.describe()}, {self.options.precision}"

        def extract_pieces() -> list[Features]:
            return [
                self.features_of(split, source, piece, f"{piece[0]} to {piece[-1]}")
                for piece in pieces
                if len(piece)
            ] or [replace(NO_FEATURES, data=source.name, transform=shown)]

        return distributed.together(extract_pieces)

    def sign(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the weights they speak of."""
        return results.signed(rows, self.backbone.origin.sha256, self.backbone.origin.name)


def options_for(
    device: torch.device, batch_size: int = 128, workers: int = 2, precision: str = "fp32"
) -> Options:
    """Options of an evaluator that tells standard error how far it is, on the first process."""
    console = stderr_console()
    if distributed.rank() != 0:
        return Options(batch_size=batch_size, workers=workers, device=device, precision=precision)
    return Options(
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        counter=partial(counter, console),
        notice=partial(console.print, markup=False, soft_wrap=True),
    )


def check_views(
    backbone: Backbone, transform: EvalTransform, device: torch.device, batch: int, resized: bool
) -> None:
    """Raises UsageError where the backbone does not take what `transform` shows it.

    Args:
        resized: at a size that is not its own; its own was tried when it was trained.
    """
    channels, size = backbone.in_chans, transform.size
    for name, given in (("--mean", transform.mean), ("--std", transform.std)):
        if len(given) != channels:
            raise UsageError(f"{name} takes one value a channel: {channels}, got {len(given)}")
    needed = 4 * batch * channels * max(size, transform.resize) ** 2
    mend = "lower --batch-size, --size or --resize"
    feasibility.check_memory("the images of a batch", needed, device, mend)
    if resized:
        trial = feasibility.Trial("--size", size, 1, training=False)
        own = (backbone.input_size,)
        feasibility.check_sizes(backbone, backbone.spec.arch, channels, [trial], own=own)


def crops_of_run(weights: Path) -> Crops | None:
    """The crops of RUN for RUN itself, RUN/backbone.safetensors and RUN/checkpoints/FILE."""
    for folder in (weights, weights.parent, weights.parent.parent):
        if (folder / CONFIG_FILE).is_file() and (folder / checkpoint.BACKBONE_FILE).is_file():
            if config.kind_of(folder / CONFIG_FILE) != config.Config.kind:
                return None  # a fine-tuned run has other crops
            return config.load(str(folder / CONFIG_FILE)).crops
    return None


open_splits = data.open_splits


def open_one_split(name: str, channels: int) -> tuple[data.Source, data.Source]:
    """The labelled train split, which a folder of class folders is too, as train and as val."""
    source = data.open_source(name, "train", channels, labelled=True)
    return source, source


def open_any_splits(name: str, channels: int) -> tuple[data.Source, data.Source]:
    """Both splits, labelled or not; the same source twice where there is no val."""

    def one(split: str) -> data.Source:
        try:
            return data.open_source(name, split, channels, labelled=True)
        except UsageError:
            return data.open_source(name, split, channels)

    path, train = Path(name).expanduser(), one("train")
    return train, one("val") if not path.exists() or split_folder(path, "val").is_dir() else train
