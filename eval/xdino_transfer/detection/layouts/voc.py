"""Pascal VOC's layout: an XML file a picture, lists of names for the splits.

Its boxes count pixels from 1 and include the last one: (1, 1, W, H) is a whole picture, which is
(0, 0, W, H) here. Objects that are marked "difficult" are treated like COCO's crowds: they are not
learned from, and neither found nor missed. Masks are not read: boxes stand for them.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from xdino.errors import UsageError, asked
from xdino_transfer.detection.layouts.annotations import (
    MISSING_SHARE,
    Annotations,
    Found,
    Picture,
    collected,
)

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG")


def is_layout(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def read(
    folder: Path,
    split: str,
    classes: Sequence[str] | None = None,
    missing_share: float = MISSING_SHARE,
) -> Annotations:
    """The pictures that ImageSets/Main/SPLIT.txt lists.

    Args:
        classes: their names in order. None = VOC's twenty where all names are among them, else the
            names in the files, sorted.

    Raises:
        UsageError: files that are not there, or none of VOC's; names that are no classes.
    """
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    with asked(f"{listed} cannot be read"):
        lines = listed.read_text("utf-8", "replace").splitlines()
    # Lists of one class say beside each name whether it is in the picture.
    stems = [line.split()[0] for line in lines if line.strip()]
    parsed = [_parsed(folder, stem) for stem in stems]
    names = {name for _, _, objects in parsed for name, _, _ in objects}
    if classes is None:
        classes = CLASSES if names <= set(CLASSES) else sorted(names)
    unknown = sorted(names - set(classes))
    if unknown:
        raise UsageError(
            f"{folder} has objects called {', '.join(unknown[:5])} in {split}, which are no classes "
            f"of train"
        )
    label = {name: rank for rank, name in enumerate(classes)}
    pictures = [
        Picture(
            number,
            path,
            size,
            [
                Found(f"{i} in {stems[number]}.xml", label[name], box, crowd=difficult)
                for i, (name, box, difficult) in enumerate(objects, start=1)
            ],
        )
        for number, (path, size, objects) in enumerate(parsed)
    ]
    where = f"the {split} split of {folder}"
    return collected(where, pictures, classes, range(1, len(classes) + 1), missing_share)


Parsed = tuple[Path, tuple[int, int], list[tuple[str, tuple[float, float, float, float], bool]]]


def _parsed(folder: Path, stem: str) -> Parsed:
    """A picture's path, size and objects: name, box, whether it is difficult."""
    path = folder / "Annotations" / f"{stem}.xml"
    with asked(f"{path} cannot be read"):
        text = path.read_bytes()
    try:
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ElementTree.ParseError("entities are none of VOC's")
        root = ElementTree.fromstring(text)
        size = (_number(root, "size/height"), _number(root, "size/width"))
        objects = [
            (
                (told.findtext("name") or "").strip(),
                (
                    _number(told, "bndbox/xmin") - 1,
                    _number(told, "bndbox/ymin") - 1,
                    _number(told, "bndbox/xmax"),
                    _number(told, "bndbox/ymax"),
                ),
                (told.findtext("difficult") or "0").strip() == "1",
            )
            for told in root.iterfind("object")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise UsageError(f"{path} is no annotation of VOC's: {error}") from None
    places = [folder / "JPEGImages" / f"{stem}{suffix}" for suffix in SUFFIXES]
    image = next((place for place in places if place.is_file()), places[0])
    return image, (int(size[0]), int(size[1])), objects


def _number(node: ElementTree.Element, path: str) -> float:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"it has no {path}")
    return float(text)
