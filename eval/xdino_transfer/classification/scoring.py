"""Top-1 and top-5 of a classifier, in the published evaluation.

The published numbers are of the "full crop": the shorter side resized to the network's size, the
centre cut. Without it the shorter side is resized to 256/224 of the size, and the centre cut. Equal
logits go to the lower class.

Letters: N images, B images of a batch, K classes.
"""

import contextlib
import time
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from xdino.backbones import BackboneSpec
from xdino.config import Data
from xdino.data import Source
from xdino.errors import RunFailed, UsageError
from xdino_eval.accuracy import ranks, top1_top5
from xdino_eval.extraction import Options
from xdino_eval.features import each_batch, none_read, refuse_broken
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.labels import match

PROTOCOL = "classification"
FULL_CROP = 1.0  # side of the crop as a share of the resized shorter side
ALLOWED = Data().max_bad_share  # of the images may be unreadable, as in pretraining


def published_transform(spec: BackboneSpec, full_crop: bool = True) -> EvalTransform:
    """What main.py evaluates with: the full crop, or 256/224 rounded down; of 32 pixels always all."""
    full_crop = full_crop or spec.input_size <= 32
    return cropped(spec, FULL_CROP if full_crop else 224 / 256)


def cropped(spec: BackboneSpec, ratio: float, size: int | None = None) -> EvalTransform:
    """The shorter side resized to `size / ratio` pixels, rounded down as published and by timm.

    size: of the square; None = the network's own.

    Raises:
        UsageError: a ratio outside of (0, 1].
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"the crop's ratio must be above 0 and at most 1, got {ratio:g}")
    side = spec.input_size if size is None else size
    return EvalTransform(side, int(side / ratio + 1e-9), tuple(spec.mean), tuple(spec.std))


def score(
    classifier: Classifier,
    source: Source,
    options: Options,
    train_size: int = 0,
    max_bad_share: float = ALLOWED,
) -> list[Row]:
    """One row, not signed yet: top-1 and top-5 of `classifier` on the images of `source`.

    Args:
        options: how images are shown (None = the full crop), in what batches and where; who is told
            of unreadable ones.
        train_size: how many images there are to learn from, where that is known.
        max_bad_share: of the images may be unreadable, but always one.

    Raises:
        UsageError: no labels, or classes that the head does not have.
        RunFailed: too many images could not be read, or a logit is not finite.
    """
    start = time.perf_counter()
    matching = match(classifier.classes, classifier.num_classes, source)
    labels = torch.from_numpy(np.asarray(source.labels))
    rank = torch.empty(len(source), dtype=torch.int64)
    filled, skipped, transform = 0, 0, shown(classifier, options)
    for indices, logits, unread in logits_of(classifier, source, options, max_bad_share):
        skipped += unread
        if len(indices):
            own = matching.numbers[labels[torch.from_numpy(indices)]]
            rank[filled : filled + len(own)] = ranks(logits, own)
            filled += len(own)
    top1, top5 = top1_top5(rank[:filled])
    notes = [f"{skipped:,} images of {source.name} could not be read"] if skipped else []
    settings = {
        "classes": classifier.num_classes,
        "arch": classifier.spec.arch,
        "labels": matching.how,
    }
    return [
        Row(
            protocol=PROTOCOL,
            settings=settings,
            top1=top1,
            top5=top5,
            data=source.name,
            transform=f"{transform.describe()}, {options.precision}",
            train_size=train_size,
            val_size=filled,
            seconds=round(time.perf_counter() - start, 3),
            notes=[*notes, *matching.notes],
        )
    ]


def shown(classifier: Classifier, options: Options) -> EvalTransform:
    """How images are shown to a classifier: as asked for, else by the full crop."""
    return options.transform or published_transform(classifier.spec)


def logits_of(
    classifier: Classifier, source: Source, options: Options, max_bad_share: float = 1.0
) -> Generator[tuple[np.ndarray, Tensor, int], None, None]:
    """Of each batch: which images (int64 [B]), logits float32 [B, K], and how many were not read.

    Only one batch of logits is in memory: those of ImageNet's 50,000 images were 200 MB.

    Raises:
        RunFailed: none, or more than the share and more than one, could not be read; a logit is not
            finite.
    """
    order, allowed = np.arange(len(source)), max(1.0, max_bad_share * len(source))
    tell = options.counter("images")
    skipped: list[tuple[str, str]] = []
    read = 0
    batches = each_batch(
        classifier,
        source,
        shown(classifier, options),
        order,
        options.batch_size,
        options.device,
        options.workers,
        options.precision,
        options.shared,
    )
    with contextlib.closing(batches):
        for batch, logits in batches:
            unread = [(source.describe(index), why) for index, why in batch.skipped]
            skipped += unread
            for name, why in unread:
                options.notice(f"skipped {name}: {why}")
            if len(skipped) > allowed:
                raise _too_many(source, skipped, max_bad_share)
            if len(batch.indices):
                refuse_broken(logits, source, batch.indices)
            read += len(batch.indices)
            if tell:
                tell(read + len(skipped), len(order))
            yield batch.indices, logits, len(unread)
    if not read:
        raise none_read(source, skipped)


def _too_many(source: Source, skipped: list[tuple[str, str]], share: float) -> RunFailed:
    if len(skipped) == len(source):
        return none_read(source, skipped)
    return RunFailed(
        f"{len(skipped):,} and maybe more of the {len(source):,} images of {source.name} cannot be "
        f"read, and --max-bad-share allows {share:.2%}; the first: {': '.join(skipped[0])}"
    )
