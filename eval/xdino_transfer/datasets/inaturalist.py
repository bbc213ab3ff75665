"""iNaturalist 2018 and 2019 (Van Horn et al., 2018): {train,val}YEAR.json beside the images.

Labels are numbered by their first appearance among train's annotations, as the published loader
numbers them, so that heads mean the same. Which rank is told apart is `category`: "name" (the
species), or what categories.json says besides ("family", "order", ..., "supercategory").

Images lie where the index says, or as the published loader wants them: without the folder of the
supercategory.
"""

import json
import re
from pathlib import Path
from typing import Any

from xdino.data.sources import FileSource
from xdino.errors import UsageError, asked, nearest
from xdino_transfer.datasets.checks import all_there, checked, existing

NAME = "iNaturalist"


def year(folder: Path) -> str | None:
    """The year of the index in a folder, None where there is none."""
    names = sorted(path.name for path in folder.glob("train*.json"))
    found = [match[1] for name in names if (match := re.fullmatch(r"train(\d{4})\.json", name))]
    if len(found) > 1:
        raise UsageError(f"{folder} holds several years of {NAME}: {', '.join(found)}")
    return found[0] if found else None


def open_split(folder: Path, split: str, category: str = "name", channels: int = 3) -> FileSource:
    """Raises UsageError for missing or damaged indices, unknown categories, missing images."""
    when = year(folder)
    if when is None:
        raise UsageError(f"{folder} holds no train2018.json or train2019.json")
    train = _index(existing(folder, f"train{when}.json", NAME))
    number, classes = _numbering(folder, train, category)
    path = existing(folder, f"{split}{when}.json", NAME)
    index = train if split == "train" else _index(path)
    labels, paths = [], []
    class_of = {entry["image_id"]: entry["category_id"] for entry in index["annotations"]}
    for image in index["images"]:
        found = number.get(class_of.get(image["id"]))
        if found is None:
            raise UsageError(
                f"{path} has no annotation for {image['file_name']!r}, or one of a category that "
                "train does not have"
            )
        labels.append(found)
        paths.append(str(image["file_name"]))
    where = f"the {split} split of {folder}"
    numbers = checked(labels, classes, where, empty=split != "train")
    paths = _lying(folder, paths)
    all_there(folder, paths, where)
    return FileSource(str(folder), folder, map(str.encode, paths), channels, numbers, classes)


def _lying(folder: Path, paths: list[str]) -> list[str]:
    """The paths as they lie on the disk: the first one tells which of the two ways."""
    if (folder / paths[0]).exists():
        return paths
    parts = [path.split("/") for path in paths]
    if any(len(part) != 4 for part in parts):
        return paths
    flat = [f"{top}/{number}/{file}" for top, _, number, file in parts]
    return flat if (folder / flat[0]).is_file() else paths


def _numbering(
    folder: Path, train: dict[str, Any], category: str
) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Category id -> label, and the labels' names."""
    told = folder / "categories.json"
    known = _json(told) if told.is_file() else train.get("categories")
    if not isinstance(known, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), int | str) for entry in known
    ):
        raise UsageError(f"{NAME} is not whole: {told} does not exist, or lists no categories")
    name_of = {}
    for entry in known:
        if category not in entry:
            ranks = [key for key in entry if key != "id"]
            raise UsageError(
                f'data.category "{category}" is not in {told}: {nearest(category, ranks)}'
            )
        name_of[entry["id"]] = str(entry[category])
    label: dict[str, int] = {}
    for annotation in train["annotations"]:
        if annotation["category_id"] not in name_of:
            raise UsageError(f"category {annotation['category_id']!r} of train is not in {told}")
        label.setdefault(name_of[annotation["category_id"]], len(label))
    number = {key: label[name] for key, name in name_of.items() if name in label}
    return number, tuple(label)


def _index(path: Path) -> dict[str, Any]:
    """The index in a file: every image with id and file_name, every annotation with its two ids."""
    content = _json(path)
    wanted = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id")}
    for key, names in wanted.items():
        entries = content.get(key) if isinstance(content, dict) else None
        whole = isinstance(entries, list) and all(
            isinstance(entry, dict) and all(isinstance(entry.get(n), int | str) for n in names)
            for entry in entries
        )
        if not whole:
            raise UsageError(f"{path} is no index of {NAME}: its {key} lack {' or '.join(names)}")
    return content


def _json(path: Path) -> Any:
    with asked(f"{path} cannot be read"):
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged: it is no JSON ({error})") from None
