"""`xdino features` and `xdino quality`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import (
    BATCH,
    SEED,
    Place,
    Whole,
    device_option,
    evaluation_options,
    finish,
    on_one_process,
    subject_options,
    workers_option,
)


@click.command()
@evaluation_options
@on_one_process
def features(**options: Any) -> None:
    """Write the frozen features of train/ and val/ to a safetensors file (--out)."""
    if not options["out"]:
        raise UsageError("features needs --out FILE.safetensors")
    from xdino_launch.evaluation.subject import Subject, save_features

    subject = Subject.open(**subject_options(options))
    path = save_features(subject, Path(options["out"]))
    click.echo(str(path))


@click.command()
@click.argument("weights", type=Place())
@click.option(
    "--data",
    required=True,
    type=Place(),
    help="Images, labelled or not: folder, list, named source.",
)
@click.option("--split", default="train", show_default=True, type=click.Choice(["train", "val"]))
@click.option("--limit", default=25_600, show_default=True, type=Whole(2), help="Images.")
@click.option("--lidar-images", default=1_000, show_default=True, type=Whole(2, 10**6))
@click.option("--views", default=50, show_default=True, type=Whole(2, 1000), help="For LiDAR.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
@click.option("--out", type=Place(file=True), help="Append to this results.json.")
@click.option("--batch-size", default=128, type=BATCH, show_default=True)
@workers_option()
@device_option()
@click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"]))
@on_one_process
def quality(
    weights: str,
    data: str,
    split: str,
    limit: int,
    lidar_images: int,
    views: int,
    seed: int,
    arch: str | None,
    role: str,
    out: str | None,
    device: str,
    **how: Any,
) -> None:
    """RankMe, LiDAR and the spread of the frozen features, as JSON; no labels needed.

    LiDAR's views are the global crops of the run that the weights lie in, or, where there is none,
    the published ones at the network's size.
    """
    from xdino.checkpoint import load_backbone
    from xdino.data import open_source
    from xdino.plan import resolve_device
    from xdino_eval.evaluators import Quality
    from xdino_launch.evaluation.subject import crops_of_run, options_for

    backbone = load_backbone(weights, arch, role)
    source = open_source(data, split, channels=backbone.in_chans)
    options = replace(options_for(resolve_device(device), **how), limit=limit)
    evaluate = Quality(crops_of_run(Path(weights)), lidar_images, views, seed)
    rows = evaluate(backbone, source, source, options)
    finish(rows, weights, out, as_json=True)
