"""mIoU, mAcc and aAcc of a segmenter while it learns and at its end."""

from typing import ClassVar

from xdino_transfer.dense_training.judging import DenseJudge, Scored
from xdino_transfer.dense_training.segmenting.job import SegmentationJob
from xdino_transfer.segmentation import scoring
from xdino_transfer.segmentation.segmenter import Segmenter


class SegmentationJudge(DenseJudge):
    """See `DenseJudge`."""

    job: SegmentationJob
    score: ClassVar[str] = "val_miou"

    def scored(self, network: Segmenter, shared: bool = False) -> Scored:
        plan, evaluate = self.job.plan, self.job.config.evaluate
        row, scores = scoring.score(
            network, plan.val, plan.test_views, evaluate.scales, evaluate.flip, shared=shared
        )
        row.settings["head"] = self.job.config.model.stands
        numbers = {
            "val_miou": row.metrics["mIoU"],
            "val_macc": row.metrics["mAcc"],
            "val_aacc": row.metrics["aAcc"],
            "val_images": row.val_size,
        }
        return Scored([row], numbers, scoring.per_class(plan.classes, scores))
