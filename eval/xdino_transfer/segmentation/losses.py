"""The loss of published segmentation: what is divided by what.

Logits are resized to the labels, and the sum of the cross-entropies over labelled pixels is divided
by the number of all pixels, those without a label included (mmsegmentation 0.11).

Letters: B images, K classes, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from xdino_transfer.resizing import bilinear

VOID = 255  # the label of pixels that have none


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, K, h, w] and labels [B, H, W] (VOID where there is none) -> one number."""
    logits = bilinear(logits, labels.shape[1:])
    return F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="sum") / max(
        labels.numel(), 1
    )


@torch.no_grad()
def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of all pixels [B, H, W] that are right, in per cent; VOID is never right."""
    found = bilinear(logits, labels.shape[1:]).argmax(1)
    return (found == labels).float().mean() * 100
