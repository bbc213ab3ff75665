"""`xdino features` and `xdino quality`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xdino_launch.commands.options import (
    SEED,
    BackboneOptions,
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
    from xdino_launch.evaluation.subject import save_features

    click.echo(str(save_features(judged.open(), out)))


@click.command()
@takes(judged=BackboneOptions)
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
@click.option("--out", type=Place(file=True), help="Append to this file, else to the run's.")
@batch_option()
@workers_option()
@precision_option()
@on_one_process
def quality(judged: BackboneOptions, data: str, split: str, out: str | None, **how: Any) -> None:
    """RankMe, LiDAR and the spread of the frozen features, as JSON; no labels needed."""
    from xdino_eval.quality.measures import Quality, judge
    from xdino_launch.console import counter, stderr_console

    progress = counter(stderr_console(), "features")

    def tell(found: Quality) -> None:
        click.echo(json.dumps(asdict(found), indent=2))

    judge(
        judged.weights, data, split, Path(out) if out else None, arch=judged.arch, role=judged.role,
        device=judged.device, progress=progress, tell=tell, **how,
    )  # fmt: skip
