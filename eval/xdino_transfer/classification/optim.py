"""Optimisers of supervised training and their parameter groups.

Weight decay leaves out one-dimensional parameters, biases and what the network names (`cls_token`,
tables of positions); XCA's `temperature` is decayed, as published. Each group carries `lr_scale`: 1,
or less for layers further from the head (layer-wise decay, BEiT, arXiv 2106.08254).
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from torch.optim.optimizer import Optimizer

from xdino.errors import UsageError, nearest
from xdino_transfer.classification.classifier import Classifier

# Layers of an XCiT, from the images to the class token, in timm's notation.
_XCIT = {
    "stem": r"^cls_token|pos_embeder|patch_embed",
    "blocks": r"^blocks\.(\d+)",
    "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
}
_UNDECAYED = ("cls_token", "dist_token", "pos_embed", "reg_token")
NAMES = ("adamw", "sgd")


def layers(classifier: Classifier) -> dict[str, int]:
    """The layer of each parameter: 0 for the stem, then the blocks, the head last."""
    found = _layers_of("backbone.", classifier.backbone, _XCIT)
    for name, module in classifier.backbone.named_modules():
        if hasattr(module, "group_matcher"):  # timm's, which may lie inside a wrapper
            inner = f"backbone.{name}." if name else "backbone."
            found = _layers_of(inner, module, module.group_matcher(coarse=False))
            break
    last = max(found.values()) + 1
    return {name: found.get(name, last) for name, _ in classifier.named_parameters()}


def _layers_of(prefix: str, network: nn.Module, matcher: Mapping[str, Any]) -> dict[str, int]:
    grouped = group_parameters(network, matcher, reverse=True)
    return {f"{prefix}{name}": layer for name, layer in grouped.items()}


def freeze(classifier: Classifier, blocks: int) -> None:
    """Train neither the stem nor the first `blocks` blocks; 0 freezes nothing.

    With as many blocks as there are, the head alone is trained.

    Raises:
        UsageError: there are fewer blocks.
    """
    number = layers(classifier)
    most = max(number.values()) - 1
    if not 0 <= blocks <= most:
        raise UsageError(
            f"{classifier.spec.arch} has {most} blocks to freeze, class attention included, "
            f"got {blocks}"
        )
    for name, parameter in classifier.named_parameters():
        if blocks and number[name] <= blocks:
            parameter.requires_grad_(False)
    classifier.train(classifier.training)


def parameter_groups(
    classifier: Classifier,
    weight_decay: float,
    layer_decay: float = 1.0,
    backbone_factor: float = 1.0,
) -> list[dict[str, object]]:
    """Groups of what is trained, one for each `lr_scale` and weight decay.

    Args:
        layer_decay: the learning rate shrinks by this factor a layer, from the head down.
        backbone_factor: of the learning rate of everything but the head.
    """
    number = layers(classifier)
    top = max(number.values())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        plain = parameter.ndim == 1 or leaf == "bias" or leaf in _UNDECAYED
        scale = layer_decay ** (top - number[name])
        scale *= 1.0 if name.startswith("head.") else backbone_factor
        groups.setdefault((scale, 0.0 if plain else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def build(name: str, groups: list[dict[str, object]]) -> Optimizer:
    """AdamW or SGD (Nesterov momentum 0.9, timm's "sgd"); the rate comes with each step.

    Raises:
        UsageError: another name.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    raise UsageError(f'no optimiser is called "{name}": {nearest(name, NAMES)}')
