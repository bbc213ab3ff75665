"""mIoU, mAcc and aAcc from one confusion matrix over all pictures.

Scores of a whole data set, not means of pictures or batches. Pixels labelled VOID are left out; the
means run over the classes that occur (IoU: labelled or predicted; accuracy: labelled).

Golden vector `miou`: `ConfusionMatrix`, and `zero_is_void` before it for labels that begin at 1.

Letters: K classes, H x W pixels.
"""

from dataclasses import dataclass

import numpy as np

from xdino.errors import UsageError
from xdino.runtime import distributed
from xdino_transfer.segmentation.losses import VOID


def zero_is_void(labels: np.ndarray) -> np.ndarray:
    """Labels uint8 where 0 means none -> 1 to K become 0 to K - 1, 0 becomes VOID."""
    return np.where((labels == 0) | (labels == VOID), VOID, labels - 1).astype(np.uint8)


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1; of a class that does not occur NaN."""

    miou: float
    macc: float
    aacc: float
    iou: np.ndarray  # [K]
    accuracy: np.ndarray  # [K]


class ConfusionMatrix:
    """Counts [K, K]: rows are the labelled class, columns the predicted one."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, predictions: np.ndarray, labels: np.ndarray) -> None:
        """Count the pixels of a picture: predictions and labels of one shape.

        Raises:
            UsageError: a label, or a prediction, that is no class.
        """
        if predictions.shape != labels.shape:
            raise ValueError(f"{predictions.shape} predictions for {labels.shape} labels")
        labelled = labels != VOID
        rows = labels[labelled].astype(np.int64)
        columns = predictions[labelled].astype(np.int64)
        K = self.classes
        for found in (rows, columns):
            if len(found) and not 0 <= found.min() <= found.max() < K:
                outside = found[(found < 0) | (found >= K)][0]
                raise UsageError(f"a pixel has class {outside}, and there are 0 to {K - 1}")
        self.counts += np.bincount(rows * K + columns, minlength=K * K).reshape(K, K)

    def gather(self) -> None:
        """Add up the counts of all processes, in each of them."""
        self.counts = np.sum(distributed.gather(self.counts), axis=0)

    @property
    def intersect(self) -> np.ndarray:
        return self.counts.diagonal()

    @property
    def union(self) -> np.ndarray:
        return self.counts.sum(0) + self.counts.sum(1) - self.intersect

    def scores(self) -> Scores:
        """Raises UsageError where no pixel is labelled."""
        labelled = self.counts.sum(1)
        if not labelled.sum():
            raise UsageError("no pixel of these pictures has a label to score against")
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = self.intersect / self.union
            accuracy = self.intersect / labelled
        return Scores(
            float(np.nanmean(iou)),
            float(np.nanmean(accuracy)),
            float(self.intersect.sum() / labelled.sum()),
            iou,
            accuracy,
        )
