"""`xdino attention` and `xdino segment-score`."""

import contextlib
from pathlib import Path
from typing import Any

import click

from xdino import values
from xdino.errors import UsageError
from xdino.runtime import places
from xdino_launch.commands.options import (
    BackboneOptions,
    Number,
    Numbers,
    OutputOptions,
    Place,
    Whole,
    on_one_process,
    shorter_side_option,
    takes,
)

SIZE = "Shorter side in pixels; default: the longer one at 480, less for what is much smaller."
mass_option = click.option(
    "--mass", default=0.6, show_default=True, type=Number(), help="Share held by the mask."
)


def _check_mass(value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"--mass must be above 0 and at most 1, got {value:g}")


@click.command()
@takes(judged=BackboneOptions)
@click.argument("images", nargs=-1, required=True, type=Place())
@click.option("--out", type=Place(Path), help="Folder; of a run, its attention/ by default.")
@shorter_side_option(help=SIZE)
@mass_option
@click.option(
    "--layer",
    type=Whole(1, 1000),
    help="Class-attention layer of an XCiT (default: all), block of a ViT (default: the last).",
)
@click.option("--head", type=Whole(1, 100_000), help="This head; default: each, and their mean.")
@click.option("--fps", type=Number(), help="A folder is a video of so many frames a second.")
@click.option("--pca", is_flag=True, help="Patch tokens as colours, by principal components.")
@click.option("--foreground", is_flag=True, help="With --pca: of objects alone, found by it.")
@click.option("--xca", is_flag=True, help="XCA's channel-by-channel matrices.")
@click.option("--all", "every", is_flag=True, help="A file of each head, map and mask, too.")
@click.option("--limit", default=200, show_default=True, type=Whole(), help="Images of a folder.")
@click.option(
    "--bands",
    type=Numbers(values.whole),
    help="Of a sensor: the bands to be seen, from 1, as 4,3,2 or one; default: its colours.",
)
@on_one_process
def attention(
    judged: BackboneOptions, images: tuple[str, ...], pca: bool, xca: bool, **how: Any
) -> None:
    """Draw what a backbone attends to: one overlay an image, and one sheet.

    IMAGES are image files, folders of images and videos. The sheet shows every head of one image,
    or all images side by side; --all writes each map to a file of its own.
    """
    if how["out"] is None:
        if not Path(judged.weights).is_dir():
            raise UsageError("--out FOLDER is needed where WEIGHTS is no run")
        how["out"] = Path(judged.weights) / "attention"
    _check_mass(how["mass"])
    fps = how["fps"]
    if fps is not None and not 0.001 <= fps <= 1000:
        raise UsageError(f"--fps must be above 0 and at most 1000, got {fps:g}")
    if pca and xca:
        raise UsageError("--pca and --xca are two kinds of pictures: give one of them")
    if how["foreground"] and not pca:
        raise UsageError("--foreground goes with --pca")
    if (pca or xca) and (how["layer"] or how["head"]):
        raise UsageError("--layer and --head choose class attention; --pca and --xca have none")
    judged.there()
    places.check_files("image, folder or video", *images)
    from xdino_launch.evaluation import components, drawing

    backbone = judged.backbone()
    draw = drawing.draw_attention
    if pca:
        draw = components.draw_components
    elif xca:
        draw = drawing.draw_channels
    for path in draw(backbone, images, drawing.Options(**how)):
        click.echo(str(path))


def _void(ignore: str | None) -> int | str | None:
    if ignore in (None, "none"):
        return ignore
    with contextlib.suppress(ValueError):
        if 0 <= (value := values.whole(str(ignore))) <= 255:
            return value
    raise UsageError(f'--ignore takes a value from 0 to 255 or "none", got {values.shown(ignore)}')


@click.command("segment-score")
@takes(judged=BackboneOptions, output=OutputOptions)
@click.option("--data", required=True, type=Place(), help="Folder with images/ and masks/.")
@shorter_side_option(help=SIZE)
@mass_option
@click.option("--layer", type=Whole(1, 1000), help="Layer of an XCiT, block of a ViT.")
@click.option("--ignore", help='Value of masks that is void, or "none"; default: 255 in palettes.')
@click.option(
    "--details", type=Place(Path, file=True), help="Each image's Jaccard indices, as JSON."
)
@on_one_process
def segment_score(
    judged: BackboneOptions,
    output: OutputOptions,
    data: str,
    size: int | None,
    mass: float,
    layer: int | None,
    ignore: str | None,
    details: Path | None,
) -> None:
    """Score attention masks against masks of objects: Jaccard index, per head and best head.

    DATA holds images/NAME.* and masks/NAME.* of the same sizes; what is not 0 in a mask is object,
    255 in a palette PNG (PASCAL VOC) is left out.
    """
    _check_mass(mass)
    void = _void(ignore)
    judged.there(folders=[data])
    from xdino_eval.attention import segmentation
    from xdino_launch.console import counter, stderr_console

    segmentation.find_pairs(data)  # before the network is read
    backbone = judged.backbone()
    layers = None if layer is None else [layer]
    tell = counter(stderr_console(), "images")
    rows, scores = segmentation.evaluate(backbone, data, mass, size, layers, void, tell)
    if details:
        segmentation.save_details(details, scores)
    output.tell(judged.signed(rows, backbone), judged.weights)
