"""How well masks of a video follow the annotated ones: the measures J and F of DAVIS.

Perazzi et al. 2016 ("A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation",
section 5) and the 2017 challenge (Pont-Tuset et al., https://arxiv.org/abs/1704.00675, section 4):
J is the Jaccard index of the regions, F the F-measure of the contours within a tolerance. Both are
measured for each object in each frame but the first, which is given, and the last; an object's value
is the mean over its frames, and the benchmark's the mean over all objects of all videos.

Letters: T frames, H x W pixels, K objects.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

VOID = 255  # an annotation's label for pixels of no object
TOLERANCE = 0.008  # of the image's diagonal, in which contours count as equal


def jaccard(truth: np.ndarray, found: np.ndarray) -> float:
    """Intersection over union of two bool [H, W], 0..1; 1 where both are empty."""
    union = np.count_nonzero(truth | found)
    return np.count_nonzero(truth & found) / union if union else 1.0


def contour_f(truth: np.ndarray, found: np.ndarray) -> float:
    """F-measure of the contours of two bool [H, W], 0..1; 1 where both are empty.

    A pixel of one contour is matched by any pixel of the other not farther than 0.8 % of the
    image's diagonal, rounded up.
    """
    reach = np.ceil(TOLERANCE * np.linalg.norm(truth.shape))
    lines = contour(truth), contour(found)
    counts = [np.count_nonzero(line) for line in lines]
    if not all(counts):
        return float(counts[0] == counts[1])
    recall, precision = (
        np.count_nonzero(line & (distance_transform_edt(~other) <= reach)) / count
        for line, other, count in zip(lines, reversed(lines), counts, strict=True)
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: the pixels that differ from their neighbour to the right, below, or both.

    Contours so lie half a pixel towards the origin. Beyond the last row and column the mask goes on
    as it ends there.
    """
    beyond = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (
        (mask != beyond[:-1, 1:]) | (mask != beyond[1:, :-1]) | (mask != beyond[1:, 1:])
    )  # fmt: skip


@dataclass(frozen=True)
class ObjectScore:
    """One object of one video: J and F of its frames, float64 [T - 2]."""

    j: np.ndarray
    f: np.ndarray


def score_video(truth: np.ndarray, found: np.ndarray) -> list[ObjectScore]:
    """The scores of the objects that the first annotation names, 1 to its highest label.

    Args:
        truth, found: uint8 [T, H, W], labels; `VOID` in `truth` is background.

    Raises:
        ValueError: shapes that differ, or fewer than three frames.
    """
    if truth.shape != found.shape or len(truth) < 3:
        raise ValueError(f"masks must be two [T > 2, H, W], got {truth.shape} and {found.shape}")
    objects = int(np.where(truth[0] == VOID, 0, truth[0]).max())
    scores = []
    for label in range(1, objects + 1):
        pairs = [(t == label, m == label) for t, m in zip(truth[1:-1], found[1:-1], strict=True)]
        measured = ([measure(t, m) for t, m in pairs] for measure in (jaccard, contour_f))
        scores.append(ObjectScore(*map(np.array, measured)))
    return scores


def summary(scores: list[ObjectScore]) -> dict[str, float]:
    """Mean, recall (frames above 0.5) and decay (first less last quarter), in per cent."""
    out = {}
    for name, series in (("J", [s.j for s in scores]), ("F", [s.f for s in scores])):
        out[f"{name} mean"] = 100 * float(np.mean([values.mean() for values in series]))
        out[f"{name} recall"] = 100 * float(np.mean([(values > 0.5).mean() for values in series]))
        out[f"{name} decay"] = 100 * float(np.mean([_decay(values) for values in series]))
    return {"J&F mean": (out["J mean"] + out["F mean"]) / 2, **out}


def _decay(values: np.ndarray) -> float:
    # The quarters share their border frames, as in the official code.
    bounds = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return float(values[: bounds[1] + 1].mean() - values[bounds[3] : bounds[4] + 1].mean())
