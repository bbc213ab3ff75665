"""Multi-crop augmentation: crops as a table; pixels to views."""

from xdino.augment.multi_crop import (
    MultiCrop,
    View,
    at_sizes,
    boxes,
    crop,
    draw,
    draw_batch,
    multi_crop,
)

__all__ = ["MultiCrop", "View", "at_sizes", "boxes", "crop", "draw", "draw_batch", "multi_crop"]
