"""What the evaluation commands share: a backbone, two labelled splits, a transform."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from xdino import checkpoint, data
from xdino.errors import RunFailed, UsageError
from xdino.plan import resolve_device
from xdino_eval import attention, results
from xdino_eval.features import Features, cache_key, cached, extract
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform
from xdino_launch.console import counter, stderr_console


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
    ) -> "Subject":
        """Load and open everything, or say in a sentence what is wrong.

        Raises:
            UsageError, RunFailed: as `load_backbone` and `open_splits`.
        """
        backbone = checkpoint.load_backbone(weights, arch, role)
        train, val = open_splits(data, channels=backbone.in_chans)  # type: ignore[arg-type]
        try:
            transform = EvalTransform.of(backbone, size, resize, mean, std)  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(str(error)) from None
        where = resolve_device(device)
        kept = Path(cache) if cache else None
        return cls(backbone, train, val, transform, where, batch_size, workers, precision, kept)

    def features(self) -> tuple[Features, Features]:
        """Features of both splits; unreadable images are named on standard error."""
        console = stderr_console()
        both = []
        for split, source in (("train", self.train), ("val", self.val)):
            compute = partial(
                extract,
                self.backbone,
                source,
                self.transform,
                self.batch_size,
                self.device,
                self.workers,
                self.precision,
                progress=counter(console, f"features of {split}"),
            )
            weights: Any = getattr(self.backbone, "weights", None)  # None: a choice of tokens
            if self.cache is not None and weights is not None:
                which = f"{features_name(weights)}, {self.backbone.spec}"
                key = cache_key(
                    weights["sha256"],
                    which,
                    self.transform,
                    data.fingerprint(source),
                    self.precision,
                )
                found = cached(self.cache, key, compute)
            else:
                found = compute()
            for name, reason in found.skipped:
                console.print(f"skipped {name}: {reason}", markup=False)
            both.append(found)
        return both[0], both[1]

    def progress(self, verb: str) -> Any:
        return counter(stderr_console(), verb)

    def sign(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the weights they speak of."""
        weights: dict[str, Any] = self.backbone.weights  # type: ignore[assignment]
        return results.signed(rows, weights["sha256"], features_name(weights))


open_splits = data.open_splits


def features_name(weights: dict[str, Any]) -> str:
    """ "teacher, iteration 1234", or the file's name where it says nothing."""
    if "iteration" in weights:
        return f"{weights.get('role', 'teacher')}, iteration {weights['iteration']}"
    return Path(weights["path"]).name


def draw_attention(
    weights: str,
    images: Sequence[str],
    out: str | Path,
    arch: str | None = None,
    size: int | None = None,
    mass: float = 0.6,
) -> Iterator[Path]:
    """Class-attention pictures of image files; yields each file written.

    Raises:
        UsageError: no class attention in this backbone, or an image that cannot be read.
    """
    backbone = checkpoint.load_backbone(weights, arch)
    for name in images:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"there is no image file {path}")
        try:
            image = data.decode(path.read_bytes(), channels=backbone.in_chans)  # type: ignore[arg-type]
        except (data.UnreadableImage, OSError) as error:
            raise UsageError(f"{path} cannot be read as an image: {error}") from None
        maps = attention.class_attention_maps(backbone, image, size)
        yield from attention.draw(maps, image, out, path.stem, mass)


def save_features(subject: Subject, path: Path) -> Path:
    """Features and labels of both splits in one safetensors file."""
    tensors = {}
    for split, found in zip(("train", "val"), subject.features(), strict=True):
        for name in ("features", "labels", "indices"):
            value = getattr(found, name)
            if value is not None:
                tensors[f"{split}_{name}"] = value.contiguous()
    weights: dict[str, Any] = subject.backbone.weights  # type: ignore[assignment]
    facts = {"checkpoint": weights["sha256"], "transform": subject.transform.describe()}
    try:
        with checkpoint.written_beside(path) as beside:
            safetensors.torch.save_file(tensors, beside, metadata=facts)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error}") from None
    return path
