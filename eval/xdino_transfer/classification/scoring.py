"""Top-1 and top-5 of a classifier, in the published evaluation.

The published numbers are of the "full crop": the shorter side resized to the network's size, the
centre cut. Without it the shorter side is resized to 256/224 of the size, and the centre cut. Equal
logits go to the lower class.

Letters: N images, K classes.
"""

import time

import torch
from torch import Tensor

from xdino.backbones import BackboneSpec
from xdino.data import Source
from xdino.errors import UsageError
from xdino_eval.accuracy import ranks, top1_top5
from xdino_eval.features import Features, Progress, extract
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform
from xdino_transfer.classification.classifier import Classifier

PROTOCOL = "fine-tuned classification"


def published_transform(spec: BackboneSpec, full_crop: bool = True) -> EvalTransform:
    """What main.py evaluates with: the full crop, or 256/224 rounded down."""
    resize = spec.input_size if full_crop else int(256 / 224 * spec.input_size)
    return EvalTransform(spec.input_size, resize, tuple(spec.mean), tuple(spec.std))


def score(
    classifier: Classifier,
    source: Source,
    transform: EvalTransform,
    train_size: int = 0,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> list[Row]:
    """One row, not signed yet: top-1 and top-5 of `classifier` on the images of `source`.

    Args:
        train_size: how many images it learned from, where that is known.
        device: the network is moved there; None = where it is.

    Raises:
        UsageError: no labels, or classes that the head does not have.
        RunFailed: no image could be read, or a logit is not finite.
    """
    numbers = numbers_in_head(classifier, source)
    start = time.perf_counter()
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
    top1, top5 = accuracies(logits, numbers)
    notes = []
    if logits.skipped:
        notes.append(f"{len(logits.skipped)} images of {source.name} could not be read")
    if len(numbers) < classifier.num_classes:
        notes.append(
            f"the data has {len(numbers):,} of the head's {classifier.num_classes:,} classes"
        )
    return [
        Row(
            protocol=PROTOCOL,
            settings={"classes": classifier.num_classes, "arch": classifier.spec.arch},
            top1=top1,
            top5=top5,
            data=source.name,
            transform=logits.transform,
            train_size=train_size,
            val_size=len(logits.features),
            seconds=round(time.perf_counter() - start, 3),
            notes=notes,
        )
    ]


def accuracies(logits: Features, numbers: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in per cent, of logits [N, K] whose labels `numbers` turns into columns."""
    assert logits.labels is not None
    return top1_top5(ranks(logits.features, numbers[logits.labels]))


def numbers_in_head(classifier: Classifier, source: Source) -> Tensor:
    """For each class of `source` the logit that is its own, int64: by name where the head has names.

    Raises:
        UsageError: no labels; a class that the head does not have; another number of classes, where
            the head does not name its own.
    """
    if source.labels is None or source.classes is None:
        raise UsageError(f"{source.name} has no classes to score against")
    if classifier.classes is None:
        if len(source.classes) != classifier.num_classes:
            raise UsageError(
                f"the head knows {classifier.num_classes:,} classes without names and "
                f"{source.name} has {len(source.classes):,}: it is a classifier of other data"
            )
        return torch.arange(classifier.num_classes)
    number = {name: column for column, name in enumerate(classifier.classes)}
    unknown = [name for name in source.classes if name not in number]
    if unknown:
        names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UsageError(
            f"the head does not know {len(unknown):,} of the {len(source.classes):,} classes of "
            f"{source.name}: {names}"
        )
    return torch.tensor([number[name] for name in source.classes])
