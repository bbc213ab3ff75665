"""A network that gives every pixel a class: backbone, neck, head, and how pictures are shown to it.

In a test logits are resized twice, to the picture as the network saw it and then to the original
one (mmsegmentation 0.11); several views of one picture (scales, mirrored) are averaged as
probabilities.

Golden vectors `semantic_fpn`, `upernet`: `Segmenter.decoded` (logits of levels),
`Segmenter.losses_of` (training), `probabilities` (test), `averaged` (views).

Letters: B images, C channels, K classes, (h, w) grid of the first level, H x W pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xdino.backbone import Backbone
from xdino.errors import UsageError, nearest
from xdino.xcit import XCiT
from xdino_transfer import fpn
from xdino_transfer.pyramid import STRIDES, Pyramid
from xdino_transfer.resizing import bilinear
from xdino_transfer.segmentation import heads
from xdino_transfer.segmentation.losses import pixel_accuracy, pixel_loss

AUXILIARY_WEIGHT = 0.4
HEADS = ("semantic_fpn", "upernet", "linear_map")


class LastTokens(nn.Module):
    """The patch tokens of any backbone that has them, as the only level; frozen, in evaluation mode."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        backbone.require_patches()
        self.network = backbone.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LastTokens":
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        # An XCiT rounds its grid up; others take whole patches, which logits are stretched back from.
        patch = self.network.require_patches()
        if not isinstance(self.network, XCiT):
            images = bilinear(images, [-(-side // patch) * patch for side in images.shape[2:]])
        return [self.network.forward_intermediates(images)[0][0]]


class Segmenter(nn.Module):
    """Images [B, C, H, W] -> logits [B, K, h, w] at the first level's size.

    Args:
        backbone: images to levels. neck: levels to levels, None for none.
        decode_head: levels to logits. auxiliary_head: the same, for a second loss in training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        decode_head: heads.Head,
        auxiliary_head: heads.Head | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head

    def features(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the heads read, of the levels of the backbone."""
        return levels if self.neck is None else self.neck(levels)

    def decoded(self, levels: Sequence[Tensor]) -> Tensor:
        return self.decode_head(self.features(levels))

    def forward(self, images: Tensor) -> Tensor:
        return self.decoded(self.backbone(images))

    def losses_of(self, levels: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The parts of the loss, by name, for labels [B, H, W]; `accuracy` beside them, in per cent."""
        features = self.features(levels)
        logits = self.decode_head(features)
        found = {"decode": pixel_loss(logits, labels), "accuracy": pixel_accuracy(logits, labels)}
        if self.auxiliary_head is not None:
            second = self.auxiliary_head(features)
            found["auxiliary"] = AUXILIARY_WEIGHT * pixel_loss(second, labels)
        return found

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.losses_of(self.backbone(images), labels)


def total(losses: dict[str, Tensor]) -> Tensor:
    """What is minimised: the sum of the losses."""
    return torch.stack([loss for name, loss in losses.items() if name != "accuracy"]).sum()


@dataclass(frozen=True)
class View:
    """How one picture was shown: its size (H, W) in the network, and whether it was mirrored."""

    size: tuple[int, int]
    flipped: bool = False


def probabilities(logits: Tensor, view: View, original: Sequence[int]) -> Tensor:
    """Logits [B, K, h, w] of a view -> probabilities [B, K, H, W] of the original picture."""
    shown = bilinear(bilinear(logits, view.size), original)
    found = shown.softmax(1)
    return found.flip(3) if view.flipped else found


def averaged(views: Iterable[Tensor]) -> Tensor:
    """The mean of several views' probabilities, each [B, K, H, W]."""
    mean, count = None, 0
    for found in views:
        mean, count = (found if mean is None else mean + found), count + 1
    assert mean is not None
    return mean / count


def build(
    backbone: Pyramid | Backbone, head: str, classes: int, channels: int | None = None
) -> Segmenter:
    """A new segmenter with one of the published heads, or the linear map on a frozen backbone.

    Args:
        head: "semantic_fpn" or "upernet" on a `Pyramid`, "linear_map" on a `Backbone`.
        channels: of the head; None = as published (128, 512).

    Raises:
        UsageError: no such head; a head on the wrong kind of backbone; fewer than two classes.
    """
    if head not in HEADS:
        raise UsageError(f'no head is called "{head}": {nearest(head, HEADS)}')
    if not 2 <= classes <= 255:
        raise UsageError(f"a segmenter tells 2 to 255 classes apart, got {classes}")
    if head == "linear_map":
        if isinstance(backbone, Pyramid):
            raise UsageError("a linear map reads a frozen backbone's tokens, not a pyramid")
        return Segmenter(LastTokens(backbone), None, heads.LinearMap(backbone.embed_dim, classes))
    if not isinstance(backbone, Pyramid):
        raise UsageError(f"{head} reads the four levels of an XCiT's pyramid")
    D = backbone.embed_dim
    widths = [D] * len(STRIDES)
    if head == "semantic_fpn":
        decode = heads.SemanticFPN(widths, classes, channels or 128)
        return Segmenter(backbone, fpn.FPN(widths, D), decode)
    width = channels or 512
    auxiliary = heads.Auxiliary(D, classes, max(width // 2, 1))
    return Segmenter(backbone, None, heads.UperNet(widths, classes, width), auxiliary)
