"""What a classifier says of images that need no labels: class names and probabilities.

Letters: N images, K classes.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xdino.data import Source
from xdino.errors import UsageError
from xdino.runtime.atomic import write_text
from xdino_eval.features import Progress, extract
from xdino_eval.results import as_json
from xdino_eval.transform import EvalTransform
from xdino_transfer.classification.classifier import Classifier


@dataclass(frozen=True)
class Prediction:
    """Of one image, the likeliest classes first. Classes without names are called by number."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    classifier: Classifier,
    source: Source,
    transform: EvalTransform,
    top: int = 5,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """The `top` likeliest classes of every image, in the source's order, and what was skipped.

    Equal probabilities go to the lower class.

    Returns:
        Predictions, and (image, reason) of those that could not be read.

    Raises:
        RunFailed: no image could be read, or a logit is not finite.
    """
    logits = extract(
        classifier,
        source,
        transform,
        batch_size,
        device,
        workers,
        precision,
        progress=progress,
    )
    names = classifier.classes or tuple(map(str, range(classifier.num_classes)))
    found = []
    for index, row in zip(logits.indices.tolist(), logits.features, strict=True):
        probabilities, columns = row.softmax(0).sort(descending=True, stable=True)
        found.append(
            Prediction(
                source.describe(index),
                tuple(names[column] for column in columns[:top].tolist()),
                tuple(probabilities[:top].tolist()),
            )
        )
    return found, logits.skipped


def write(path: Path, predictions: Sequence[Prediction]) -> None:
    """Into a .csv (a line for each image and class) or a .json file, by the name of `path`.

    Raises:
        UsageError: another suffix.
        RunFailed: it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_text(path, as_json([_entry(prediction) for prediction in predictions]))
    elif suffix == ".csv":
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("image", "rank", "class", "probability"))
        for prediction in predictions:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            for rank, (name, probability) in enumerate(pairs, start=1):
                table.writerow((prediction.image, rank, name, f"{probability:.6g}"))
        write_text(path, text.getvalue())
    else:
        raise UsageError(f"predictions are written to a .csv or a .json file, not to {path.name}")


def _entry(prediction: Prediction) -> dict[str, object]:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return {
        "image": prediction.image,
        "classes": [{"name": name, "probability": probability} for name, probability in pairs],
    }
