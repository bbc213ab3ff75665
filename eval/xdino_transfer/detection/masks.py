"""Masks of regions: what they are to be, and back into pictures.

Golden vector `detector_roi`: `mask_targets` (`mask_targets_packed`), `pasted` (`test/*/masks_packed`).

Letters: R regions, M objects, S cells a side, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

from xdino_transfer.detection.boxes import Size, clipped

AT_ONCE = 1 << 24  # pixels of masks that are pasted together
_OUTSIDE = 4.0  # in halves of a mask's side from its middle: where nothing has a value any more


def mask_targets(
    masks: Tensor,
    objects: Tensor,
    boxes: Tensor,
    side: int,
    threshold: float | None = 0.5,
    aligned: bool = True,
) -> Tensor:
    """Each region's part of its object's mask, float32 [R, side, side].

    Args:
        masks: [M, H, W]. objects: int64 [R], which mask. boxes: [R, 4] in the masks' pixels.
        threshold: 0 and 1 by it; None = the shares themselves, as in torchvision.
    """
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    if threshold is not None:
        boxes = clipped(boxes, (masks.shape[1], masks.shape[2]))
    asked, numbers = objects.unique(return_inverse=True)  # a mask once, however many regions ask
    rois = torch.cat([numbers[:, None].to(boxes.dtype), boxes], dim=1)
    own = masks[asked][:, None].to(boxes.dtype)
    found = ops.roi_align(own, rois, side, 1.0, 0, aligned)[:, 0]
    return found if threshold is None else (found >= threshold).to(boxes.dtype)


def pasted(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> Tensor:
    """Probabilities [R, S, S] in boxes [R, 4] -> bool [R, H, W], sampled between the cells' centres.

    What lies around a box is false.
    """
    H, W = size
    out = torch.zeros(len(masks), H, W, dtype=torch.bool, device=masks.device)
    together = max(1, AT_ONCE // max(H * W, 1))
    for start in range(0, len(masks), together):
        rows = slice(start, start + together)
        out[rows] = _pasted(masks[rows], boxes[rows], size) >= threshold
    return out


def _pasted(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    left, top, right, bottom = boxes.to(masks.dtype).split(1, dim=1)  # [R, 1] each
    y, x = _along(top, bottom, size[0]), _along(left, right, size[1])  # [R, H], [R, W]
    shape = (len(masks), *size)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _along(low: Tensor, high: Tensor, side: int) -> Tensor:
    """Where pixels lie between two edges [R, 1]: -1 to 1 inside, [R, side].

    Where the edges are one, pixels up to one beyond it lie in the middle, as published.
    """
    pixel = torch.arange(side, device=low.device, dtype=low.dtype)
    found = (pixel + 0.5 - low) / (high - low) * 2 - 1
    near = (pixel >= low.floor() - 1) & (pixel < high.ceil() + 1)
    flat = torch.where(near, 0.0, _OUTSIDE).to(found.dtype)
    return torch.where(found.isfinite(), found, flat)
