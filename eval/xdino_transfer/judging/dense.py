"""A segmenter or a detector from a file on annotated pictures: one signed row, and a row a class.

    found = score(read_dense("runs/maps"), "ADE20K", How(flip=True))
    found.row.metrics["mIoU"]

Letters: K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xdino.data.image_files import printable
from xdino.data.listing import first
from xdino.errors import UsageError
from xdino.runtime import distributed, turns
from xdino_eval.results import Row, signed
from xdino_transfer.dense_files import LoadedDense
from xdino_transfer.detection import scoring as detecting
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.layouts.annotations import Annotations
from xdino_transfer.detection.layouts.opening import (
    check_numbered,
    open_annotated,
    open_file,
    open_test,
)
from xdino_transfer.detection.views import Views
from xdino_transfer.judging import submission
from xdino_transfer.segmentation import scoring as segmenting
from xdino_transfer.segmentation.maps import Maps, open_maps
from xdino_transfer.segmentation.maps import open_test as open_test_maps
from xdino_transfer.segmentation.segmenter import Segmenter
from xdino_transfer.segmentation.views import TestViews

TOLD = ("init", "recipe")  # facts of a file that its rows name


def _quiet(sentence: str) -> None:
    pass


@dataclass(frozen=True)
class How:
    """How pictures are shown, and who is told.

    split: "val", "train", or what need not be annotated: "test", and "test-dev" of COCO. images: of a
    detector: the folder of the pictures of a JSON file, which the data is then; the split says only
    whether it need be annotated. scales, flip: of a segmenter: views whose probabilities are averaged.
    shorter_side: pixels, None = as the file says. zero_is_void: labels begin at 1, of images/ and
    masks/, whatever the file says. progress: is told how many pictures of how many are done. notice:
    sentences. shared: every process calls this, and looks at its part of the pictures. submission: what
    a benchmark's server takes, see `submission`.
    """

    split: str = "val"
    images: str | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    shorter_side: int | None = None
    zero_is_void: bool = False
    device: torch.device | None = None
    progress: Callable[[int, int], None] | None = None
    notice: Callable[[str], None] = _quiet
    shared: bool = False
    submission: Path | None = None


@dataclass(frozen=True)
class DenseScore:
    """row: signed, None where there is nothing to score against. per_class: a line a class, its name
    first, in per cent, None where it does not occur. results: of a detector, as COCO's result files have
    them, on the first process."""

    row: Row | None
    per_class: list[dict[str, Any]]
    results: list[dict[str, Any]] | None = field(default=None, repr=False)


def score(loaded: LoadedDense, data: str, how: How | None = None) -> DenseScore:
    """mIoU, mAcc and aAcc of a segmenter, AP of boxes and masks of a detector.

    Raises:
        UsageError: data of another task, other classes.
        RunFailed: pictures that cannot be read, numbers that are not finite.
    """
    how = how or How()
    if isinstance(loaded.network, Detector) and (how.flip or how.scales != (1.0,)):
        raise UsageError("flip and scales are of segmenters, and this is a detector")
    if isinstance(loaded.network, Segmenter) and how.images is not None:
        raise UsageError("images of a JSON file are a detector's, and this is a segmenter")
    if how.device is not None:
        loaded.network.to(how.device)
    if isinstance(loaded.network, Detector):
        return _score_detector(loaded, loaded.network, data, how)
    return _score_segmenter(loaded, loaded.network, data, how)


def views_at(loaded: LoadedDense, shorter_side: int | None) -> TestViews | Views:
    """How pictures are shown in a test; for another shorter side the longer's limit in proportion."""
    views = loaded.views
    if shorter_side is None:
        return views
    if isinstance(views, TestViews):
        longer = views.longer * shorter_side / views.shorter
        return replace(views, shorter=shorter_side, longer=longer)
    return replace(
        views,
        test_side=shorter_side,
        longer=math.ceil(views.longer * shorter_side / views.test_side),
    )


def _score_segmenter(loaded: LoadedDense, model: Segmenter, data: str, how: How) -> DenseScore:
    begins_at_one = how.zero_is_void or loaded.facts.get("zero_is_void") is True

    def opened() -> tuple[Maps, int]:
        if how.split == "test-dev":
            raise UsageError("test-dev is a split of COCO's boxes; pictures with masks have test")
        if how.split == "test":
            maps, train_size = open_test_maps(data, begins_at_one), _learned_from(loaded)
        else:
            train, val = open_maps(data, begins_at_one)
            maps, train_size = train if how.split == "train" else val, len(train)
        return replace(maps, channels=loaded.channels), train_size

    chosen, train_size = turns.all_hear(opened, how.shared)
    notes = _checked(loaded, chosen, bool(chosen.masks), how)
    masks = None if how.submission is None else submission.Masks(how.submission, chosen)
    views = views_at(loaded, how.shorter_side)
    assert isinstance(views, TestViews)
    told = (how.scales, how.flip, how.progress, how.shared)
    if masks is not None and not chosen.masks:
        skipped = segmenting.looked(
            model, chosen, views, lambda index, classes, _: masks.add(index, classes), *told
        )
        masks.finish(how.shared)
        _tell_of(skipped, how)
        return DenseScore(None, [])
    row, scores = segmenting.score(
        model, chosen, views, *told, None if masks is None else masks.add
    )
    if masks is not None:
        masks.finish(how.shared)
    table = segmenting.per_class(chosen.classes, scores)
    return DenseScore(_signed(loaded, row, notes, train_size), table)


def _score_detector(loaded: LoadedDense, model: Detector, data: str, how: How) -> DenseScore:
    def opened() -> tuple[Annotations, int]:
        if how.images is None and Path(data).suffix == ".json" and Path(data).is_file():
            raise UsageError(f"{data} names pictures: --images FOLDER says where they are")
        if how.images is None and how.submission is not None:
            check_numbered(data)
        if how.images is not None:
            told = not how.split.startswith("test")
            chosen = open_file(data, how.images, annotated=told)
            train_size = _learned_from(loaded)
        elif how.split.startswith("test"):
            chosen, train_size = open_test(data, how.split), _learned_from(loaded)
        else:
            train, val = open_annotated(data)
            chosen, train_size = train if how.split == "train" else val, len(train)
        if how.submission is not None:
            submission.prepare(how.submission, chosen.where)
        return replace(chosen, channels=loaded.channels), train_size

    chosen, train_size = turns.all_hear(opened, how.shared)
    notes = _checked(loaded, chosen, len(chosen.labels) > 0, how)
    views = views_at(loaded, how.shorter_side)
    assert isinstance(views, Views)
    if how.split.startswith("test") and not len(chosen.labels):
        results, skipped = detecting.looked(model, chosen, views, how.progress, how.shared)
        _tell_of(skipped, how)
        _submit(results, chosen, how)
        return DenseScore(None, [], results)
    found = detecting.score(model, chosen, views, how.progress, how.shared)
    _submit(found.results, chosen, how)
    table = detecting.per_class(chosen, found.by_kind)
    return DenseScore(_signed(loaded, found.row, notes, train_size), table, found.results)


def _checked(
    loaded: LoadedDense, chosen: Maps | Annotations, annotated: bool, how: How
) -> list[str]:
    """Notes on classes; what was left out is said. Raises UsageError, as `score`."""
    if how.split.startswith("test") and not annotated and how.submission is None:
        raise UsageError(
            f"{chosen.where} has nothing to score against: --submission FILE writes what its server takes"
        )
    for sentence in chosen.notices:
        how.notice(sentence)
    return check_classes(loaded, chosen.classes, chosen.where)


def _learned_from(loaded: LoadedDense) -> int:
    """How many images, as the file tells it; 0 where it does not."""
    told = loaded.facts.get("images")
    return told if type(told) is int else 0


def _tell_of(skipped: Sequence[str], how: How) -> None:
    if skipped:
        how.notice(
            f"{len(skipped):,} pictures could not be read, and nothing is submitted for them: "
            f"{first([*skipped])}"
        )


def _submit(results: Sequence[dict[str, Any]], chosen: Annotations, how: How) -> None:
    """By the first process, which has them."""
    if how.submission is not None and (not how.shared or distributed.rank() == 0):
        submission.write_results(how.submission, results)


def _signed(loaded: LoadedDense, row: Row, notes: Sequence[str], train_size: int) -> Row:
    told = {key: loaded.facts[key] for key in TOLD if loaded.facts.get(key) is not None}
    row = replace(
        row, settings=row.settings | told, notes=[*row.notes, *notes], train_size=train_size
    )
    return signed([row], loaded.origin.sha256, loaded.name)[0]


def check_classes(loaded: LoadedDense, classes: Sequence[str], where: str) -> list[str]:
    """Notes on how classes of a file and of data were matched: by name, of published files by place.

    Published names are spelt otherwise than the data sets' own (ADE20K's "building, edifice").

    Raises:
        UsageError: another number, or other names than a file of ours has.
    """
    own, theirs = loaded.classes, tuple(classes)
    if loaded.named and own == theirs:
        return []
    if len(own) != len(theirs):
        told = f" ({_listed(own)})" if loaded.named else ""
        raise UsageError(
            f"{loaded.origin.path} knows {_counted(len(own))}{told}, and {where} has "
            f"{_counted(len(theirs))} ({_listed(theirs)})"
        )
    if not loaded.named:
        return [f"classes by place: the file names none, the data has {_listed(theirs)}"]
    if "task" not in loaded.facts:
        pairs = [pair for pair in zip(own, theirs, strict=True) if pair[0] != pair[1]]
        return [
            f"classes by place: {len(pairs):,} of {len(own):,} are spelt otherwise in the data "
            f'(first: "{pairs[0][0]}", "{pairs[0][1]}")'
        ]
    if set(own) == set(theirs):
        raise UsageError(
            f"{where} has the classes of {loaded.origin.path} in another order: {_listed(theirs)} "
            f"instead of {_listed(own)}"
        )
    ours, others = ([n for n in a if n not in b] for a, b in ((own, theirs), (theirs, own)))
    raise UsageError(
        f"{loaded.origin.path} knows other classes than {where}: {_listed(ours)} instead of "
        f"{_listed(others)}"
    )


def _counted(number: int) -> str:
    return "1 class" if number == 1 else f"{number:,} classes"


def _listed(names: Sequence[str]) -> str:
    return first([printable(name) for name in names])
