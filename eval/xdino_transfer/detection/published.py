"""Names and layouts of published detection files, to ours (torchvision's) and back.

Published heads have background last, and no differences and no mask for it; ours have it first, with
rows of zeros, so that our tensors load into torchvision's Mask R-CNN.

Letters: K classes.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from xdino_transfer import fpn, published_files
from xdino_transfer.detection.detector import Detector, Shape, build
from xdino_transfer.published_files import DenseFile

_NAMES = {
    "rpn_head.rpn_conv.": "rpn.head.conv.0.0.",
    "rpn_head.rpn_cls.": "rpn.head.cls_logits.",
    "rpn_head.rpn_reg.": "rpn.head.bbox_pred.",
    "roi_head.bbox_head.shared_fcs.0.": "roi.box_head.fc6.",
    "roi_head.bbox_head.shared_fcs.1.": "roi.box_head.fc7.",
    "roi_head.bbox_head.fc_cls.": "roi.box_predictor.cls_score.",
    "roi_head.bbox_head.fc_reg.": "roi.box_predictor.bbox_pred.",
    "roi_head.mask_head.upsample.": "roi.mask_predictor.conv5_mask.",
    "roi_head.mask_head.conv_logits.": "roi.mask_predictor.mask_fcn_logits.",
}
_MASK_CONV = re.compile(r"roi_head\.mask_head\.convs\.(\d+)\.conv\.")
_OWN_MASK_CONV = re.compile(r"roi\.mask_head\.(\d+)\.0\.")
# Rows that only we have, of background: their number.
_BACKGROUND = {"roi.box_predictor.bbox_pred.": 4, "roi.mask_predictor.mask_fcn_logits.": 1}
_ROLLED = "roi.box_predictor.cls_score."


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's names of XCiT's files -> those of `Detector`; backbone names stay."""
    found = {}
    for name, value in fpn.from_published(tensors).items():
        own = _MASK_CONV.sub(r"roi.mask_head.\1.0.", name)
        for theirs, ours in _NAMES.items():
            if own.startswith(theirs):
                own = ours + own.removeprefix(theirs)
        if own.startswith(_ROLLED):
            value = value.roll(1, 0)
        for start, rows in _BACKGROUND.items():
            if own.startswith(start):
                value = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
        found[own] = value
    return found


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back; what background alone has is left out."""
    found = {}
    for name, value in fpn.to_published(tensors).items():
        if name.startswith(_ROLLED):
            value = value.roll(-1, 0)
        for start, rows in _BACKGROUND.items():
            if name.startswith(start):
                value = value[rows:]
        theirs = _OWN_MASK_CONV.sub(r"roi_head.mask_head.convs.\1.conv.", name)
        for other, ours in _NAMES.items():
            if theirs.startswith(ours):
                theirs = other + theirs.removeprefix(ours)
        found[theirs] = value
    return found


def load_detector(path: str | Path) -> tuple[Detector, tuple[str, ...] | None]:
    """The detector in a published Mask R-CNN file, in evaluation mode, and its classes' names.

    Raises:
        UsageError, RunFailed: as `published_files.read`; names or shapes that are not all there.
    """
    return detector_in(published_files.read(path))


def detector_in(file: DenseFile) -> tuple[Detector, tuple[str, ...] | None]:
    """The same of a file that was read."""
    fc, classes, mask, lateral = published_files.sizes(
        file.tensors,
        file.path,
        "roi_head.bbox_head.shared_fcs.0.weight",
        "roi_head.bbox_head.fc_cls.weight",
        "roi_head.mask_head.upsample.weight",
        "neck.lateral_convs.0.conv.weight",
    )
    pyramid = published_files.pyramid_of(file.tensors, file.path)
    model = build(pyramid, classes[0] - 1, Shape(lateral[0], fc[0], mask[0]))
    published_files.load_into(model, from_published(file.tensors), file.path)
    return model, file.classes
