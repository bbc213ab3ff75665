"""Average precision of a detector, as published: whole pictures, one at a time, without mirroring.

Several processes look at a part of the pictures each; the first scores what all have found, in the
pictures' own order, by which equal scores are ranked: the numbers are those of one process.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from xdino.backbone import evaluating
from xdino.data.decode import UnreadableImage
from xdino.data.listing import printable
from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed, stopping, turns
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
    """row: not signed yet. by_kind: of "box" and "mask". results: as COCO's result files have them;
    of several processes the first has all of them, and the others have none."""

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


@dataclass
class _Seen:
    """By the numbers of the pictures: what was found, and the names of those that cannot be read."""

    results: dict[int, list[dict]] = field(default_factory=dict)
    skipped: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, other: "_Seen") -> None:
        self.results |= other.results
        self.skipped |= other.skipped


def score(
    model: Detector,
    val: Annotations,
    views: Views,
    progress: Callable[[int, int], None] | None = None,
    shared: bool = False,
) -> Scored:
    """Box and mask AP in per cent ("box AP50", "mask AP small", ...), where there is something to find.

    Args:
        shared: every process calls this, and looks at its part of the pictures.

    Raises:
        UsageError: another number of classes; pycocotools is not installed.
        RunFailed: no picture could be read, or a detection is not finite.
    """
    begun = time.perf_counter()
    results, skipped = looked(model, val, views, progress, shared)

    def scored() -> tuple[Row, dict[str, AveragePrecision]]:
        truth = val.truth()
        by_kind = {kind: average_precision(truth, results, kind) for kind in KINDS}
        row = _row(val, views, by_kind, skipped)
        return replace(row, seconds=round(time.perf_counter() - begun, 3)), by_kind

    row, by_kind = turns.on_first(scored, shared)
    return Scored(row, by_kind, results)


def looked(
    model: Detector,
    val: Annotations,
    views: Views,
    progress: Callable[[int, int], None] | None = None,
    shared: bool = False,
) -> tuple[list[dict], list[str]]:
    """What is found in all pictures, as COCO's result files have it, and which cannot be read.

    shared: every process looks at its part; the first has all, the others nothing. Raises as `score`.
    """
    if shared:
        distributed.agree({"the number of pictures": len(val)})
    seen = turns.all_hear(lambda: _seen(model, val, views, progress, shared), shared)
    if shared:
        others = distributed.to_first(seen)
        seen = _Seen()
        for other in others:
            seen.add(other)
    results = [row for index in sorted(seen.results) for row in seen.results[index]]
    skipped = [seen.skipped[index] for index in sorted(seen.skipped)]

    def some() -> None:
        if len(skipped) == len(val):
            name, why = skipped[0]
            raise RunFailed(f"no picture of {val.where} could be read: {name} and others ({why})")

    turns.on_first(some, shared)
    return results, [name for name, _ in skipped]


def _seen(
    model: Detector,
    val: Annotations,
    views: Views,
    progress: Callable[[int, int], None] | None = None,
    shared: bool = False,
) -> _Seen:
    """What a model finds in this process's pictures. Raises as `score`."""
    if model.roi.classes != len(val.classes):
        raise UsageError(
            f"the heads know {model.roi.classes} classes and {val.where} has {len(val.classes)}"
        )
    seen, ids = _Seen(), val.category_ids.tolist()
    first, step = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    with evaluating(model):
        for index in range(first, len(val), step):
            stopping.asked()
            try:
                image = val.read(index)
            except (UnreadableImage, OSError) as error:
                seen.skipped[index] = (printable(bytes(val.paths[index])), str(error))
                continue
            found = detected(model, image, views)
            seen.results[index] = results_of(int(val.numbers[index]), found, ids)
            if progress is not None:
                progress(index + 1, len(val))
    return seen


def _row(
    val: Annotations,
    views: Views,
    by_kind: dict[str, AveragePrecision],
    skipped: Sequence[str],
) -> Row:
    return Row(
        protocol=PROTOCOL,
        settings={"classes": len(val.classes), "area": "of what is scored"},
        top1=None,
        top5=None,
        data=val.where,
        transform=f"shorter side {views.test_side}, longer at most {views.longer}",
        train_size=0,
        val_size=len(val) - len(skipped),
        notes=[f"{len(skipped)} pictures could not be read ({skipped[0]})"] if skipped else [],
        metrics={
            f"{kind} {name}": 100 * value
            for kind, found in by_kind.items()
            for name, value in found.values.items()
            if value is not None
        },
    )


def per_class(val: Annotations, found: Mapping[str, AveragePrecision]) -> list[dict[str, Any]]:
    """A line a class, per cent; None where there is no object of it to be found."""

    def told(kind: str, number: int) -> float | None:
        share = found[kind].per_class.get(number)
        return None if share is None else 100 * share

    there = val.labels[~val.crowd]
    return [
        {
            "class": name,
            "objects": int((there == label).sum()),
            **{f"{kind} AP": told(kind, int(number)) for kind in found},
        }
        for label, (name, number) in enumerate(zip(val.classes, val.category_ids, strict=True))
    ]
