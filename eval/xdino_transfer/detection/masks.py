"""Masks of regions: what they are to be, and back into pictures.

Golden vector `detector_roi`: `mask_targets` (`mask_targets_packed`), `pasted` (`test/*/masks_packed`).

Letters: R regions, M objects, S cells a side, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

from xdino_transfer.detection.boxes import Size, clipped

_AT_ONCE = 1 << 24  # pixels of masks that are pasted together


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
    numbers = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat([numbers[:, None], boxes], dim=1)
    own = masks[objects][:, None].to(boxes.dtype)
    found = ops.roi_align(own, rois, side, 1.0, 0, aligned)[:, 0]
    return found if threshold is None else (found >= threshold).to(boxes.dtype)


def pasted(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> Tensor:
    """Probabilities [R, S, S] in boxes [R, 4] -> bool [R, H, W], sampled between the cells' centres.

    What lies around a box is false. A box without an area gives an empty mask.
    """
    H, W = size
    out = torch.zeros(len(masks), H, W, dtype=torch.bool, device=masks.device)
    together = max(1, _AT_ONCE // max(H * W, 1))
    for start in range(0, len(masks), together):
        rows = slice(start, start + together)
        out[rows] = _pasted(masks[rows], boxes[rows], size) >= threshold
    return out


def _pasted(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    H, W = size
    left, top, right, bottom = boxes.to(masks.dtype).split(1, dim=1)  # [R, 1] each
    y = torch.arange(H, device=masks.device, dtype=masks.dtype) + 0.5
    x = torch.arange(W, device=masks.device, dtype=masks.dtype) + 0.5
    y, x = (y - top) / (bottom - top) * 2 - 1, (x - left) / (right - left) * 2 - 1  # [R, H], [R, W]
    outside = 4.0  # beyond the last cell, whose half has no value any more
    y, x = (torch.nan_to_num(each, outside, outside, outside) for each in (y, x))
    R = len(masks)
    grid = torch.stack([x[:, None].expand(R, H, W), y[:, :, None].expand(R, H, W)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
