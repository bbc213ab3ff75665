"""`xdino score`, `xdino predict` and `xdino transfer`: of classifiers, segmenters and detectors."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from xdino import values
from xdino.errors import UsageError
from xdino.runtime import places
from xdino_launch.commands.options import (
    LIMIT,
    PIXELS,
    BackboneOptions,
    Number,
    Numbers,
    OutputOptions,
    Place,
    Whole,
    batch_option,
    device_option,
    given,
    on_all_processes,
    on_one_process,
    option,
    precision_option,
    takes,
    workers_option,
)

if TYPE_CHECKING:
    from xdino_launch.evaluation.classifiers import Judged
    from xdino_transfer.classification.predicting import Prediction

SCORED = (
    "Folder with train/ and val/ (or test/), or of class folders; tars; the archives of CIFAR-10, "
    "CIFAR-100, Flowers-102, Stanford Cars, iNaturalist; a named source. Of a segmenter images/ and "
    "masks/, ADE20K or VOC; of a detector COCO's layout, JSON beside images, VOC, or a JSON file and "
    "--images."
)
RATIO = (
    "Side of the crop as a share of the resized shorter side: 1 is the published full crop, 0.875 is "
    "256/224.  [1; of a timm network what timm says]"
)


# Parameters that mean nothing to networks of another kind.
OF_CLASSIFIERS = (
    "size", "crop_ratio", "full_crop", "max_bad_share", "batch_size", "max_pixels", "workers",
    "precision", "category", "top",
)  # fmt: skip
OF_SEGMENTERS = ("scales", "flip", "zero_is_void")
OF_DETECTORS = ("threshold", "images_of")
OF_DENSE = (*OF_SEGMENTERS, *OF_DETECTORS, "shorter_side", "memory", "tile", "submission")


@dataclass(frozen=True)
class ClassifierOptions:
    """Whose classifier, how images are shown to it, and where it runs."""

    weights: str = given(click.argument("weights", metavar="RUN|FILE", type=Place()))
    arch: str | None = option("--arch", help="Architecture, where the file does not say.")
    size: int | None = option(
        "--size", type=PIXELS, help="Side of the square that the network sees, in pixels."
    )
    crop_ratio: float | None = option("--crop-ratio", type=Number(0, 1, min_open=True), help=RATIO)
    full_crop: bool = option("--full-crop", is_flag=True, help="As --crop-ratio 1.")
    max_bad_share: float = option(
        "--max-bad-share",
        type=Number(0, 1),
        default=0.05,
        show_default=True,
        help="Of the images may be unreadable; they are skipped and named.",
    )
    batch_size: int = given(batch_option())
    max_pixels: int | None = option("--max-pixels", type=Whole(1, 2**40), help=LIMIT)
    workers: int = given(workers_option())
    precision: str = given(precision_option())
    device: str = given(device_option())

    def there(self, *data: str) -> None:
        """Look for what was named before torch is imported.

        Raises:
            UsageError: nothing is there, or the crop is asked for in two ways.
        """
        if self.full_crop and self.crop_ratio not in (None, 1.0):
            raise UsageError(
                f"--full-crop is --crop-ratio 1, and --crop-ratio is {self.crop_ratio:g}"
            )
        places.check_weights(self.weights)
        places.check_data(*data)

    def open(self) -> "Judged":
        """Raises UsageError and RunFailed as `Judged.open`."""
        from xdino_launch.evaluation.classifiers import Judged

        told = asdict(self)
        if told.pop("full_crop"):
            told["crop_ratio"] = 1.0
        return Judged.open(**told)


@dataclass(frozen=True)
class ShowingOptions:
    """How annotated pictures are shown."""

    scales: tuple[float, ...] = option(
        "--scales",
        type=Numbers(values.number, above=0, what="scales"),
        default="1",
        show_default=True,
        help="Of a segmenter: views of these sizes are averaged, published 0.5,0.75,1,1.25,1.5,1.75.",
    )
    flip: bool = option("--flip", is_flag=True, help="Of a segmenter: and mirrored ones.")
    shorter_side: int | None = option(
        "--shorter-side",
        type=PIXELS,
        help="Of a segmenter or detector: pixels as the network sees it.  [as it was trained]",
    )
    zero_is_void: bool = option(
        "--zero-is-void", is_flag=True, help="Of images/ and masks/: labels begin at 1."
    )
    submission: str | None = option(
        "--submission",
        type=Place(),
        help="What a benchmark's server takes: COCO's FILE.json; of a segmenter masks, a folder or "
        "FILE.zip.",
    )


@dataclass(frozen=True)
class LookingOptions:
    """How pictures are looked at."""

    threshold: float = option(
        "--threshold",
        type=Number(0, 1),
        default=0.5,
        show_default=True,
        help="Of a detector: the least score of an object.",
    )
    shorter_side: int | None = option(
        "--shorter-side",
        type=PIXELS,
        help="Pixels as the network sees it.  [its own, and not less than in a test]",
    )
    memory: float | None = option(
        "--memory",
        type=Number(0, 1e6, min_open=True),
        help="GB that a picture may take; a larger one is cut into tiles.  [half of what is free]",
    )
    tile: int | None = option(
        "--tile", type=Whole(128, 2**16), help="Pixels a side of tiles.  [whole pictures]"
    )


def _given(*names: str) -> str | None:
    """The first of these parameters that a person typed, as an option."""
    context = click.get_current_context()
    for parameter in context.command.params:
        typed = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if typed and parameter.name in names:
            return parameter.opts[0]
    return None


def _task(weights: str) -> str | None:
    """ "segmentation" or "detection" where a run or a file is for that, by what it says; else None.

    Raises:
        UsageError: an option was given that means nothing to such a network.
    """
    from xdino_transfer.dense_files import dense_task

    task = dense_task(weights)
    if task is None and (name := _given(*OF_DENSE)):
        raise UsageError(f"{name} is of segmenters and detectors, and {weights} holds neither")
    if task is not None:
        segments = task == "segmentation"
        kind = "a segmenter" if segments else "a detector"
        other = (OF_DETECTORS, "detectors") if segments else (OF_SEGMENTERS, "segmenters")
        for names, whose in ((OF_CLASSIFIERS, "classifiers"), other):
            if name := _given(*names):
                raise UsageError(f"{name} is of {whose}, and {weights} holds {kind}")
    return task


@click.command()
@takes(judged=ClassifierOptions, showing=ShowingOptions, output=OutputOptions)
@click.option("--data", required=True, type=Place(), help=SCORED)
@click.option(
    "--images",
    "images_of",
    type=Place(),
    help="Of a detector, where DATA is a JSON file of COCO's kind: the folder of its pictures.",
)
@click.option(
    "--split",
    type=click.Choice(["val", "train", "test", "test-dev"]),
    default="val",
    show_default=True,
    help="Of DATA; test and COCO's test-dev of segmenters and detectors, with --submission.",
)
@click.option("--category", default="name", show_default=True, help="Of iNaturalist: the rank.")
@on_all_processes
def score(
    judged: ClassifierOptions,
    showing: ShowingOptions,
    output: OutputOptions,
    data: str,
    images_of: str | None,
    split: str,
    category: str,
) -> None:
    """What a network with a head is worth on annotated images, in the published evaluation.

    RUN|FILE is a run that learned with labels, a file of ours, or a published XCiT file: of
    classification (top-1 and top-5), segmentation (mIoU, mAcc, aAcc) or detection (AP of boxes and
    masks); or a classifier of timm's (a file with --arch, or a folder with config.json). Classes are
    matched by name where the file names them, else in the order of the data's; published classifiers
    by ImageNet's synsets. The row says which. Under torchrun every process looks at its share of the
    images.
    """
    judged.there(data)
    from xdino.runtime import distributed, turns

    if (task := _task(judged.weights)) is not None:
        from xdino_launch.evaluation import dense

        dense.check_submission(showing.submission, task)
        loaded = turns.all_hear(
            lambda: dense.opened(judged.weights, judged.arch, judged.device),
            distributed.world_size() > 1,
        )
        found = dense.score(loaded, data, split=split, images=images_of, **asdict(showing))
        if found.row is not None:
            output.tell([found.row], judged.weights)
            dense.keep_per_class(found, output.file(judged.weights))
        dense.tell_submission(showing.submission)
        return
    if split.startswith("test"):
        raise UsageError(
            f"--split {split} is of segmenters and detectors, and {judged.weights} holds neither"
        )
    opened = judged.open().on_all()
    from xdino_launch.evaluation.dense import refuse_annotated
    from xdino_transfer.datasets import open_scored

    refuse_annotated(judged.weights, data)
    limit = {} if judged.max_pixels is None else {"max_pixels": judged.max_pixels}
    source, train_size = open_scored(data, split, opened.channels, category, **limit)
    output.tell(opened.score(source, train_size), judged.weights)


@click.command()
@takes(judged=ClassifierOptions, looking=LookingOptions)
@click.argument("images", nargs=-1, required=True, type=Place())
@click.option(
    "--out",
    type=Place(Path),
    help="FILE.csv, FILE.json, or a folder for both; of pictures and masks a folder.  [a table]",
)
@click.option("--top", default=5, show_default=True, type=Whole(1, 100_000), help="Classes.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@on_one_process
def predict(
    judged: ClassifierOptions,
    looking: LookingOptions,
    images: tuple[str, ...],
    out: Path | None,
    top: int,
    as_json: bool,
) -> None:
    """The likeliest classes of images; classes of pixels, and objects, as pictures and files.

    IMAGES are image files, folders of images and videos (every frame of them); for a classifier lists
    and tars, too. Of a segmenter or a detector --out DIR gets an overlay of every image, class
    numbers as masks/*.png, and predictions.json (of a detector COCO's). They look at a whole image in
    its own pixels, and at tiles where it would take more than --memory.
    """
    judged.there()
    named = [name for name in images if name.partition(":")[0] not in places.DATA_SETS]
    places.check_files("image, folder or video", *named)
    if (task := _task(judged.weights)) is not None:
        _predict_dense(judged, images, looking, out, as_json, task == "segmentation")
        return
    _predict_classes(judged, images, out, top, as_json)


def _predict_dense(
    judged: ClassifierOptions,
    images: tuple[str, ...],
    looking: LookingOptions,
    out: Path | None,
    as_json: bool,
    segments: bool,
) -> None:
    if out is None and not as_json:
        made = "masks and overlays" if segments else "overlays and a COCO file"
        raise UsageError(f"--out DIR is needed for {made}; --json prints without them")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    from xdino_eval.results import as_json as text
    from xdino_launch.evaluation import dense

    loaded = dense.opened(judged.weights, judged.arch, judged.device)
    tree, paths = dense.predict(loaded, images, dense.Looking(out, **asdict(looking)))
    lines = [text(tree).rstrip("\n")] if as_json else dense.shown_paths(paths)
    for line in lines:
        click.echo(line)


def _predict_classes(
    judged: ClassifierOptions,
    images: tuple[str, ...],
    out: Path | None,
    top: int,
    as_json: bool,
) -> None:
    from xdino_transfer.classification import predicting

    folder = out is not None and (out.is_dir() or not out.suffix)
    if out is not None and not folder:
        predicting.check_suffix(out)
    opened = judged.open()
    found = opened.predict(images, top)
    if as_json:
        from xdino_eval.results import as_json as text

        click.echo(text([prediction.plain() for prediction in found]), nl=False)
    if out is not None:
        paths = [out / f"predictions{s}" for s in predicting.SUFFIXES] if folder else [out]
        for path in paths:
            predicting.write(path, found)
            if not as_json:
                click.echo(str(path))
        _summarise(found)
    elif not as_json:
        _print_table(found)


@click.command()
@takes(judged=BackboneOptions)
@click.option(
    "--suite", required=True, type=Place(Path, file=True), help="YAML: data sets, and columns."
)
@click.option(
    "--run",
    "--run-dir",
    "run_dir",
    type=Place(Path),
    help="Folder of the results.  [transfer in a run's own; FILE-transfer here]",
)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@batch_option()
@workers_option()
@precision_option()
@on_one_process
def transfer(
    judged: BackboneOptions, suite: Path, run_dir: Path | None, as_json: bool, **how: Any
) -> None:
    """What weights are worth on many data sets: one table, results.json and report.html.

    The suite names data sets below data: (NAME: FOLDER), and has a section for each column: knn: and
    linear: of frozen features, finetune: and scratch: for networks that learn as many steps. One that
    was stopped goes on where it was; one that has grown does what is new.
    """
    judged.there()
    if not suite.is_file():
        raise UsageError(f"there is no suite file {suite}")
    if judged.role != "teacher":
        raise UsageError("a suite is of a teacher's weights: leave out --role")
    import json

    from xdino.runtime.device import resolve_device
    from xdino_launch.console import stdout_console
    from xdino_launch.evaluation.subject import options_for
    from xdino_launch.evaluation.transferring import table
    from xdino_launch.evaluation.transferring import transfer as go

    if run_dir is None:
        weights = Path(judged.weights)
        run_dir = weights / "transfer" if weights.is_dir() else Path(f"{weights.stem}-transfer")
    options = options_for(resolve_device(judged.device), **how)
    rows = go(judged.backbone(), judged.weights, suite, run_dir, options, judged.arch)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    stdout_console().print(table(rows))
    click.echo(f"top-1 in per cent; protocols and settings: {run_dir / 'report.html'}")


def _print_table(found: "Sequence[Prediction]") -> None:
    """A line for each image and class, whole at 80 columns."""
    from rich.table import Table

    from xdino_launch.console import stdout_console

    table = Table(header_style="bold", pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for prediction in found:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        for rank, (name, probability) in enumerate(pairs):
            table.add_row("" if rank else prediction.image, name, f"{probability:.4f}")
    stdout_console().print(table)
    sys.stdout.flush()


def _summarise(found: "Sequence[Prediction]") -> None:
    """What came out, on standard error."""
    from xdino_launch.console import stderr_console

    likeliest = Counter(prediction.classes[0] for prediction in found).most_common()
    told = ", ".join(f"{name} {count:,}" for name, count in likeliest[:5])
    more = f" and {len(likeliest) - 5:,} other classes" if len(likeliest) > 5 else ""
    count = "1 image" if len(found) == 1 else f"{len(found):,} images"
    stderr_console().print(f"{count}: {told}{more}", soft_wrap=True)
