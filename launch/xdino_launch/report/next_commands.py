"""What to type after a run: commands with its own paths, quoted, to be copied."""

import contextlib
import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from xdino.data.decode import SUFFIXES
from xdino.data.files import split_folder
from xdino.data.idx import NAMES

LOOKED_AT = 2_000  # names below a folder of images, at most, to find one of them
# Where images to try a segmenter or a detector on lie: COCO, plain and ADE20K, VOC.
HELD_OUT = ("val*", "images/val*", "*/images/val*", "JPEGImages", "*/JPEGImages", "*/*/JPEGImages")
IMAGE = "IMAGE.jpg"  # where no image file of the run's own is at hand


def next_commands(
    run: Path, data: str, labelled: bool | None = None, image: str | None = None
) -> list[tuple[str, str]]:
    """(what for, command), the most telling first.

    Args:
        data: what the run was judged on, or else trained on.
        labelled: whether that has train and val with labels; None: as it looks (`has_splits`).
        image: a file to draw attention on; None: one of `data`, if it has files.
    """
    place, data = _operand(str(run)), _operand(data)
    image = _operand(image or an_image(data) or IMAGE)
    if labelled is None:
        labelled = has_splits(data)

    def inside(name: str) -> str:
        return os.path.join(place, name)

    commands = [
        (
            "a picture of what it looks at",
            ["attention", place, image, "--out", inside("attention")],
        ),
        ("what it takes to be alike", ["neighbours", place, "--data", data]),
        ("weights for other programs", ["export", place, "--out", inside("published.safetensors")]),
    ]
    judged = [("a score without labels", ["quality", place, "--data", data])]
    if labelled:
        judged = [
            ("the k-NN score, on all images", ["knn", place, "--data", data]),
            ("a linear probe", ["linear", place, "--data", data]),
        ]
        out = ["--out", inside("features.safetensors")]
        commands.insert(2, ("the features", ["features", place, "--data", data, *out]))
    return [(what, shlex.join(["xdino", *words])) for what, words in [*judged, *commands]]


def next_of_classifier(run: Path, data: str) -> list[tuple[str, str]]:
    """The same after a classifier has learned from `data`."""
    place, data = _operand(str(run)), _operand(data)
    image = an_image(data) or IMAGE
    commands = [
        ("the score of the classifier", ["score", place, "--data", data]),
        ("k-NN of its features", ["knn", place, "--data", data]),
        (
            "a picture of what it looks at",
            ["attention", place, image, "--out", os.path.join(place, "attention")],
        ),
    ]
    return [(what, shlex.join(["xdino", *words])) for what, words in commands]


def next_of_labelled(
    kind: str, run: Path, data: str, images: str | None = None
) -> list[tuple[str, str]]:
    """The same after a run of this kind has learned from labels of `data`.

    images: where `data` is a JSON file, the folder of its pictures.
    """
    if kind == "finetune":
        return next_of_classifier(run, data)
    place, data = _operand(str(run)), _operand(data)
    image = an_image(images or data, HELD_OUT) or IMAGE
    beside = [] if images is None else ["--images", _operand(images)]
    commands = [
        ("the score", ["score", place, "--data", data, *beside]),
        (
            "a picture of what it finds",
            ["predict", place, image, "--out", os.path.join(place, "found")],
        ),
    ]
    return [(what, shlex.join(["xdino", *words])) for what, words in commands]


def has_splits(data: str) -> bool:
    """Whether `data` looks like train/ and val/ of classes; their images are not listed."""
    if data.partition(":")[0] in NAMES:
        return True
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        place = Path(data).expanduser()
        return (place / "train").is_dir() and split_folder(place, "val").is_dir()
    return False


def an_image(data: str, called: Sequence[str] = ()) -> str | None:
    """An image file of the folder `data`, of its val/ if it has one; None where none is soon found.

    called: patterns of other folders in it that are looked into first.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        place = Path(data).expanduser()
        first = (folder for pattern in called for folder in sorted(place.glob(pattern)))
        for folder in (*first, split_folder(place, "val"), place):
            files = (
                os.path.join(where, name)
                for where, folders, names in os.walk(folder)
                for name in [*sorted(names), *itertools.repeat("", len(folders))]
            )
            for path in itertools.islice(files, LOOKED_AT):
                if Path(path).suffix.lower() in SUFFIXES:
                    return path
    return None


def _operand(text: str) -> str:
    """A path that no command takes for an option."""
    return os.path.join(".", text) if text.startswith("-") else text
