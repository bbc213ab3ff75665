"""What a classifier says of images that need no labels: class names and probabilities.

Letters: N images, B images of a batch, K classes.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xdino.data import Source
from xdino.errors import RunFailed, UsageError
from xdino.runtime.atomic import write_text
from xdino.runtime.device import device_of
from xdino_eval.extraction import Options
from xdino_eval.features import autocast, evaluating
from xdino_eval.results import as_json
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.labels import display_names
from xdino_transfer.classification.scoring import ALLOWED, logits_of, shown

SUFFIXES = (".csv", ".json")


@dataclass(frozen=True)
class Prediction:
    """Of one image, the likeliest classes first. Classes without names are called by number."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def plain(self) -> dict[str, object]:
        """As JSON has it."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        return {
            "image": self.image,
            "classes": [{"name": name, "probability": probability} for name, probability in pairs],
        }


def predict(
    classifier: Classifier,
    source: Source,
    options: Options,
    top: int = 5,
    max_bad_share: float = ALLOWED,
) -> list[Prediction]:
    """The `top` likeliest classes of every image that can be read, in the source's order.

    Equal probabilities go to the lower class.

    Args:
        options: how images are shown (None = the full crop), in what batches and where; who is told
            of unreadable ones.
        max_bad_share: of the images may be unreadable, but always one.

    Raises:
        RunFailed: too many images could not be read, or a logit is not finite.
    """
    found: list[Prediction] = []
    for indices, logits, _ in logits_of(classifier, source, options, max_bad_share):
        images = [source.describe(index) for index in indices.tolist()]
        found += _likeliest(classifier, images, logits, top)
    return found


def predict_frames(
    classifier: Classifier,
    frames: Iterable[tuple[str, np.ndarray]],
    options: Options,
    top: int = 5,
) -> Iterator[Prediction]:
    """As `predict`, of a film: frames uint8 [H, W, C] with their names, taken as they come.

    Raises:
        RunFailed: a logit is not finite; as the frames.
    """
    transform = shown(classifier, options)
    device = options.device or device_of(classifier)
    classifier.to(device)
    with evaluating(classifier):
        each = iter(frames)
        while batch := list(islice(each, options.batch_size)):
            cut = np.stack([transform.array(pixels) for _, pixels in batch])
            inputs = transform.normalise(torch.from_numpy(cut).to(device))
            with torch.inference_mode(), autocast(device, options.precision):
                logits = classifier(inputs).float().cpu()
            if not logits.isfinite().all():
                raise RunFailed(f"a logit of {batch[0][0]} or after it is not finite")
            yield from _likeliest(classifier, [name for name, _ in batch], logits, top)


def _likeliest(
    classifier: Classifier, images: Sequence[str], logits: Tensor, top: int
) -> list[Prediction]:
    names = display_names(classifier.classes, classifier.num_classes)
    probabilities, columns = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    return [
        Prediction(image, tuple(names[column] for column in own), tuple(values))
        for image, own, values in zip(
            images, columns[:, :top].tolist(), probabilities[:, :top].tolist(), strict=True
        )
    ]


def check_suffix(path: Path) -> str:
    """The suffix of a file that predictions are written to. Raises UsageError for any other."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"predictions are written to a .csv or a .json file, not to {path.name}")
    return suffix


def write(path: Path, predictions: Sequence[Prediction]) -> None:
    """Into a .csv (a line for each image and class) or a .json file, by the name of `path`.

    Raises:
        UsageError: another suffix.
        RunFailed: it cannot be written.
    """
    if check_suffix(path) == ".json":
        write_text(path, as_json([prediction.plain() for prediction in predictions]))
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "rank", "class", "probability"))
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        for rank, (name, probability) in enumerate(pairs, start=1):
            table.writerow((prediction.image, rank, name, f"{probability:.6g}"))
    write_text(path, text.getvalue())
