"""`xdino features` and `xdino quality`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    option,
    precision_option,
    takes,
    workers_option,
)

if TYPE_CHECKING:
    from xdino.data import Source


PARTS = (
    "Images, labelled or not: a folder, flat or with train/ and val/, a list, tars, a named source."
)


@dataclass(frozen=True)
class FeatureOptions(SubjectOptions):
    """Whose features, of which images."""

    data: str = option("--data", required=True, type=Place(), help=PARTS)


@click.command()
@takes(judged=FeatureOptions)
@click.option(
    "--out",
    required=True,
    type=Place(Path, file=True),
    help="FILE.parquet, FILE.npz, FILE.csv or FILE.safetensors.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "both"]),
    help="Of DATA.  [what it is divided into, all of it where it is not]",
)
@click.option("--patches", is_flag=True, help="Write the features of the patches, too.")
@on_one_process
def features(judged: FeatureOptions, out: Path, split: str | None, patches: bool) -> None:
    """Write the frozen features of images to a file, one row an image.

    With each: its path below DATA, the name and number of its class where there are class folders,
    and with --patches the features of its patches. Parquet and CSV are written as they come, and take
    any number of images; in .npz and .safetensors the arrays of two splits are called train_features,
    val_features and so on.
    """
    judged.there(judged.data)
    from xdino_eval.feature_files import FeatureFile, open_parts, save_parts
    from xdino_eval.feature_files.rows import Part

    file = FeatureFile(out, patches)
    assert file.format  # refused before anything is read
    parts: list[Part] = []

    def opened(data: str, channels: int) -> "tuple[Source, Source]":
        parts.extend(open_parts(data, channels, split))
        return parts[0].source, parts[-1].source

    subject = judged.open(opened)
    click.echo(str(save_parts(subject.backbone, parts, file, subject.options)))


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
