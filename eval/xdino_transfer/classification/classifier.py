"""A backbone with a linear head: images [B, C, H, W] -> logits [B, K]. `files` reads and writes them.

Letters: B images, C channels, H x W pixels, D width, K classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import timm
import torch
from torch import Tensor, nn

from xdino import dino_vit
from xdino.backbone import Origin
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError


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
        self.origin = Origin()
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
