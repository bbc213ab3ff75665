"""What other programs and other machines take: `xdino export` and `xdino pack`."""

from pathlib import Path

import click

from xdino.errors import UsageError
from xdino.runtime import places
from xdino_launch.commands.options import (
    PIXELS,
    Place,
    WeightsOptions,
    Whole,
    on_one_process,
    takes,
    workers_option,
)


@click.command()
@takes(judged=WeightsOptions)
@click.option(
    "--out", required=True, type=Place(Path), help="FILE.safetensors, FILE.onnx, or a folder."
)
@click.option(
    "--format",
    "format",
    type=click.Choice(["published", "timm", "onnx", "hf"]),
    help="[what --out ends in: published in .safetensors, onnx in .onnx]",
)
@click.option(
    "--head/--no-head",
    "head",
    default=None,
    help="A classifier with its head, or its backbone alone.  [with it, where a file of ours has one]",
)
@on_one_process
def export(judged: WeightsOptions, out: Path, format: str | None, head: bool | None) -> None:
    """Write a backbone, or a classifier, for others to use.

    As safetensors under the published parameter names or timm's; as an ONNX graph (needs
    xdino[onnx]) that takes any batch, and for an XCiT any image size; or with --format hf as a
    folder that timm (local-dir:FOLDER), transformers (TimmWrapperModel) and xdino load. Of a
    fine-tuned run, and with --head of published XCiT and timm classifiers, class names and head go
    with it.
    """
    judged.there()
    if head and judged.role != "teacher":
        raise UsageError("--role is of a backbone's two networks, and a classifier has one")
    from xdino_launch.console import stderr_console
    from xdino_launch.export.backbone import export_backbone
    from xdino_launch.export.classifier import export_classifier
    from xdino_transfer.classification.files import holds_classifier
    from xdino_transfer.dense_files import dense_task

    console = stderr_console()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    weights, arch, role = judged.weights, judged.arch, judged.role
    if (task := dense_task(weights)) is not None:
        what = "a segmenter" if task == "segmentation" else "a detector"
        raise UsageError(
            f"{weights} holds {what}: backbones and classifiers are exported, and {what} is used by "
            "xdino score and predict"
        )
    if head or (head is None and role == "teacher" and holds_classifier(weights)):
        click.echo(str(export_classifier(weights, out, format, arch, say)))
        return
    click.echo(str(export_backbone(weights, out, format, arch, role, say)))


@click.command()
@click.argument("data", type=Place())
@click.option("--out", required=True, type=Place(), help="FILE.tar, or a folder for --shards.")
@click.option("--shorter-side", type=PIXELS, help="Shrink larger images to this, in pixels.")
@click.option("--quality", default=95, show_default=True, type=Whole(1, 100), help="JPEG.")
@click.option("--shards", type=Whole(1, 100_000), help="Tars a split, into the folder --out.")
@workers_option()
def pack(
    data: str, out: str, shorter_side: int | None, quality: int, shards: int | None, workers: int
) -> None:
    """Write the images of DATA into plain tar files that every command takes as DATA.

    Without --shorter-side the files' own bytes: the same crops as from the folder. With it,
    smaller JPEGs that are faster to read (of bands TIFFs and arrays, whose numbers keep their
    meaning); results then say that their data were shrunk.
    """
    places.check_data(data)
    from xdino.data import pack as room
    from xdino_launch.console import counter, stderr_console

    console = stderr_console()
    done = room.pack(
        data, out, shorter_side, quality, shards, workers, progress=counter(console, "packed")
    )
    for notice in done.notices:
        console.print(notice, markup=False, soft_wrap=True)
    for where, why in done.unreadable[:20]:
        console.print(f"kept as it is, unreadable: {where} ({why})", markup=False, soft_wrap=True)
    if len(done.unreadable) > 20:
        console.print(f"and {len(done.unreadable) - 20:,} more unreadable images")
    if shorter_side is not None:
        console.print(
            f"{done.shrunk:,} of {done.images:,} images shrunk to a shorter side of {shorter_side} "
            "pixels: results from this pack say so, and are not of the published distribution",
            soft_wrap=True,
        )
    for path in done.files:
        click.echo(str(path))
