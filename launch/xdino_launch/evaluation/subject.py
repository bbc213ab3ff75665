"""What the evaluation commands share: a backbone, two labelled splits, a transform."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import nn

from xdino import checkpoint, data
from xdino.config import MAX_PIXELS
from xdino.data.sources import limit_pixels
from xdino.errors import RunFailed, UsageError
from xdino.plan import feasibility
from xdino.runtime import distributed
from xdino.runtime.atomic import written_beside
from xdino.runtime.device import resolve_device
from xdino_eval import results
from xdino_eval.features import Features, cache_key, cached, content_of, extract
from xdino_eval.knn.sharding import cut, kept, share
from xdino_eval.linear.grid import Tokens, needs_both
from xdino_eval.results import Row
from xdino_eval.results import features_name as features_name  # part of this room's interface
from xdino_eval.transform import EvalTransform
from xdino_launch.console import counter, stderr_console

Splits = Callable[[str, int], tuple[data.Source, data.Source]]
NONE = torch.empty(0, dtype=torch.int64)
NO_FEATURES = Features(torch.empty(0, 0), NONE, NONE)


@dataclass(frozen=True)
class Subject:
    """A frozen backbone, the data it is judged on, and how images are shown to it."""

    backbone: nn.Module
    train: data.Source
    val: data.Source
    transform: EvalTransform
    device: torch.device
    batch_size: int
    workers: int
    precision: str
    cache: Path | None = None  # folder where features are kept for the next command

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
        channels: Any = backbone.in_chans
        train, val = (splits or open_splits)(data, channels)
        for sentence in dict.fromkeys([*train.notices(), *val.notices()]):
            stderr_console().print(sentence, soft_wrap=True)
        if max_pixels is not None:
            limit_pixels(train, max_pixels)
            limit_pixels(val, max_pixels)
        try:
            transform = EvalTransform.of(backbone, size, resize, mean, std)  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(str(error)) from None
        where = resolve_device(device)
        check_views(backbone, transform, where, batch_size, size is not None)
        kept = Path(cache) if cache else None
        return cls(backbone, train, val, transform, where, batch_size, workers, precision, kept)

    def check_alike(self) -> None:
        """Raises RunFailed where processes have other weights or see other images."""
        if distributed.world_size() == 1:
            return
        weights: Any = self.backbone.weights
        for what, own in {
            "weights": weights["sha256"],
            "images of train": data.fingerprint(self.train),
            "images of val": data.fingerprint(self.val),
        }.items():
            everyone = distributed.gather(own)
            if len(set(everyone)) > 1:
                other = next(r for r, theirs in enumerate(everyone) if theirs != everyone[0])
                raise RunFailed(f"processes 0 and {other} see different {what} under one name")

    def features(self, tokens: Sequence[str] = ("class",)) -> tuple[Features, Features]:
        """Features of both splits; unreadable images are named on standard error."""
        train, val = (
            self.features_of(name, source, tokens=tokens)
            for name, source in (("train", self.train), ("val", self.val))
        )
        return train, val

    def features_of(
        self,
        split: str,
        source: data.Source,
        indices: np.ndarray | None = None,
        part: str = "",
        tokens: Sequence[str] = ("class",),
    ) -> Features:
        """Features of one source, read from the cache where they are in it.

        Args:
            indices: images of it, which the cache calls `part`; None for all.
            tokens: what is read off the backbone, see `grid.Tokens`.
        """
        console = stderr_console()
        network = self.backbone if tuple(tokens) == ("class",) else Tokens(self.backbone, tokens)
        compute = partial(
            extract,
            network,
            source,
            self.transform,
            self.batch_size,
            self.device,
            self.workers,
            self.precision,
            indices=indices,
            progress=counter(console, f"features of {split}"),
            may_be_empty=indices is not None,
        )
        if self.cache is not None:
            weights: Any = self.backbone.weights
            role = weights.get("role", "teacher")
            which = [role, features_name(weights), f"{self.backbone.spec}{part}"]
            if source.max_pixels != MAX_PIXELS:
                which.append(f"images of {source.max_pixels} pixels")
            if network is not self.backbone:
                which += ["both"] if needs_both(tokens) else tokens
            key = cache_key(
                weights["sha256"],
                ", ".join(which),
                self.transform,
                content_of(source),
                self.precision,
            )
            found = (kept if part else cached)(self.cache, key, compute)
        else:
            found = compute()
        for name, reason in found.skipped:
            console.print(f"skipped {name}: {reason}", markup=False, soft_wrap=True)
        return found

    def share(self, split: str, source: data.Source, rows: int | None = None) -> list[Features]:
        """This process's share of the features of a source, every process its own.

        In pieces of about `rows` images, which lie in the cache's folder; None is one piece.

        Raises:
            RunFailed: as `extract` on any of the processes.
        """
        rank, processes = distributed.rank(), distributed.world_size()
        if processes == 1 and rows is None:
            return [self.features_of(split, source)]
        places = share(len(source), self.batch_size, rank, processes)
        pieces = cut(places, self.batch_size, rows)
        shown = f"{self.transform.describe()}, {self.precision}"

        def extract_pieces() -> list[Features]:
            return [
                self.features_of(split, source, piece, f", {piece[0]} to {piece[-1]}")
                for piece in pieces
                if len(piece)
            ] or [replace(NO_FEATURES, data=source.name, transform=shown)]

        return distributed.together(extract_pieces)

    def progress(self, verb: str) -> Any:
        return counter(stderr_console(), verb)

    def sign(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the weights they speak of."""
        weights: dict[str, Any] = self.backbone.weights  # type: ignore[assignment]
        return results.signed(rows, weights["sha256"], features_name(weights))


def check_views(
    backbone: nn.Module, transform: EvalTransform, device: torch.device, batch: int, resized: bool
) -> None:
    """Raises UsageError where the backbone does not take what `transform` shows it.

    Args:
        resized: at a size that is not its own; its own was tried when it was trained.
    """
    channels, size = cast(int, backbone.in_chans), transform.size
    for name, given in (("--mean", transform.mean), ("--std", transform.std)):
        if len(given) != channels:
            raise UsageError(f"{name} takes one value a channel: {channels}, got {len(given)}")
    needed = 4 * batch * channels * max(size, transform.resize) ** 2
    mend = "lower --batch-size, --size or --resize"
    feasibility.check_memory("the images of a batch", needed, device, mend)
    if resized:
        trial = feasibility.Trial("--size", size, 1, training=False)
        arch = cast(Any, backbone).spec.arch
        own = cast(int, backbone.input_size)
        feasibility.check_sizes(backbone, arch, channels, [trial], own=(own,))


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
    return train, one("val") if not path.exists() or (path / "val").is_dir() else train


def save_features(subject: Subject, path: Path) -> Path:
    """Features and labels of both splits in one safetensors file."""
    tensors = {}
    for split, found in zip(("train", "val"), subject.features(), strict=True):
        for name in ("features", "labels", "indices"):
            value = getattr(found, name)
            if value is not None:
                tensors[f"{split}_{name}"] = value.contiguous()
    weights: dict[str, Any] = subject.backbone.weights  # type: ignore[assignment]
    facts = {
        "checkpoint": weights["sha256"],
        "features": features_name(weights).encode("utf-8", "backslashreplace").decode(),
        "transform": subject.transform.describe(),
    }
    with written_beside(path) as beside:
        safetensors.torch.save_file(tensors, beside, metadata=facts)
    return path
