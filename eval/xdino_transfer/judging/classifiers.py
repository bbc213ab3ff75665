"""A classifier from a file on images as they are named: a signed row, or what it says of each.

import xdino_transfer

row = xdino_transfer.score("runs/classes", "classes")
for prediction in xdino_transfer.predict("runs/classes", "photos"):
    print(prediction.image, prediction.classes[0], prediction.probabilities[0])
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from xdino.data import Source
from xdino_eval.extraction import Options
from xdino_eval.results import Row, signed
from xdino_eval.transform import EvalTransform
from xdino_transfer.classification import predicting, scoring
from xdino_transfer.classification.files import LoadedClassifier, read_classifier
from xdino_transfer.classification.predicting import Prediction
from xdino_transfer.classification.scoring import ALLOWED, FULL_CROP
from xdino_transfer.datasets import open_scored
from xdino_transfer.judging.inputs import Film, gather

Place = str | os.PathLike[str]
TOLD = ("init", "recipe")  # facts of a file that its rows name


def score(
    weights: Place | LoadedClassifier,
    data: Place,
    *,
    arch: str | None = None,
    split: str = "val",
    size: int | None = None,
    crop_ratio: float | None = None,
    category: str = "name",
    options: Options | None = None,
) -> Row:
    """Top-1 and top-5 of a classifier on the labelled images of `data`, as `xdino score`.

    Args:
        weights: a fine-tuned run, a file of ours, a published XCiT or a timm classifier; or one that
            `read_classifier` gave.
        arch: the network's name, for files that do not say.
        split: "val" or "train".
        size: of the square that is shown, in pixels; None = the network's own.
        crop_ratio: that square as a share of the resized shorter side; None = what timm says of its
            networks, else 1, the published full crop.
        category: of iNaturalist, the rank that is told apart.
        options: in what batches, where, and who is told of unreadable images.

    Raises:
        ValueError: nothing there, no head, classes that the head does not have.
        xdino.errors.RunFailed: a damaged file, images that cannot be read.
    """
    loaded, options = _ready(weights, arch, size, crop_ratio, options)
    source, train_size = open_scored(os.fspath(data), split, len(loaded.mean), category)
    (row,) = score_source(loaded, source, options, train_size)
    return row


def predict(
    weights: Place | LoadedClassifier,
    images: Place | Iterable[Place],
    *,
    top: int = 5,
    arch: str | None = None,
    size: int | None = None,
    crop_ratio: float | None = None,
    options: Options | None = None,
) -> list[Prediction]:
    """The `top` likeliest classes of every image, in order, as `xdino predict`.

    Args:
        images: a file, a folder, a list, a tar, a film; or several of them. weights, arch, size,
            crop_ratio, options: as of `score`.

    Raises:
        ValueError, xdino.errors.RunFailed: as `score`.
    """
    loaded, options = _ready(weights, arch, size, crop_ratio, options)
    names = [images] if isinstance(images, str | os.PathLike) else list(images)
    found = gather([os.fspath(name) for name in names], len(loaded.mean))
    return predict_all(loaded, found, options, top)


def _ready(
    weights: Place | LoadedClassifier,
    arch: str | None,
    size: int | None,
    crop_ratio: float | None,
    options: Options | None,
) -> tuple[LoadedClassifier, Options]:
    if not isinstance(weights, LoadedClassifier):
        weights = read_classifier(os.fspath(weights), arch)
    options = options or Options()
    transform = options.transform or transform_of(weights, size, crop_ratio)
    return weights, replace(options, transform=transform)


def transform_of(
    loaded: LoadedClassifier, size: int | None = None, crop_ratio: float | None = None
) -> EvalTransform:
    """How images are shown to a classifier, see `score`. Raises UsageError for a ratio that is none."""
    ratio = loaded.crop_ratio or FULL_CROP if crop_ratio is None else crop_ratio
    return scoring.cropped(loaded.classifier.spec, ratio, size)


def score_source(
    loaded: LoadedClassifier,
    source: Source,
    options: Options,
    train_size: int = 0,
    max_bad_share: float = ALLOWED,
) -> list[Row]:
    """`scoring.score` of what a file holds: signed, with what the file says of itself."""
    for sentence in source.notices():
        options.notice(sentence)
    told = {key: loaded.facts[key] for key in TOLD if loaded.facts.get(key) is not None}
    rows = [
        replace(row, settings=row.settings | told, notes=[*row.notes, *loaded.remarks])
        for row in scoring.score(loaded.classifier, source, options, train_size, max_bad_share)
    ]
    return signed(rows, loaded.origin.sha256, loaded.name)


def predict_all(
    loaded: LoadedClassifier,
    found: Sequence[Source | Film],
    options: Options,
    top: int = 5,
    max_bad_share: float = ALLOWED,
) -> list[Prediction]:
    """The likeliest classes of every image and frame of what `gather` found, in order."""
    classifier, predictions = loaded.classifier, list[Prediction]()
    for each in found:
        if isinstance(each, Film):
            predictions += predicting.predict_frames(classifier, each.frames(), options, top)
            continue
        for sentence in each.notices():
            options.notice(sentence)
        predictions += predicting.predict(classifier, each, options, top, max_bad_share)
    return predictions
