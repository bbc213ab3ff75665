"""`xdino linear --apply`: a saved probe on other images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from xdino import data
from xdino.data.files import split_folder
from xdino.errors import UsageError
from xdino_eval.linear.probe import Probe, apply, write_predictions
from xdino_eval.results import Row
from xdino_launch.evaluation.subject import Subject


def use(
    open_subject: Callable[..., Subject], file: str, split: str | None, predictions: str | None
) -> list[Row]:
    """Apply the probe in `file` to the images of a split.

    Args:
        open_subject: `Subject.open`, to be told `splits`. split: "train" or "val"; None: val where
            there is one, else all images. predictions: a CSV file to write, a line an image.

    Returns:
        The row, or none where the images have no labels.

    Raises:
        UsageError: a probe of another width, classes that it does not know, or images without
            labels when no predictions are asked for.
    """
    probe = Probe.load(file)

    def twice(name: str, channels: int) -> tuple[data.Source, data.Source]:
        source = open_one(name, split, channels, labels_needed=predictions is None)
        return source, source

    subject = open_subject(splits=twice)
    source = subject.val
    check_width(probe, subject, file)
    found = subject.features_of(split or "val", source, tokens=(probe.features,))
    if predictions is not None:
        images = [source.describe(index) for index in found.indices.tolist()]
        write_predictions(predictions, probe, found, images, source.classes)
    if found.labels is None:
        return []
    (row,) = subject.sign([apply(probe, found, source.classes)])
    row = replace(row, settings={**row.settings, "probe": Path(file).name})
    trained_on = probe.facts.get("checkpoint", row.checkpoint)
    if trained_on != row.checkpoint:
        note = f"the probe was trained on features of other weights, SHA-256 {trained_on[:12]}"
        row = replace(row, notes=[*row.notes, note])
    return [row]


def open_one(
    name: str, split: str | None, channels: int | None, labels_needed: bool
) -> data.Source:
    """One split of `name`, with labels where it has them.

    A folder without val/ is taken as it is where no split is asked for.
    """
    chosen = split
    if split is None and not Path(name).expanduser().exists():
        chosen = "val"  # of a named source
    elif split is None and split_folder(Path(name).expanduser(), "val").is_dir():
        chosen = "val"
    try:
        return data.open_source(name, chosen, channels, labelled=True)
    except UsageError as error:
        if labels_needed:
            raise UsageError(
                f"{error}. Without labels there is no score: ask for --predictions FILE.csv"
                if Path(name).expanduser().exists()
                else str(error)
            ) from None
        return data.open_source(name, chosen, channels)


def check_width(probe: Probe, subject: Subject, file: str) -> None:
    """Raises UsageError before any image is read where the backbone's features do not fit."""
    width = subject.backbone.embed_dim * (2 if probe.features == "both" else 1)
    try:
        probe.scores(torch.empty(0, width))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
