"""Average precision of boxes and masks as COCO scores it, by COCO's own code (pycocotools).

Detections beyond the best 100 of a picture and class do not count; crowds are neither found nor
missed. Small, medium and large are by the area of what is scored: a mask's own, where mmdetection
2.11 took its box's (the AP over all sizes is the same).

Golden vector `coco_ap`: `score`.

Letters: K classes.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xdino.errors import UsageError
from xdino_transfer.detection.objects import Detections
from xdino_transfer.detection.outlines import encoded, pycocotools_mask

NAMES = (
    "AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
    "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large",
)  # fmt: skip
KINDS = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True)
class AveragePrecision:
    """Shares between 0 and 1; None where nothing of that size, or class, is there to be found.

    values: by `NAMES`. per_class: AP by the category's number in the truth.
    """

    values: dict[str, float | None]
    per_class: dict[int, float | None]


def results_of(image_id: int, found: Detections, category_ids: Sequence[int]) -> list[dict]:
    """Detections of one picture as COCO's result files have them; `category_ids` of each label."""
    boxes = found.boxes.cpu().double().numpy()
    masks = found.masks.cpu().numpy()
    rows = []
    for box, score, label, mask in zip(
        boxes, found.scores.tolist(), found.labels.tolist(), masks, strict=True
    ):
        left, top, right, bottom = box.tolist()
        rows.append(
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[label]),
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": encoded(mask),
            }
        )
    return rows


def score(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str
) -> AveragePrecision:
    """Score results against a COCO tree (`images`, `annotations`, `categories`).

    Args:
        kind: "box" or "mask".

    Raises:
        UsageError: pycocotools is not installed; results of an image that the truth has not.
    """
    pycocotools_mask()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    known = {image["id"] for image in truth["images"]}
    strange = next((row["image_id"] for row in results if row["image_id"] not in known), None)
    if strange is not None:
        raise UsageError(f"results of image {strange}, which is not among those that are scored")
    # Without the other kind's entries: beside a box pycocotools takes a mask's area from that.
    other = "segmentation" if kind == "box" else "bbox"
    rows = [{key: value for key, value in row.items() if key != other} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco = COCO()
        # It writes into what it is given.
        copied = [dict(row) for row in truth["annotations"]]
        coco.dataset = {"info": {}, **truth, "annotations": copied}
        coco.createIndex()
        found = coco.loadRes(rows) if rows else _nothing(COCO, coco)
        evaluation = COCOeval(coco, found, KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][
        :, :, :, 0, 2
    ]  # thresholds, recalls, K: all areas, 100
    per_class = {
        int(number): _mean(precision[:, :, k]) for k, number in enumerate(evaluation.params.catIds)
    }
    told = (None if value < 0 else float(value) for value in evaluation.stats)
    return AveragePrecision(dict(zip(NAMES, told, strict=True)), per_class)


def _nothing(kind: Any, coco: Any) -> Any:
    """Results without a detection, which `loadRes` does not read."""
    found = kind()
    found.dataset = {**coco.dataset, "annotations": []}
    found.createIndex()
    return found


def _mean(values: np.ndarray) -> float | None:
    there = values[values > -1]
    return float(there.mean()) if there.size else None
