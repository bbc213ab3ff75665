"""What `xdino score` and `xdino predict` take and do for segmenters and detectors."""

from dataclasses import asdict, dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from xdino import values
from xdino.errors import UsageError
from xdino_launch.commands.options import (
    PIXELS,
    Number,
    Numbers,
    OutputOptions,
    Whole,
    option,
)

OF_CLASSIFIERS = (
    "size", "crop_ratio", "full_crop", "max_bad_share", "batch_size", "max_pixels", "workers",
    "precision", "category", "top",
)  # fmt: skip
OF_DENSE = ("scales", "flip", "shorter_side", "zero_is_void", "threshold", "memory", "tile")


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


def holds(weights: str) -> str | None:
    """ "segmentation" or "detection" where a run or a file is for that, by what it says; else None."""
    from xdino_transfer.dense_files import dense_task

    return dense_task(weights)


def _given(names: tuple[str, ...]) -> str | None:
    """The first of these parameters that a person typed, as an option."""
    context = click.get_current_context()
    for parameter in context.command.params:
        typed = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if typed and parameter.name in names:
            return parameter.opts[0]
    return None


def refuse_of_classifiers(weights: str) -> None:
    """Raises UsageError for an option that means nothing to a segmenter or a detector."""
    if (name := _given(OF_CLASSIFIERS)) is not None:
        kind = "a segmenter" if holds(weights) == "segmentation" else "a detector"
        raise UsageError(f"{name} is of classifiers, and {weights} holds {kind}")


def refuse_of_dense(weights: str) -> None:
    """Raises UsageError for an option that means nothing to a classifier."""
    if (name := _given(OF_DENSE)) is not None:
        raise UsageError(f"{name} is of segmenters and detectors, and {weights} holds neither")


def refuse_annotated(weights: str, data: str) -> None:
    """Raises UsageError where a classifier is asked about pictures with masks, or with objects.

    Their folders would be taken for classes.
    """
    folder = Path(data).expanduser()
    ade = folder / "ADEChallengeData2016"
    pairs = [(folder / "masks", folder / "images"), (ade / "annotations", ade / "images")]
    masked = any(one.is_dir() and other.is_dir() for one, other in pairs)
    if masked or (folder / "SegmentationClass").is_dir():
        raise UsageError(f"{data} holds pictures with masks, and {weights} is a classifier")
    if any((folder / "annotations").glob("instances_*.json")) or (folder / "Annotations").is_dir():
        raise UsageError(f"{data} holds annotated objects, and {weights} is a classifier")


def score_dense(
    weights: str,
    arch: str | None,
    device: str,
    data: str,
    split: str,
    showing: ShowingOptions,
    output: OutputOptions,
) -> None:
    """A row, and per_class.csv beside the file that it goes to."""
    from xdino_launch.evaluation import dense
    from xdino_launch.evaluation.inputs import say
    from xdino_transfer.judging.dense import PER_CLASS_FILE, write_per_class

    if holds(weights) == "detection":
        for name in ("scales", "flip", "zero_is_void"):
            if (given := _given((name,))) is not None:
                raise UsageError(f"{given} is of segmenters, and {weights} holds a detector")
    loaded = dense.opened(weights, arch, device)
    found = dense.score(loaded, data, split=split, **asdict(showing))
    output.tell([found.row], weights)
    target = output.file(weights)
    if target is not None:
        path = target.parent / PER_CLASS_FILE
        write_per_class(path, found.per_class)
        say(f"per class: {path}")


def predict_dense(
    weights: str,
    arch: str | None,
    device: str,
    images: tuple[str, ...],
    looking: LookingOptions,
    out: Path | None,
    as_json: bool,
) -> None:
    """Pictures, masks and predictions.json in a folder; the JSON on standard output if wanted."""
    task = holds(weights)
    if out is None and not as_json:
        made = "masks and overlays" if task == "segmentation" else "overlays and a COCO file"
        raise UsageError(f"--out DIR is needed for {made}; --json prints without them")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    if task == "segmentation" and (given := _given(("threshold",))) is not None:
        raise UsageError(f"{given} is of detectors, and {weights} holds a segmenter")
    from xdino_eval.results import as_json as text
    from xdino_launch.evaluation import dense

    loaded = dense.opened(weights, arch, device)
    tree, paths = dense.predict(loaded, images, dense.Looking(out, **asdict(looking)))
    if as_json:
        click.echo(text(tree), nl=False)
    else:
        for line in dense.shown_paths(paths):
            click.echo(line)
