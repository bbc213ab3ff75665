"""COCO's layout: one JSON file for all pictures of a split, category numbers with gaps.

Letters: K classes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdino.errors import UsageError, asked
from xdino_transfer.detection.layouts.annotations import (
    MISSING_SHARE,
    Annotations,
    Found,
    Picture,
    collected,
)
from xdino_transfer.detection.layouts.index import indexed

_OTHER_KINDS = (LookupError, TypeError, AttributeError, OverflowError, ValueError)


def read(
    path: Path, images: Path, missing_share: float = MISSING_SHARE, annotated: bool = True
) -> Annotations:
    """A JSON file of annotations and the folder that its pictures lie in.

    Labels are the ranks of the sorted category numbers, 0 to K - 1. annotated: whether it must have
    annotations.

    Raises:
        UsageError: not there, no such file, entries that contradict each other, too many pictures
            that are not there.
    """
    with asked(f"{path} cannot be read"):
        if not annotated:
            return _read(path, images, missing_share, False)[0]
        return indexed(path, images, missing_share, lambda: _read(path, images, missing_share))


def _read(
    path: Path, images: Path, missing_share: float, annotated: bool = True
) -> tuple[Annotations, Sequence[str]]:
    """From the file itself, with the names of its pictures."""
    with asked(f"{path} cannot be read"):
        text = path.read_bytes()
    try:
        tree = json.loads(text)
        del text
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no JSON file, or cut short") from None
    if not isinstance(tree, dict):
        tree = {}
    if not annotated:
        tree.setdefault("annotations", [])
    missing = [key for key in ("images", "annotations", "categories") if key not in tree]
    if missing:
        raise UsageError(f"{path} is no COCO file: it has no {' and no '.join(missing)}")
    try:
        return _columns(path, images, tree, missing_share)
    except UsageError:
        raise
    except _OTHER_KINDS as error:
        raise _no_entry(path, error) from None


def _no_entry(path: Path, error: Exception, which: str = "") -> UsageError:
    what = f"no {error}" if isinstance(error, KeyError) else "one of another kind"
    return UsageError(f"{path} is no COCO file: where an entry is expected it has {what}{which}")


def _columns(
    path: Path, images: Path, tree: Mapping[str, Any], missing_share: float
) -> tuple[Annotations, Sequence[str]]:
    names = {int(category["id"]): str(category["name"]) for category in tree["categories"]}
    ids = sorted(names)
    if len(names) < len(tree["categories"]):
        raise UsageError(f"{path} has two categories of one number")
    label = {number: rank for rank, number in enumerate(ids)}
    of_picture: dict[int, list[Found]] = {int(image["id"]): [] for image in tree["images"]}
    if len(of_picture) < len(tree["images"]):
        raise UsageError(f"{path} has two pictures of one number")
    for place, told in enumerate(tree["annotations"], start=1):
        try:
            picture, found = _found(path, told, label)
            if picture not in of_picture:
                raise UsageError(
                    f"annotation {found.number} of {path} is on image {picture}, which is not listed"
                )
            of_picture[picture].append(found)
        except UsageError:
            raise
        except _OTHER_KINDS as error:
            raise _no_entry(path, error, f" (annotation {place} of the file's)") from None
    pictures = [
        Picture(
            int(image["id"]),
            images / str(image["file_name"]),
            (int(image["height"]), int(image["width"])),
            of_picture[int(image["id"])],
        )
        for image in tree["images"]
    ]
    known = collected(str(path), pictures, [names[i] for i in ids], ids, missing_share)
    return known, [str(image["file_name"]) for image in tree["images"]]


def _found(path: Path, told: Mapping[str, Any], label: Mapping[int, int]) -> tuple[int, Found]:
    """An annotation, and the number of its picture. label: of each category's number."""
    number = told.get("id", "without a number")
    category, picture = int(told["category_id"]), int(told["image_id"])
    if category not in label:
        ids = [*label]
        listed = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
        raise UsageError(
            f"annotation {number} of {path} has category {category}, and there are {listed}"
        )
    left, top, width, height = (float(value) for value in told["bbox"])
    return picture, Found(
        number,
        label[category],
        (left, top, left + width, top + height),
        told.get("segmentation") or None,
        bool(told.get("iscrowd", 0)),
        float(told["area"]) if "area" in told else None,
    )
