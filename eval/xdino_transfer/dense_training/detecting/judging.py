"""Average precision of a detector while it learns and at its end."""

from typing import Any, ClassVar

from xdino_transfer.dense_training.detecting.job import DetectionJob
from xdino_transfer.dense_training.judging import DenseJudge, Scored
from xdino_transfer.detection import scoring
from xdino_transfer.detection.average_precision import AveragePrecision
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.layouts.annotations import Annotations

#: What metrics.jsonl has of an evaluation, by its name in a row of results.json, which has all.
NUMBERS = {
    "box AP": "val_box_ap",
    "box AP50": "val_box_ap50",
    "mask AP": "val_mask_ap",
    "mask AP50": "val_mask_ap50",
}


class DetectionJudge(DenseJudge):
    """See `DenseJudge`."""

    job: DetectionJob
    score: ClassVar[str] = "val_box_ap"

    def scored(self, network: Detector, shared: bool = False) -> Scored:
        plan = self.job.plan
        found = scoring.score(network, plan.val, plan.views)
        numbers = {key: found.row.metrics[name] for name, key in NUMBERS.items()}
        numbers["val_images"] = found.row.val_size
        found.row.settings["norm"] = self.job.config.model.norm
        return Scored([found.row], numbers, per_class(plan.val, found.by_kind))


def per_class(val: Annotations, found: dict[str, AveragePrecision]) -> list[dict[str, Any]]:
    """A line a class, per cent; nothing where there is no object of it to be found."""

    def told(kind: str, number: int) -> float | str:
        share = found[kind].per_class.get(number)
        return "" if share is None else round(100 * share, 4)

    there = val.labels[~val.crowd]
    return [
        {
            "class": name,
            "objects": int((there == label).sum()),
            **{f"{kind} AP": told(kind, int(number)) for kind in found},
        }
        for label, (name, number) in enumerate(zip(val.classes, val.category_ids, strict=True))
    ]
