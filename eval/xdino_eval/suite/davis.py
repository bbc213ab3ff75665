"""Video object segmentation on DAVIS-2017: masks by label propagation, J and F as it measures them.

DINO, https://arxiv.org/abs/2104.14294, section 4.2.2 and the published `eval_video_segmentation.py`;
the data set's folder is described in `davis_dataset`, the method in `label_propagation`.
"""

import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch

from xdino.backbone import Backbone
from xdino.data import image_files
from xdino.data.image_files import printable
from xdino.errors import UsageError
from xdino_eval.features import Progress, evaluating
from xdino_eval.results import Row
from xdino_eval.suite.davis_dataset import Video, highest, palette_of, read_mask, write_mask
from xdino_eval.suite.davis_scores import VOID, ObjectScore, score_video, summary
from xdino_eval.suite.label_propagation import (
    LARGEST,
    MULTIPLE,
    Propagation,
    frame_size,
    nearest_multiple,
    segment,
    transform_of,
)


def evaluate_davis(
    backbone: Backbone,
    folder: Path,
    videos: list[Video],
    out: Path,
    propagation: Propagation | None = None,
    side: int = 480,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Row:
    """Write the masks of `videos` to OUT/VIDEO/FRAME.png, and score them: a row, unsigned.

    J and F are measured where every frame has its annotation; the row's metrics are empty where no
    video has.

    Args:
        folder: the data set's, for the row. out: folder for the masks.

    Raises:
        UsageError: the backbone has no patch tokens, or `out` would write over the data set.
        RunFailed: a file is damaged, or a mask cannot be written.
    """
    propagation = propagation or Propagation()
    patch = backbone.require_patches()  # before anything is read
    _check(out, videos, side, patch)
    start = time.monotonic()
    scores: list[ObjectScore] = []
    notes = _notes_before(videos, side, patch)
    total, done = sum(len(video.frames) for video in videos), itertools.count(1)
    with evaluating(backbone), torch.inference_mode():
        for video in videos:
            found, palette = [], palette_of(video.masks[0])
            masks = segment(backbone, video, propagation, side, precision)
            for path, mask in zip(video.frames, masks, strict=True):
                write_mask(out / video.name / f"{path.stem}.png", mask, palette)
                found.append(mask)
                if progress:
                    progress(next(done), total)
            if video.scored:
                truth = np.stack([read_mask(path, video.labels) for path in video.masks])
                scores += score_video(truth, np.stack(found))
                notes += _note_of_late_objects(video, truth)
    notes += _note_of_unscored(videos)
    transform, side = transform_of(backbone), nearest_multiple(side, patch)
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (transform.mean, transform.std))
    return Row(
        protocol="video segmentation",
        settings={**vars(propagation), "size": side, "objects": len(scores)},
        top1=None,
        top5=None,
        data=printable(folder),
        transform=f"shorter side {side}, longer a multiple of {MULTIPLE} (bilinear), "
        f"mean ({mean}), std ({std}), {precision}",
        train_size=0,
        val_size=total,
        seconds=time.monotonic() - start,
        notes=notes,
        metrics=summary(scores) if scores else {},
    )


def _note_of_late_objects(video: Video, truth: np.ndarray) -> list[str]:
    if not set(np.unique(truth)) - {*range(highest(truth[0]) + 1), VOID}:
        return []
    name = printable(video.name)
    return [f"{name} shows objects after its first frame that are neither followed nor scored"]


def _note_of_unscored(videos: list[Video]) -> list[str]:
    names = printable(", ".join(video.name for video in videos if not video.scored))
    return [f"not scored (fewer than three frames, or not all annotated): {names}"] * bool(names)


def _notes_before(videos: list[Video], side: int, patch: int) -> list[str]:
    """What a reader of the numbers should know before they are believed."""
    notes = []
    if nearest_multiple(side, patch) != side:
        notes.append(
            f"frames were shown with a shorter side of {nearest_multiple(side, patch)} pixels instead of "
            f"{side}: a multiple of the patch of {patch}"
        )
    drawn = [video.name for video in videos if video.labels.numbers is not None]
    if drawn:
        notes.append(
            "masks that are drawn, not labelled (grey levels or colours stand for objects): "
            + printable(", ".join(drawn))
        )
    empty = [v.name for v in videos if not highest(read_mask(v.masks[0], v.labels))]
    if empty:
        notes.append("no object in the first mask of: " + printable(", ".join(empty)))
    return notes


def _check(out: Path, videos: list[Video], side: int, patch: int) -> None:
    """Refuse frames that are larger than memory holds, and to write over the data set."""
    for video in videos:
        size = image_files.shown_size(video.frames[0])
        height, width = frame_size(size[1], size[0], side, patch)
        if height * width > LARGEST:
            raise UsageError(
                f"the frames of {video.name} with a shorter side of {side} pixels come to more than "
                f"the limit of {LARGEST / 1e6:,.0f} million pixels: lower --shorter-side"
            )
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    for video in videos:
        place = os.path.realpath(out / video.name)
        for path in (video.frames[0], video.masks[0]):
            if os.path.realpath(path.parent) == place:
                raise UsageError(f"the masks would be written over {path.parent}: another --out")
