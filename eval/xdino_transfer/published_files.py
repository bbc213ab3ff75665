"""Published detection and segmentation files, read strictly: `meta`, `state_dict`, an optimiser.

The published code loads without strictness, and trains from scratch with a warning where the names do
not fit. Here every name and shape must, and nothing of a file runs.

Letters: D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdino import weight_names
from xdino.backbone import statistics
from xdino.backbones import BackboneSpec
from xdino.checkpoint.plain import load_plain, reading
from xdino.checkpoint.weights import is_network, refuse_labelled
from xdino.errors import RunFailed, UsageError, asked
from xdino.xcit import XCiT
from xdino_transfer.pyramid import Pyramid

BACKBONE = "backbone."
PUBLISHED_CLASS_ATTENTION = 2  # layers of all named XCiTs, which a pyramid leaves out


@dataclass(frozen=True)
class DenseFile:
    """Tensors of a whole network by its own names, and the classes that the file names, if it does."""

    path: Path
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] | None


def read(path: str | Path) -> DenseFile:
    """
    Raises:
        UsageError: nothing there, or the file of something else.
        RunFailed: it is damaged, or holds values that are not finite.
    """
    with asked(f"cannot read {path}"):
        path = Path(path).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
    with reading(path):
        tree = load_plain(path)
        refuse_labelled(path, tree)
        size = path.stat().st_size
        inner: Any = tree.get("state_dict", tree) if isinstance(tree, dict) else None
        if not is_network(inner, size):
            raise UsageError(f"{path} is no detection or segmentation file: it has no state_dict")
        tensors = {name.removeprefix("module."): value for name, value in inner.items()}
        if not any(name.startswith(BACKBONE) for name in tensors):
            raise UsageError(
                f"{path} holds a backbone alone, and no head to detect or segment with"
            )
        spoilt = [name for name, value in tensors.items() if not value.isfinite().all()]
        if spoilt:
            raise RunFailed(f"{path} holds values that are not finite (first {spoilt[0]})")
    meta = tree.get("meta") if isinstance(tree, dict) else None
    return DenseFile(path, tensors, _classes(meta))


def _classes(meta: Any) -> tuple[str, ...] | None:
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def pyramid_of(tensors: Mapping[str, Tensor], path: Path) -> Pyramid:
    """A new pyramid of the shape that `backbone.*` has.

    Raises:
        UsageError: those are no XCiT's.
    """
    return Pyramid(XCiT(**_shape(tensors, path)))


def spec_of(file: DenseFile, arch: str | None = None) -> BackboneSpec:
    """What a file's backbone is called, and the statistics that all published files are shown with.

    Raises:
        UsageError: it is not `arch`; its backbone is no XCiT.
    """
    shape = _shape(file.tensors, file.path)
    channels = shape.pop("in_chans")
    mean, std = statistics(channels)
    shape["class_attention_layers"] = PUBLISHED_CLASS_ATTENTION
    name = weight_names.xcit_name(shape)
    if arch is not None and arch != name:
        told = name or weight_names.described(shape)
        raise UsageError(f"{file.path} is not on {arch}: its shapes are those of {told}")
    nearest = name or weight_names.nearest_xcit(shape)
    return BackboneSpec(nearest, channels, {} if name else shape, mean=mean, std=std)


def _shape(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    own = {
        name.removeprefix(BACKBONE): value
        for name, value in tensors.items()
        if name.startswith(BACKBONE)
    }
    positions = own.get("pos_embeder.token_projection.weight")
    if positions is not None:
        # Class attention, which a pyramid has not, tells the width of a classification file.
        own |= {
            "cls_token": torch.empty(1, 1, len(positions)),
            "cls_attn_blocks.0.norm1.weight": torch.empty(1),
        }
    shape = weight_names.xcit_shape(own)
    if shape is None or shape["patch_size"] not in (8, 16):
        raise UsageError(f"{path} holds no XCiT of patch 8 or 16 as its backbone")
    return shape


def sizes(tensors: Mapping[str, Tensor], path: Path, *names: str) -> list[torch.Size]:
    """The shapes of tensors that a head of this kind has.

    Raises:
        UsageError: one is missing.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UsageError(f"{path} is of another kind: it has no {missing[0]}")
    return [tensors[name].shape for name in names]


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Strictly. Raises UsageError where a name or a shape differs, with the first of them."""
    problems = weight_names.differences(tensors, model)
    if problems:
        raise UsageError(f"{path} does not fit: tensors {problems}")
    model.load_state_dict(dict(tensors), strict=True)
    model.eval()
