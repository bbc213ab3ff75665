"""mIoU of a segmenter, as published: whole pictures, one at a time, logits at their own size.

Several scales and mirrored pictures (the published `--aug-test`: 0.5 to 1.75, both) are averaged as
probabilities. A batch of one picture has nothing added, which would enter XCA's sums.

Letters: K classes, H x W pixels.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdino.backbone import evaluating
from xdino.data.decode import UnreadableImage
from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed, stopping, turns
from xdino.runtime.device import device_of
from xdino_eval.results import Row
from xdino_transfer.segmentation.confusion import ConfusionMatrix, Scores
from xdino_transfer.segmentation.maps import Maps
from xdino_transfer.segmentation.segmenter import Segmenter, View, averaged, probabilities
from xdino_transfer.segmentation.views import TestViews

PROTOCOL = "semantic segmentation"
AUGMENTED = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the published scales of several views


@torch.no_grad()
def segmented(
    model: Segmenter,
    image: np.ndarray,
    views: TestViews,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """A picture uint8 [H, W, C] -> probabilities [K, H, W]; the model must be in evaluation mode.

    Raises:
        RunFailed: they are not finite.
    """
    device = device_of(model)

    def shown(scale: float, flipped: bool) -> Tensor:
        pixels = views(image, scale, flipped).to(device)
        view = View((pixels.shape[2], pixels.shape[3]), flipped)
        return probabilities(model(pixels).float(), view, image.shape[:2])

    mirrored = (False, True) if flip else (False,)
    found = averaged(shown(scale, flipped) for scale in scales for flipped in mirrored)[0]
    if not found.isfinite().all():
        raise RunFailed("the probabilities are not finite: the weights are damaged")
    return found


def score(
    model: Segmenter,
    val: Maps,
    views: TestViews,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shared: bool = False,
    found: Callable[[int, np.ndarray], None] | None = None,
) -> tuple[Row, Scores]:
    """One row, not signed yet (mIoU, mAcc and aAcc in per cent), and the scores of each class.

    Args:
        shared: every process calls this, and looks at its part of the pictures; all have the row.
        found: is given the number of each picture and the class of its pixels, [H, W].

    Raises:
        UsageError: another number of classes; no labelled pixel; a mask that is none.
        RunFailed: no picture could be read, or a probability is not finite.
    """
    begun, matrix = time.perf_counter(), ConfusionMatrix(len(val.classes))

    def count(index: int, classes: np.ndarray, labels: np.ndarray | None) -> None:
        assert labels is not None
        matrix.add(classes, labels)
        if found is not None:
            found(index, classes)

    skipped = looked(model, val, views, count, scales, flip, progress, shared)
    if shared:
        matrix.gather()
    scores = matrix.scores()
    row = _row(val, views, scales, flip, scores, skipped)
    return replace(row, seconds=round(time.perf_counter() - begun, 3)), scores


def looked(
    model: Segmenter,
    maps: Maps,
    views: TestViews,
    seen: Callable[[int, np.ndarray, np.ndarray | None], None],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shared: bool = False,
) -> list[str]:
    """Look at all pictures, or this process's part of them; the names of all that cannot be read.

    seen: is given the number of a picture, the class of each pixel, and its labels where there are
    masks. Raises as `score`.
    """
    classes = model.decode_head.conv_seg.out_channels
    if classes != len(maps.classes):
        raise UsageError(
            f"the head tells {classes} classes apart and {maps.where} has {len(maps.classes)}"
        )
    skipped, step = list[tuple[str, str]](), distributed.world_size() if shared else 1

    def look() -> None:
        for index in range(distributed.rank() if shared else 0, len(maps), step):
            stopping.asked()
            try:
                image, labels = maps.read(index) if maps.masks else (maps.picture(index), None)
            except (UnreadableImage, OSError) as error:
                skipped.append((maps.describe(index), str(error)))
                continue
            found = segmented(model, image, views, scales, flip).argmax(0).cpu().numpy()
            seen(index, found, labels)
            if progress is not None:
                progress(index + 1, len(maps))

    with evaluating(model):
        turns.all_hear(look, shared)
    if shared:
        skipped = [each for some in distributed.gather(skipped) for each in some]
    if len(skipped) == len(maps):
        name, why = skipped[0]
        raise RunFailed(f"no picture of {maps.where} could be read: {name} and others ({why})")
    return [name for name, _ in skipped]


def _row(
    val: Maps,
    views: TestViews,
    scales: Sequence[float],
    flip: bool,
    scores: Scores,
    skipped: Sequence[str],
) -> Row:
    return Row(
        protocol=PROTOCOL,
        settings={"classes": len(val.classes), "scales": [*scales], "flip": flip},
        top1=None,
        top5=None,
        data=val.where,
        transform=f"fitted into {views.longer:g} x {views.shorter:g}",
        train_size=0,
        val_size=len(val) - len(skipped),
        notes=[f"{len(skipped)} pictures could not be read ({skipped[0]})"] if skipped else [],
        metrics={
            "mIoU": 100 * scores.miou, "mAcc": 100 * scores.macc, "aAcc": 100 * scores.aacc,
        },
    )  # fmt: skip


def per_class(classes: Sequence[str], scores: Scores) -> list[dict[str, Any]]:
    """A line a class, per cent; None where a class does not occur."""

    def told(share: float) -> float | None:
        return None if math.isnan(share) else 100 * float(share)

    return [
        {"class": name, "IoU": told(iou), "accuracy": told(accuracy)}
        for name, iou, accuracy in zip(classes, scores.iou, scores.accuracy, strict=True)
    ]
