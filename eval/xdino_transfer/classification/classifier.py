"""A backbone with a linear head: images [B, C, H, W] -> logits [B, K]; read from and written to files.

Files carry the published names: the backbone's own, and `head.weight`, `head.bias` beside them (of
timm networks what timm calls their classifier), so that published XCiT classification files and
timm's are read with their heads, and timm reads ours.

Letters: B images, C channels, H x W pixels, D width, K classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from xdino import checkpoint, dino_vit
from xdino.backbones import BackboneSpec
from xdino.checkpoint import WeightsFile
from xdino.errors import RunFailed, UsageError, asked

MODEL_FILE = "model.safetensors"  # of a run directory: the classifier
TASK = "classification"  # among the facts of our own files


class Classifier(nn.Module):
    """Logits from a backbone's feature.

    Args:
        backbone: [B, C, H, W] -> [B, D], with `embed_dim`.
        spec: what it takes to build the backbone again, and the images that it expects.
        classes: their names in order, or how many there are.
        head_scale: the head's initial weights are a truncated normal of 0.02 times this. A small
            factor is how DINO's author fine-tunes; 1 is published for training from scratch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        spec: BackboneSpec,
        classes: Sequence[str] | int,
        head_scale: float = 1.0,
    ) -> None:
        super().__init__()
        names = None if isinstance(classes, int) else tuple(classes)
        count = classes if isinstance(classes, int) else len(classes)
        if count < 2:
            raise UsageError(f"a classifier needs at least two classes, got {count}")
        self.spec, self.classes = spec, names
        self.backbone = backbone
        self.head = nn.Linear(cast(int, backbone.embed_dim), count)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(head_scale)

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, but for what is frozen: its drop path and running statistics rest."""
        super().train(mode)
        for module in self.modules():
            parameters = [*module.parameters()]
            if parameters and not any(p.requires_grad for p in parameters):
                for inner in module.modules():
                    inner.training = False
        return self

    def published_state(self) -> dict[str, Tensor]:
        """All tensors under the names of published files."""
        head = head_name(self.spec.arch)
        state = self.backbone.state_dict()
        return state | {f"{head}.{name}": value for name, value in self.head.state_dict().items()}


def head_name(arch: str) -> str:
    """What files call the linear layer on top of a network: "head" for XCiT, timm's word for others.

    Raises:
        UsageError: timm's network ends in more than one linear layer.
    """
    if arch.startswith("xcit_") or dino_vit.is_name(arch):
        return "head"
    config = timm.models.get_pretrained_cfg(arch)
    name = "head" if config is None else config.classifier
    if not isinstance(name, str):
        raise UsageError(f"{arch} has not one linear head but {name}: it cannot be scored here")
    return name


def at_size(classifier: Classifier, side: int, resize: int | None = None) -> None:
    """From now on `classifier` is for images of `side` pixels (fine-tuning at 384, section 5).

    Raises:
        UsageError: its network is made for one size.
    """
    spec = dataclasses.replace(classifier.spec, input_size=side, resize=resize or side)
    with torch.device("meta"):
        other = spec.build().state_dict()
    own = classifier.backbone.state_dict()
    if any(value.shape != own[name].shape for name, value in other.items()):
        raise UsageError(
            f"{spec.arch} has tables for images of {classifier.spec.input_size} pixels, and cannot "
            f"go on at {side}"
        )
    classifier.spec = spec


def save_classifier(path: Path, classifier: Classifier, **facts: Any) -> None:
    """Write a classifier to safetensors: published names, spec and class names in the header."""
    names = None if classifier.classes is None else list(classifier.classes)
    told = {"task": TASK, "classes": names, **facts}
    checkpoint.save_tensors(path, classifier.published_state(), classifier.spec, told)


def load_classifier(path: str | Path, arch: str | None = None) -> Classifier:
    """The classifier in a run directory, a file of ours, a published XCiT file, or timm's.

    Returns:
        The network in evaluation mode on the CPU, without gradients.

    Raises:
        UsageError: nothing there, no known architecture, no head.
        RunFailed: a damaged file.
    """
    file = checkpoint.read_weights(_classifier_in(path))
    spec = checkpoint.spec_of(file, arch)
    bare, head = _apart(file, spec)
    if head is None:
        raise UsageError(
            f"{file.path} holds a backbone without a head, which knows no classes: fine-tune it first"
        )
    backbone = checkpoint.build_for(bare, spec)
    checkpoint.load_into(backbone, bare, spec.arch)
    classifier = Classifier(backbone, spec, _class_names(file, len(head[0])))
    _set_head(classifier, head, file)
    return classifier.eval().requires_grad_(False)


def start_from(
    path: str | Path,
    classes: Sequence[str],
    arch: str | None = None,
    drop_path: float = 0.0,
    head_scale: float = 1.0,
) -> tuple[Classifier, list[str]]:
    """A classifier to be fine-tuned from any weights that `load_backbone` or `load_classifier` reads.

    A head for as many classes is kept (224 -> 384 pixels goes on so); any other is dropped.

    Returns:
        The classifier in training mode, and sentences on what was dropped.

    Raises:
        UsageError, RunFailed: as `load_classifier`, but for files without a head.
    """
    file = checkpoint.read_weights(_classifier_in(path))
    spec = checkpoint.spec_of(file, arch)
    bare, head = _apart(file, spec)
    checkpoint.build_for(bare, spec)  # which says in a sentence what does not fit
    backbone = spec.build(drop_path=drop_path)
    checkpoint.load_into(backbone, bare, spec.arch)
    classifier = Classifier(backbone, spec, classes, head_scale)
    notices = []
    if head is not None:
        theirs = _class_names(file, len(head[0]))
        if len(head[0]) != len(classes):
            notices.append(
                f"the head of {file.path} knows {len(head[0]):,} classes and the data has "
                f"{len(classes):,}: a new one is trained"
            )
        elif not isinstance(theirs, int) and theirs != tuple(classes):
            notices.append(f"the head of {file.path} is for other classes: a new one is trained")
        else:
            _set_head(classifier, head, file)
    return classifier.train(), notices


def _classifier_in(path: str | Path) -> str | Path:
    """Of a run directory with a classifier its file; any other path as it is."""
    with asked(f"cannot read {path}"):
        file = Path(path).expanduser() / MODEL_FILE
        return file if file.is_file() else path


def _apart(
    file: WeightsFile, spec: BackboneSpec
) -> tuple[WeightsFile, tuple[Tensor, Tensor | None] | None]:
    """The file without its head, and the head's weight [K, D] and bias [K], None where it has none."""
    name = head_name(spec.arch)
    names = (f"{name}.weight", f"{name}.bias")
    tensors = {key: value for key, value in file.tensors.items() if key not in names}
    weight, bias = (file.tensors.get(key) for key in names)
    if weight is None or weight.ndim < 2 or weight.shape[2:].numel() != 1:
        return dataclasses.replace(file, tensors=tensors), None
    return dataclasses.replace(file, tensors=tensors), (weight.flatten(1), bias)


def _class_names(file: WeightsFile, count: int) -> tuple[str, ...] | int:
    """The names of a file's classes, their number where it does not say them."""
    names = file.facts.get("classes") if file.spec is not None else None
    if names is None:
        return count
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunFailed(f"{file.path} is damaged: its classes are no names")
    if len(names) != count:
        raise RunFailed(
            f"{file.path} is damaged: it names {len(names):,} classes and has a head for {count:,}"
        )
    return tuple(names)


def _set_head(
    classifier: Classifier, head: tuple[Tensor, Tensor | None], file: WeightsFile
) -> None:
    weight, bias = head
    bias = torch.zeros(len(weight)) if bias is None else bias
    own = classifier.head
    if weight.shape != own.weight.shape or bias.shape != own.bias.shape:
        raise UsageError(
            f"the head of {file.path} takes features of {weight.shape[1]:,} numbers and "
            f"{classifier.spec.arch} gives {own.in_features:,}: it cannot be scored here"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise RunFailed(f"{file.path} holds values that are not finite, in its head")
    own.load_state_dict({"weight": weight, "bias": bias})
