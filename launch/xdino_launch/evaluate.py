"""What the evaluation commands share: a backbone, two labelled splits, a transform."""

import dataclasses
from collections.abc import Sequence
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
from xdino_eval import results
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


def export_backbone(
    weights: str, path: Path, names: str, arch: str | None = None, role: str = "teacher"
) -> Path:
    """One backbone as safetensors, with its `BackboneSpec` in the header."""
    backbone = checkpoint.load_backbone(weights, arch, role)
    spec: Any = backbone.spec
    facts: dict[str, Any] = dict(backbone.weights)  # type: ignore[arg-type]
    facts.pop("path")
    facts["exported_from"] = facts.pop("sha256")
    try:
        if names == "timm" and spec.arch.startswith("xcit_"):
            tensors = checkpoint.to_timm_names(backbone.state_dict())
            with checkpoint.written_beside(path) as beside:
                header = {"architecture": f"{spec.arch}_{spec.input_size}"}
                safetensors.torch.save_file(
                    {k: v.contiguous() for k, v in tensors.items()}, beside, metadata=header
                )
        else:
            checkpoint.save_backbone(path, backbone, dataclasses.replace(spec), **facts)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error}") from None
    return path
