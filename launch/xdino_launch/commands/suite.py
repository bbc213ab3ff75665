"""`xdino retrieval`, `xdino copydetection` and `xdino davis`: the rest of DINO's evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino_launch.commands.options import (
    PIXELS,
    BackboneOptions,
    Number,
    OutputOptions,
    Place,
    Renamed,
    Whole,
    batch_option,
    given,
    on_one_process,
    option,
    precision_option,
    results_option,
    shorter_side_option,
    takes,
    workers_option,
)

if TYPE_CHECKING:
    from xdino.backbone import Backbone
    from xdino_eval.results import Row


@dataclass(frozen=True)
class Judgement(BackboneOptions):
    """What these commands judge, and how: the options that all of them take."""

    precision: str = given(precision_option())
    as_json: bool = option("--json", "as_json", is_flag=True, help="JSON on standard output.")

    def tell(self, row: "Row", backbone: "Backbone", out: str | None) -> None:
        """A row, signed, to where rows go."""
        OutputOptions(out, self.as_json).tell(self.signed([row], backbone), self.weights)


SIDE = "Side of the square that the network sees, in pixels."


def progress(verb: str) -> Any:
    from xdino_launch.console import counter, stderr_console

    return counter(stderr_console(), verb)


@click.command()
@takes(judgement=Judgement)
@click.option("--data", required=True, type=Place(), help="Folder that holds the sets.")
@click.option("--dataset", default="roxford5k", show_default=True, help="roxford5k or rparis6k.")
@click.option(
    "--longer-side",
    "--size",
    "size",
    cls=Renamed,
    default=224,
    show_default=True,
    type=PIXELS,
    help="Longer side of the image, in pixels.",
)
@click.option("--multiscale", is_flag=True, help="Average scales 1, 1/sqrt2 and 1/2.")
@click.option("--crop-queries", is_flag=True, help="Query boxes alone, as the benchmark has it.")
@workers_option()
@results_option()
@on_one_process
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
    judgement.there(folders=[data])
    from xdino_eval.suite.retrieval import evaluate_retrieval, open_benchmark

    benchmark = open_benchmark(data, dataset)
    backbone = judgement.backbone()
    row = evaluate_retrieval(
        backbone, benchmark, size, multiscale, crop_queries, workers, judgement.precision,
        progress("descriptors"),
    )  # fmt: skip
    judgement.tell(row, backbone, out)


@click.command()
@takes(judgement=Judgement)
@click.option("--data", required=True, type=Place(), help="Copydays folder.")
@click.option("--distractors", type=Place(Path), help="Images among the originals.")
@click.option("--whitening", type=Place(Path), help="Images to learn whitening on.")
@click.option("--size", default=320, show_default=True, type=PIXELS, help=SIDE)
@batch_option(16)
@workers_option()
@results_option()
@on_one_process
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
    judgement.there(folders=[data, distractors, whitening])
    from xdino_eval.suite.copydetection import evaluate_copydetection, open_copydays

    copydays = open_copydays(data, distractors, whitening)
    backbone = judgement.backbone()
    row = evaluate_copydetection(
        backbone, copydays, size, batch_size, workers, judgement.precision, progress("descriptors")
    )
    judgement.tell(row, backbone, out)


@click.command()
@takes(judgement=Judgement)
@click.option("--data", required=True, type=Place(Path), help="DAVIS-2017 folder.")
@click.option("--out", required=True, type=Place(Path), help="Folder for masks.")
@click.option("--split", default="val", show_default=True, help="ImageSets/2017/SPLIT.txt")
@shorter_side_option(default=480, show_default=True, type=Whole(64, 2**13))
@click.option("--context", default=7, show_default=True, type=Whole(1, 10_000), help="Frames.")
@click.option(
    "--radius", default=12, show_default=True, type=Whole(0, 100_000), help="0: no limit."
)
@click.option(
    "--topk", default=5, show_default=True, type=Whole(1, 100_000), help="Patches voting."
)
@click.option("--temperature", default=0.1, show_default=True, type=Number(0.02, 1e6))
@click.option("--results", type=Place(file=True), help="Append to this results.json.")
@on_one_process
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
    judgement.there(folders=[data])
    from xdino_eval.suite.davis import evaluate_davis
    from xdino_eval.suite.davis_dataset import open_davis
    from xdino_eval.suite.label_propagation import Propagation

    videos = open_davis(data, split)
    backbone = judgement.backbone()
    propagation = Propagation(context, radius, topk, temperature)
    row = evaluate_davis(
        backbone, data, videos, out, propagation, size, judgement.precision, progress("frames")
    )
    judgement.tell(row, backbone, results)
