"""`xdino linear`: one of the protocols on a frozen backbone, or a saved probe on other images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xdino import data
from xdino.errors import UsageError
from xdino_eval.linear.grid import Grid, grid_probe, grid_probe_features
from xdino_eval.linear.logistic import logistic_probe
from xdino_eval.linear.probe import Probe, Trained, apply, write_predictions
from xdino_eval.linear.sgd import OverImages, Sgd, sgd_probe, sgd_probe_features
from xdino_eval.results import Row
from xdino_launch.evaluation.subject import Subject


def train(
    subject: Subject,
    protocol: str,
    how: Sgd,
    grid: Grid,
    strengths: str | Sequence[float],
    keep_in: Path | None,
    save_head: str | None,
) -> tuple[Row, Trained]:
    """Train a probe by `protocol`, keep it if asked, and say what it scores.

    Returns:
        The row, and what to tell (`settled`) when it is safe.

    Args:
        keep_in: folder for the state to go on from. save_head: file for the probe.
    """
    told = {"keep_in": keep_in, "progress": subject.progress("epoch")}
    device = subject.device
    if protocol in ("sgd", "grid"):
        images = OverImages(
            subject.backbone,
            subject.train,
            subject.val,
            subject.transform,
            device,
            subject.workers,
            subject.precision,
            **told,
        )
        done = sgd_probe(images, how) if protocol == "sgd" else grid_probe(images, grid, how)
    elif protocol == "grid-features":
        both = subject.features(grid.features)
        done = grid_probe_features(*both, grid, how, device, **told)
    elif protocol == "sgd-features":
        done = sgd_probe_features(*subject.features(), how, device, **told)
    else:
        told["progress"] = subject.progress("fit")
        done = logistic_probe(*subject.features(), strengths, seed=how.seed, **told)
    (row,) = subject.sign([done.row])
    if save_head is not None:
        done.probe.signed(subject.train.classes, row.checkpoint).save(save_head)
    return row, done


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
    elif split is None and (Path(name).expanduser() / "val").is_dir():
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
    dim: Any = getattr(subject.backbone, "embed_dim", None)
    if isinstance(dim, int):
        width = 2 * dim if probe.features == "both" else dim
        try:
            probe.scores(torch.empty(0, width))
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None
