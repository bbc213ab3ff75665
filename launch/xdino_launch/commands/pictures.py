"""`xdino attention` and `xdino segment-score`."""

import contextlib

import click

from xdino import values
from xdino.errors import UsageError
from xdino_launch.commands.options import (
    PIXELS,
    Number,
    Place,
    Whole,
    device_option,
    finish,
    on_one_process,
)

MASS = Number()
FPS = Number()


def _mass(value: float) -> float:
    if not 0 < value <= 1:
        raise UsageError(f"--mass must be above 0 and at most 1, got {value:g}")
    return value


@click.command()
@click.argument("weights", type=Place())
@click.argument("images", nargs=-1, required=True, type=Place())
@click.option("--out", required=True, type=Place(), help="Folder for the pictures.")
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
@click.option("--size", type=PIXELS, help="Shorter side in pixels.")
@click.option("--mass", default=0.6, show_default=True, type=MASS, help="Share held by the mask.")
@click.option(
    "--layer",
    type=Whole(1, 1000),
    help="Class-attention layer of an XCiT (default: all), block of a ViT (default: the last).",
)
@click.option("--head", type=Whole(1, 100_000), help="This head; default: each, and their mean.")
@click.option("--fps", type=FPS, help="A folder is a video of so many frames a second.")
@click.option("--pca", is_flag=True, help="Patch tokens as colours, by principal components.")
@click.option("--foreground", is_flag=True, help="With --pca: of objects alone, found by it.")
@click.option("--xca", is_flag=True, help="XCA's channel-by-channel matrices.")
@device_option()
@on_one_process
def attention(
    weights: str,
    images: tuple[str, ...],
    out: str,
    arch: str | None,
    role: str,
    size: int | None,
    mass: float,
    layer: int | None,
    head: int | None,
    fps: float | None,
    pca: bool,
    foreground: bool,
    xca: bool,
    device: str,
) -> None:
    """Draw what a backbone attends to: heads, mean, overlay, mask.

    IMAGES are image files, folders of images (with a sheet of all of them) and videos.
    """
    _mass(mass)
    if fps is not None and not 0.001 <= fps <= 1000:
        raise UsageError(f"--fps must be above 0 and at most 1000, got {fps:g}")
    if pca and xca:
        raise UsageError("--pca and --xca are two kinds of pictures: give one of them")
    if foreground and not pca:
        raise UsageError("--foreground goes with --pca")
    if (pca or xca) and (layer or head):
        raise UsageError("--layer and --head choose class attention; --pca and --xca have none")
    from pathlib import Path

    from xdino_launch.evaluation import drawing

    backbone = drawing.open_backbone(weights, arch, role, device)
    options = drawing.Options(Path(out), size, mass, layer, head, fps, foreground)
    draw = drawing.draw_attention
    if pca:
        draw = drawing.draw_components
    elif xca:
        draw = drawing.draw_channels
    for path in draw(backbone, images, options):
        click.echo(str(path))


def _void(ignore: str | None) -> int | str | None:
    if ignore in (None, "none"):
        return ignore
    with contextlib.suppress(ValueError):
        if 0 <= (value := values.whole(str(ignore))) <= 255:
            return value
    raise UsageError(f'--ignore takes a value from 0 to 255 or "none", got {values.shown(ignore)}')


@click.command("segment-score")
@click.argument("weights", type=Place())
@click.option("--data", required=True, type=Place(), help="Folder with images/ and masks/.")
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--size", type=PIXELS, help="Shorter side in pixels.")
@click.option("--mass", default=0.6, show_default=True, type=MASS, help="Share held by the mask.")
@click.option("--layer", type=Whole(1, 1000), help="Layer of an XCiT, block of a ViT.")
@click.option("--ignore", help='Value of masks that is void, or "none"; default: 255 in palettes.')
@device_option()
@click.option("--details", type=Place(file=True), help="Each image's Jaccard indices, as JSON.")
@click.option("--out", type=Place(file=True), help="Append to this results.json.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
@on_one_process
def segment_score(
    weights: str,
    data: str,
    arch: str | None,
    role: str,
    size: int | None,
    mass: float,
    layer: int | None,
    ignore: str | None,
    device: str,
    details: str | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Score attention masks against masks of objects: Jaccard index, per head and best head.

    DATA holds images/NAME.* and masks/NAME.* of the same sizes; what is not 0 in a mask is object,
    255 in a palette PNG (PASCAL VOC) is left out.
    """
    _mass(mass)
    void = _void(ignore)
    from pathlib import Path

    from xdino_eval import results
    from xdino_eval.attention import segmentation
    from xdino_launch.console import counter, stderr_console
    from xdino_launch.evaluation import drawing

    segmentation.find_pairs(data)  # before the network is read
    backbone = drawing.open_backbone(weights, arch, role, device)
    layers = None if layer is None else [layer]
    tell = counter(stderr_console(), "images")
    rows, scores = segmentation.evaluate(backbone, data, mass, size, layers, void, tell)
    rows = results.signed(rows, backbone.origin.sha256, backbone.origin.name)
    if details:
        segmentation.save_details(Path(details), scores)
    finish(rows, weights, out, as_json)
