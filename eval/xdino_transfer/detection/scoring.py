"""Average precision of a detector, as published: whole pictures, one at a time, without mirroring."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from xdino.backbone import evaluating
from xdino.data.decode import UnreadableImage
from xdino.data.listing import printable
from xdino.errors import RunFailed, UsageError
from xdino.runtime.device import device_of
from xdino_eval.results import Row
from xdino_transfer.detection.average_precision import KINDS, AveragePrecision, results_of
from xdino_transfer.detection.average_precision import score as average_precision
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.layouts.annotations import Annotations
from xdino_transfer.detection.objects import Detections
from xdino_transfer.detection.views import Views

PROTOCOL = "detection"


@dataclass(frozen=True)
class Scored:
    """row: not signed yet. by_kind: of "box" and "mask". results: as COCO's result files have them."""

    row: Row
    by_kind: dict[str, AveragePrecision]
    results: list[dict]


@torch.no_grad()
def detected(model: Detector, image: np.ndarray, views: Views) -> Detections:
    """What a model in evaluation mode finds in a picture uint8 [H, W, C], in its own pixels.

    Raises:
        RunFailed: a box or a score is not finite.
    """
    pixels, shown = views.test(image)
    (found,) = model(pixels.to(device_of(model)), [shown])
    if not (found.boxes.isfinite().all() and found.scores.isfinite().all()):
        raise RunFailed("the detections are not finite: the weights are damaged")
    return found


def score(
    model: Detector,
    val: Annotations,
    views: Views,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Box and mask AP in per cent ("box AP50", "mask AP small", ...), where there is something to find.

    Raises:
        UsageError: another number of classes; pycocotools is not installed.
        RunFailed: no picture could be read, or a detection is not finite.
    """
    if model.roi.classes != len(val.classes):
        raise UsageError(
            f"the heads know {model.roi.classes} classes and {val.where} has {len(val.classes)}"
        )
    begun, skipped, results = time.perf_counter(), list[tuple[str, str]](), list[dict]()
    with evaluating(model):
        for index in range(len(val)):
            try:
                image = val.read(index)
            except (UnreadableImage, OSError) as error:
                skipped.append((printable(bytes(val.paths[index])), str(error)))
                continue
            found = detected(model, image, views)
            results += results_of(int(val.numbers[index]), found, val.category_ids.tolist())
            if progress is not None:
                progress(index + 1, len(val))
    if len(skipped) == len(val):
        name, why = skipped[0]
        raise RunFailed(f"no picture of {val.where} could be read: {name} and others ({why})")
    truth = val.truth()
    by_kind = {kind: average_precision(truth, results, kind) for kind in KINDS}
    row = Row(
        protocol=PROTOCOL,
        settings={"classes": len(val.classes), "area": "of what is scored"},
        top1=None,
        top5=None,
        data=val.where,
        transform=f"shorter side {views.test_side}, longer at most {views.longer}",
        train_size=0,
        val_size=len(val) - len(skipped),
        seconds=round(time.perf_counter() - begun, 3),
        notes=[f"{len(skipped)} pictures could not be read ({skipped[0][0]})"] if skipped else [],
        metrics={
            f"{kind} {name}": 100 * value
            for kind, found in by_kind.items()
            for name, value in found.values.items()
            if value is not None
        },
    )
    return Scored(row, by_kind, results)
