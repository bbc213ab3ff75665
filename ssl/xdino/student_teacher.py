"""Multi-crop networks and the teacher that follows the student (DINO, section 3.1, algorithm 1).

Letters: V views, B images, K prototypes, D width, d width of the bottleneck.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdino.backbone import Backbone
from xdino.head import DINOHead


class Embedded(NamedTuple):
    """bottleneck: of the head, `[V, B, d]`. tokens: what the backbone gave to it, `[V, B, D]`."""

    bottleneck: Tensor
    tokens: Tensor


class MultiCropNetwork(nn.Module):
    """A backbone run once per crop resolution, and a head run once on all class tokens.

    Resolutions stay apart because BatchNorm takes its statistics per forward pass: joining them
    would be another method.
    """

    backbone: Backbone
    head: DINOHead

    def __init__(self, backbone: Backbone, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, groups: Sequence[Tensor], embed: bool = False) -> Tensor | Embedded:
        """Crops grouped by resolution, each `[V_r, B, C, h, w]` -> logits `[V, B, K]`.

        `embed`: stop before the last layer, at the head's bottleneck and its class tokens.
        """
        B = groups[0].shape[1]
        features = torch.cat([self.backbone(crops.flatten(0, 1)) for crops in groups])  # [V * B, D]
        if embed:
            bottleneck = self.head.embed(features)
            return Embedded(*(x.view(-1, B, x.shape[-1]) for x in (bottleneck, features)))
        out: Tensor = self.head(features)
        return out.view(-1, B, out.shape[-1])


def make_teacher(student: MultiCropNetwork, backbone: Backbone) -> MultiCropNetwork:
    """A copy of the student around `backbone` (the same network without drop path), never trained.

    It stays in training mode: its BatchNorms normalise by their own batch, and their running
    statistics come from the teacher's own global crops, as published.
    """
    teacher = MultiCropNetwork(backbone, copy.deepcopy(student.head))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return teacher.train()


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, momentum: float, still: Tensor | None = None
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters only.

    `still`: a flag on the device; where it is set, the teacher stays as it is.
    """
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    if still is None:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
        return
    weight = (~still).double() * (1 - momentum)
    weights = {p.dtype: weight.to(p.dtype) for p in ours}
    if not ours[0].is_cuda or len(weights) > 1:
        torch._foreach_lerp_(ours, theirs, [weights[p.dtype] for p in ours])
        return
    # A list of factors is a kernel a tensor there, one factor a few for all of them.
    way = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(way, weights[ours[0].dtype])
    torch._foreach_add_(ours, way)
