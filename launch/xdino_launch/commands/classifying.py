"""`xdino score`, `xdino predict` and `xdino transfer`."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino.errors import UsageError
from xdino.runtime import places
from xdino_launch.commands.options import (
    LIMIT,
    PIXELS,
    BackboneOptions,
    Number,
    OutputOptions,
    Place,
    Whole,
    batch_option,
    device_option,
    given,
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
    "CIFAR-100, Flowers-102, Stanford Cars, iNaturalist; a named source."
)
RATIO = (
    "Side of the crop as a share of the resized shorter side: 1 is the published full crop, 0.875 is "
    "256/224.  [1; of a timm network what timm says]"
)


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


@click.command()
@takes(judged=ClassifierOptions, output=OutputOptions)
@click.option("--data", required=True, type=Place(), help=SCORED)
@click.option(
    "--split",
    type=click.Choice(["val", "train"]),
    default="val",
    show_default=True,
    help="Of DATA.",
)
@click.option("--category", default="name", show_default=True, help="Of iNaturalist: the rank.")
@on_one_process
def score(
    judged: ClassifierOptions, output: OutputOptions, data: str, split: str, category: str
) -> None:
    """Top-1 and top-5 of a classifier, in the published evaluation.

    RUN|FILE is a fine-tuned run, a file of ours, a published XCiT classification file, or a classifier
    of timm's (a file with --arch, or a folder with config.json). Classes are matched by name where the
    file names them; published files name none, and are matched by ImageNet's synsets, else in the
    order of the data's. The row says which.
    """
    judged.there(data)
    opened = judged.open()
    from xdino_transfer.datasets import open_scored

    limit = {} if judged.max_pixels is None else {"max_pixels": judged.max_pixels}
    source, train_size = open_scored(data, split, opened.channels, category, **limit)
    output.tell(opened.score(source, train_size), judged.weights)


@click.command()
@takes(judged=ClassifierOptions)
@click.argument("images", nargs=-1, required=True, type=Place())
@click.option(
    "--out", type=Place(Path), help="FILE.csv, FILE.json, or a folder for both.  [a table]"
)
@click.option("--top", default=5, show_default=True, type=Whole(1, 100_000), help="Classes.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@on_one_process
def predict(
    judged: ClassifierOptions, images: tuple[str, ...], out: Path | None, top: int, as_json: bool
) -> None:
    """The likeliest classes of images, with their probabilities.

    IMAGES are image files, folders of images, lists, tars and videos (every frame of them).
    """
    judged.there()
    named = [name for name in images if name.partition(":")[0] not in places.DATA_SETS]
    places.check_files("image, folder or video", *named)
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
