"""`xdino retrieval`, `xdino copydetection` and `xdino davis`: the rest of DINO's evaluations."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino_launch.commands.options import (
    BATCH,
    PIXELS,
    Number,
    Place,
    Whole,
    device_option,
    finish,
    on_one_process,
    workers_option,
)

if TYPE_CHECKING:
    from torch import nn

    from xdino_eval.results import Row


@dataclass(frozen=True)
class Judgement:
    """What these commands judge, and how: the options that all of them take."""

    weights: str
    arch: str | None
    role: str
    device: str
    precision: str
    as_json: bool

    def backbone(self) -> "nn.Module":
        """Frozen, where it shall run."""
        from xdino.checkpoint import load_backbone
        from xdino.runtime.device import resolve_device

        where = resolve_device(self.device)
        return load_backbone(self.weights, self.arch, self.role).to(where)

    def tell(self, row: "Row", backbone: "nn.Module", out: str | None) -> None:
        """A row, signed, to where rows go."""
        from xdino_eval.results import signed
        from xdino_launch.evaluation.subject import features_name

        facts: Any = backbone.weights
        rows = signed([row], facts["sha256"], features_name(facts))
        finish(rows, self.weights, out, self.as_json)


def judging(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Judgement`; the command gets them as its first argument."""

    @on_one_process
    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        own = {field.name: options.pop(field.name) for field in fields(Judgement)}
        command(Judgement(**own), **options)

    listed = [
        click.argument("weights", type=Place()),
        click.option("--arch", help="Architecture, where the file does not say."),
        click.option("--role", default="teacher", type=click.Choice(["teacher", "student"])),
        click.option("--json", "as_json", is_flag=True, help="JSON on standard output."),
        device_option(),
        click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"])),
    ]
    for option in reversed(listed):
        wrapped = option(wrapped)
    return wrapped


OUT = click.option("--out", type=Place(file=True), help="Append to this results.json.")


def progress(verb: str) -> Any:
    from xdino_launch.console import counter, stderr_console

    return counter(stderr_console(), verb)


@click.command()
@judging
@click.option("--data", required=True, type=Place(), help="Folder that holds the sets.")
@click.option("--dataset", default="roxford5k", show_default=True, help="roxford5k or rparis6k.")
@click.option("--size", default=224, show_default=True, type=PIXELS, help="Longer side.")
@click.option("--multiscale", is_flag=True, help="Average scales 1, 1/sqrt2 and 1/2.")
@click.option("--crop-queries", is_flag=True, help="Query boxes alone, as the benchmark has it.")
@workers_option()
@OUT
def retrieval(
    judgement: Judgement,
    data: str,
    dataset: str,
    size: int,
    multiscale: bool,
    crop_queries: bool,
    workers: int,
    out: str | None,
) -> None:
    """Image retrieval on revisited Oxford or Paris: mAP and mP@1,5,10, easy, medium and hard.

    \b
    --data FOLDER holds, as distributed:
      FOLDER/roxford5k/gnd_roxford5k.pkl    (or rparis6k/gnd_rparis6k.pkl)
      FOLDER/roxford5k/jpg/NAME.jpg         every image that it names

    DINO's published numbers show the network whole query images; the benchmark's protocol crops
    them to the query's box (--crop-queries).
    """
    from xdino_eval.suite import retrieval as room

    benchmark = room.open_benchmark(data, dataset)
    backbone = judgement.backbone()
    row = room.evaluate(
        backbone, benchmark, size, multiscale, crop_queries, workers, judgement.precision,
        progress("descriptors"),
    )  # fmt: skip
    judgement.tell(row, backbone, out)


@click.command()
@judging
@click.option("--data", required=True, type=Place(), help="Copydays folder.")
@click.option("--distractors", type=Place(Path), help="Images among the originals.")
@click.option("--whitening", type=Place(Path), help="Images to learn whitening on.")
@click.option("--size", default=320, show_default=True, type=PIXELS, help="Both sides.")
@click.option("--batch-size", default=16, type=BATCH, show_default=True)
@workers_option()
@OUT
def copydetection(
    judgement: Judgement,
    data: str,
    distractors: Path | None,
    whitening: Path | None,
    size: int,
    batch_size: int,
    workers: int,
    out: str | None,
) -> None:
    """Copy detection on Copydays: mAP of the strong copies, and of the weaker ones that are there.

    \b
    --data FOLDER holds, as distributed:
      FOLDER/original/*.jpg, FOLDER/strong/*.jpg
      FOLDER/jpegqual/75/*.jpg, FOLDER/crops/10/*.jpg, ...    may be absent
    A copy's name begins with the four characters of its original's.
    """
    from xdino_eval.suite import copydetection as room

    copydays = room.open_copydays(data)
    for folder in (distractors, whitening):
        if folder is not None:
            room.image_names(folder)
    backbone = judgement.backbone()
    row = room.evaluate(
        backbone, copydays, size, distractors, whitening, batch_size, workers, judgement.precision,
        progress("descriptors"),
    )  # fmt: skip
    judgement.tell(row, backbone, out)


@click.command()
@judging
@click.option("--data", required=True, type=Place(Path), help="DAVIS-2017 folder.")
@click.option("--out", required=True, type=Place(Path), help="Folder for masks.")
@click.option("--split", default="val", show_default=True, help="ImageSets/2017/SPLIT.txt")
@click.option("--size", default=480, show_default=True, type=Whole(64, 2**13), help="Shorter side.")
@click.option("--context", default=7, show_default=True, type=Whole(1, 10_000), help="Frames.")
@click.option(
    "--radius", default=12, show_default=True, type=Whole(0, 100_000), help="0: no limit."
)
@click.option(
    "--topk", default=5, show_default=True, type=Whole(1, 100_000), help="Patches voting."
)
@click.option("--temperature", default=0.1, show_default=True, type=Number(0.02, 1e6))
@click.option("--results", type=Place(file=True), help="Append to this results.json.")
def davis(
    judgement: Judgement,
    data: Path,
    out: Path,
    split: str,
    size: int,
    context: int,
    radius: int,
    topk: int,
    temperature: float,
    results: str | None,
) -> None:
    """Video segmentation on DAVIS-2017: the first frame's mask, carried on by frozen features.

    \b
    --data FOLDER holds, as distributed (480p):
      FOLDER/ImageSets/2017/val.txt                 names of videos
      FOLDER/JPEGImages/480p/VIDEO/00000.jpg ...    frames
      FOLDER/Annotations/480p/VIDEO/00000.png ...   masks; the first is needed, all are scored
    Masks are written to OUT/VIDEO/00000.png ... as palette PNGs of the frames' size: what the
    official scorer reads. J and F are measured as it does, where all frames are annotated.
    """
    from xdino_eval.suite import davis as room

    videos = room.open_davis(data, split)
    backbone = judgement.backbone()
    how = room.Propagation(context, radius, topk, temperature)
    row = room.evaluate(
        backbone, data, videos, out, how, size, judgement.precision, progress("frames")
    )
    judgement.tell(row, backbone, results)
