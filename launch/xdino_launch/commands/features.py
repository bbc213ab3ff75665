"""`xdino features` and `xdino quality`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from xdino_launch.commands.options import (
    SEED,
    BackboneOptions,
    OutputOptions,
    Place,
    SubjectOptions,
    Whole,
    batch_option,
    on_one_process,
    precision_option,
    takes,
    workers_option,
)


@click.command()
@takes(judged=SubjectOptions)
@click.option("--out", required=True, type=Place(Path, file=True), help="FILE.safetensors")
@on_one_process
def features(judged: SubjectOptions, out: Path) -> None:
    """Write the frozen features of train/ and val/ to a safetensors file."""
    judged.there(judged.data)
    from xdino_launch.evaluation.subject import save_features

    click.echo(str(save_features(judged.open(), out)))


@click.command()
@takes(judged=BackboneOptions, output=OutputOptions)
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
@batch_option()
@workers_option()
@precision_option()
@on_one_process
def quality(
    judged: BackboneOptions,
    output: OutputOptions,
    data: str,
    split: str,
    limit: int,
    lidar_images: int,
    views: int,
    seed: int,
    **how: Any,
) -> None:
    """RankMe, LiDAR and the spread of the frozen features; no labels needed.

    LiDAR's views are the global crops of the run that the weights lie in, or, where there is none,
    the published ones at the network's size.
    """
    judged.there(data)
    from xdino.data import open_source
    from xdino.runtime.device import resolve_device
    from xdino_eval.evaluators import Quality
    from xdino_launch.evaluation.subject import crops_of_run, options_for

    backbone = judged.backbone()
    source = open_source(data, split, channels=backbone.in_chans)
    options = replace(options_for(resolve_device(judged.device), **how), limit=limit)
    evaluate = Quality(crops_of_run(Path(judged.weights)), lidar_images, views, seed)
    rows = evaluate(backbone, source, source, options)
    output.tell(rows, judged.weights)
