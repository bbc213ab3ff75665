"""Average precision of a detector while it learns and at its end."""

from typing import ClassVar

from xdino_transfer.dense_training.detecting.job import DetectionJob
from xdino_transfer.dense_training.judging import DenseJudge, Scored
from xdino_transfer.detection import scoring
from xdino_transfer.detection.detector import Detector

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
        found = scoring.score(network, plan.val, plan.views, shared=shared)
        numbers = {key: found.row.metrics[name] for name, key in NUMBERS.items()}
        numbers["val_images"] = found.row.val_size
        found.row.settings["norm"] = self.job.config.model.norm
        return Scored([found.row], numbers, scoring.per_class(plan.val, found.by_kind))
