"""`xdino knn` and `xdino patch-probe`."""

from typing import TYPE_CHECKING, Any

import click

from xdino import values
from xdino.errors import UsageError
from xdino_launch.commands.options import (
    SEED,
    BackboneOptions,
    Numbers,
    OutputOptions,
    Place,
    SubjectOptions,
    Whole,
    on_one_process,
    shorter_side_option,
    takes,
)

if TYPE_CHECKING:
    from xdino_eval.knn import Draws
    from xdino_eval.results import Row
    from xdino_launch.evaluation.subject import Subject


@click.command()
@takes(judged=SubjectOptions, output=OutputOptions)
@click.option(
    "--k",
    "ks",
    default="10,20,100,200",
    show_default=True,
    type=Numbers(values.whole, least=1, what="numbers of neighbours"),
    help="Neighbours.",
)
@click.option(
    "--temperature",
    default="0.07",
    show_default=True,
    type=Numbers(above=0),
    help="One or several, with --k.",
)
@click.option(
    "--leave-one-out",
    is_flag=True,
    help="Judge every image of train/, or of one folder of class folders, by the others.",
)
@click.option(
    "--shots",
    type=Numbers(values.whole, least=1, what="numbers of images"),
    help="Banks of so many images a class, e.g. 1,5,10: means over draws.",
)
@click.option("--repeats", default=5, show_default=True, type=Whole(1, 10_000), help="Of --shots.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of --shots.")
@click.option(
    "--search",
    default="auto",
    show_default=True,
    help="faiss (CPU) and torch (--device) are exact and give the same numbers; ivf and "
    "hnsw find most neighbours of a very large bank, and the row says how many; auto is exact.",
)
@click.option(
    "--bank-block",
    type=Whole(-(2**31)),
    help="Keep the features on disk (--cache, else a temporary folder) and so many rows in memory.",
)
def knn(
    judged: SubjectOptions,
    output: OutputOptions,
    ks: tuple[int, ...],
    temperature: tuple[float, ...],
    leave_one_out: bool,
    shots: tuple[int, ...] | None,
    repeats: int,
    seed: int,
    search: str,
    bank_block: int | None,
) -> None:
    """Weighted k-NN of the frozen features: train/ votes on val/.

    A row for every k and temperature. Under torchrun every process extracts and searches its
    share, and the numbers are those of one process.
    """
    if shots and leave_one_out:
        raise UsageError(
            "--shots draws from train/ and is judged on val/: not with --leave-one-out"
        )
    judged.there(judged.data)
    from xdino.runtime import distributed
    from xdino.runtime.device import resolve_device
    from xdino_eval.knn import Draws, SearchOptions
    from xdino_launch.evaluation.subject import open_one_split

    device = resolve_device(judged.device)
    how = {
        "ks": ks,
        "temperature": temperature,
        "options": SearchOptions.from_name(search, device, bank_block),
    }
    draws = Draws(shots, repeats, seed) if shots else None
    joined = distributed.start(device)
    try:
        subject = distributed.together(
            lambda: judged.open(splits=open_one_split if leave_one_out else None)
        )
        distributed.together(subject.check_alike)
        rows = _score(subject, how, leave_one_out, draws)

        def tell() -> None:
            if distributed.rank() == 0:
                output.tell(rows, judged.weights)

        distributed.together(tell)
    finally:
        if joined:
            distributed.stop()


def _score(
    subject: "Subject", how: dict[str, Any], leave_one_out: bool, draws: "Draws | None"
) -> "list[Row]":
    """Signed rows, by the shares of all processes: what a protocol refuses, it refuses on each.

    Args:
        how: arguments of every protocol. draws: of few-shot, None = another protocol.
    """
    from xdino.runtime import distributed
    from xdino_eval import knn
    from xdino_eval.knn.sharding import folder_for

    how = how | {"shared": distributed.world_size() > 1}
    block = how["options"].bank_block
    classes = subject.train.classes
    with folder_for(subject.options.cache, block is not None) as folder:
        subject = subject.keeping_features(folder)
        train = subject.share("train", subject.train, block)
        if leave_one_out:
            return subject.sign(knn.leave_one_out(train, **how, classes=classes))
        val = subject.share("val", subject.val, block)
        if draws:
            return subject.sign(knn.few_shot(train, val, draws, **how, classes=classes))
        return subject.sign(knn.evaluate(train, val, **how))


@click.command()
@takes(judged=BackboneOptions, output=OutputOptions)
@click.option("--data", required=True, type=Place(), help="Folder of pictures with masks.")
@click.option(
    "--protocol",
    default="knn",
    show_default=True,
    type=click.Choice(["knn", "linear"]),
    help="Patches vote, or a linear map is fitted to them.",
)
@shorter_side_option()
@click.option(
    "--bank",
    default=200_000,
    show_default=True,
    type=Whole(1, 2**28),
    help="Patches that are learned from at most, as many of each picture.",
)
@click.option(
    "--shots",
    type=Numbers(values.whole, least=1, what="numbers of pictures"),
    help="Learn from so many pictures, e.g. 1,5,10: means over draws.",
)
@click.option("--draws", default=10, show_default=True, type=Whole(1, 10_000), help="Of --shots.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of --shots and --bank.")
@click.option("--zero-is-void", is_flag=True, help="Labels begin at 1, and 0 is none.")
@on_one_process
def patch_probe(
    judged: BackboneOptions,
    output: OutputOptions,
    data: str,
    protocol: str,
    size: int | None,
    bank: int,
    shots: tuple[int, ...] | None,
    draws: int,
    seed: int,
    zero_is_void: bool,
) -> None:
    """Segmentation by frozen patches: those of train/ answer for those of val/. mIoU.

    \b
    --data FOLDER holds one of
      FOLDER/images/{train,val}/, FOLDER/masks/{train,val}/, FOLDER/classes.txt
      FOLDER/ADEChallengeData2016/{images,annotations}/{training,validation}/
      FOLDER/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets}/
    A mask has one number a pixel, gray or by a palette; 255 is void.
    """
    judged.there(folders=[data])
    from xdino_launch.console import counter, stderr_console
    from xdino_transfer.segmentation.maps import open_maps
    from xdino_transfer.segmentation.patch_probe import METHODS, PatchProbe

    train, val = open_maps(data, zero_is_void)
    for notice in (*train.notices, *val.notices):
        click.echo(notice, err=True)
    backbone = judged.backbone()
    progress = counter(stderr_console(), "pictures")
    rows = []
    for number in shots or (None,):
        repeats = draws if number else 1
        probe = PatchProbe(METHODS[protocol](), size, bank, number, repeats, seed, progress)
        rows += probe(backbone, train, val)
    output.tell(rows, judged.weights)
