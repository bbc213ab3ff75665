"""Annotated pictures, whatever their layout: what a detector learns from and is scored against.

Objects are kept as columns over all pictures. What cannot be learned from (boxes without an area,
outside of their picture) is left out and counted in `notices`, as published; what contradicts itself
is refused, with the number of the annotation.

Letters: N pictures, M objects, K classes, H x W pixels.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xdino.config import MAX_PIXELS
from xdino.data.decode import UnreadableImage, decode
from xdino.data.listing import ByteStrings, printable
from xdino.errors import UsageError
from xdino_transfer.detection import outlines
from xdino_transfer.detection.layouts.outline_columns import Outlines
from xdino_transfer.detection.outlines import Outline

MISSING_SHARE = 0.05  # of the pictures that may not be there
NAMED = 3  # of them that a sentence names


@dataclass(frozen=True)
class Found:
    """One object as a file tells it: box (left, top, right, bottom), not cut off yet.

    number: of the annotation, for sentences. area: of what is scored, None for the box's.
    """

    number: Any
    label: int
    box: Sequence[float]
    outline: Any = None
    crowd: bool = False
    area: float | None = None


@dataclass(frozen=True)
class Picture:
    """One picture as a file tells it. size: height and width."""

    number: int
    path: Path
    size: tuple[int, int]
    objects: Sequence[Found]


@dataclass(frozen=True)
class LeftOut:
    """What a file tells of and is not learned from, plain JSON.

    pictures: of the file. missing: which of them are not there, with the names of the first. dropped,
    points, boxed: objects without a box, with polygons of two points only, without an outline; of the
    first two the number of the first annotation, too.
    """

    pictures: int = 0
    missing: Sequence[int] = ()
    named: Sequence[str] = ()
    dropped: int = 0
    first_dropped: Any = None
    points: int = 0
    first_points: Any = None
    boxed: int = 0

    def notices(self, where: str, objects: int, missing_share: float) -> list[str]:
        """Sentences for a person, of `objects` that are learned from.

        Raises:
            UsageError: too many pictures are not there.
        """
        told = []
        if gone := len(self.missing):
            names = ", ".join(self.named) + (", ..." if gone > len(self.named) else "")
            sentence = (
                f"{gone:,} of the {self.pictures:,} pictures of {where} are not there: {names}"
            )
            if gone > missing_share * self.pictures:
                raise UsageError(sentence)
            told.append(f"{sentence}; they are left out")
        if self.dropped:
            told.append(
                f"{where}: {self.dropped:,} objects have boxes without an area, or outside of their "
                f"picture, and are left out (first: annotation {self.first_dropped})"
            )
        if self.points:
            told.append(
                f"{where}: {self.points:,} objects have polygons of fewer than three points only, and "
                f"their boxes stand for them (first: annotation {self.first_points})"
            )
        if self.boxed and self.boxed < objects:
            told.append(
                f"{where}: {self.boxed:,} of {objects:,} objects are boxes without an outline"
            )
        return told


class Places(Sequence[Path]):
    """Paths of many pictures: names, as they are told, below a folder. rows: of the names, int64 [N]."""

    def __init__(self, folder: Path, names: ByteStrings, rows: np.ndarray) -> None:
        self.folder, self.names, self.rows = folder, names, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.folder / os.fsdecode(self.names[self.rows[index]])


@dataclass(frozen=True)
class Annotations:
    """Columns. starts: int64 [N + 1], objects of picture i are starts[i] to starts[i + 1].

    category_ids: int64 [K], numbers of the classes in the files. boxes: float32 [M, 4], cut off at
    their pictures. crowd: bool [M], regions of many that are not learned from.
    """

    where: str
    classes: tuple[str, ...]
    category_ids: np.ndarray
    numbers: np.ndarray  # int64 [N]
    paths: Sequence[Path]
    sizes: np.ndarray  # int64 [N, 2]
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray  # int64 [M]
    areas: np.ndarray  # float64 [M]
    crowd: np.ndarray
    outlines: Outlines
    left_out: LeftOut = LeftOut()
    notices: list[str] = field(default_factory=list)
    channels: int = 3  # of the pictures, 1 for grey, or `Bands`

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """uint8 [H, W, channels], upright.

        Raises:
            UnreadableImage, OSError: it cannot be read, or has another size than is told of it.
        """
        image = decode(self.paths[index].read_bytes(), self.channels, max_pixels)
        H, W = self.sizes[index].tolist()
        if image.shape[:2] != (H, W):
            raise UnreadableImage(
                f"upright it has {image.shape[1]} x {image.shape[0]} pixels, and its annotations are "
                f"for {W} x {H}"
            )
        return image

    def of(self, index: int, crowd: bool = False) -> np.ndarray:
        """The numbers of a picture's objects, crowds with them only if wanted."""
        rows = np.arange(self.starts[index], self.starts[index + 1])
        return rows if crowd else rows[~self.crowd[rows]]

    def mask(self, index: int, row: int) -> np.ndarray:
        """uint8 [H, W] of object `row` in picture `index`; its box where it has no outline."""
        H, W = self.sizes[index].tolist()
        outline = self.outlines.at(row, (H, W))
        if outline is not None:
            return outlines.filled(outline, (H, W))
        left, top, right, bottom = np.rint(self.boxes[row]).astype(int)
        mask = np.zeros((H, W), np.uint8)
        mask[top:bottom, left:right] = 1
        return mask

    def truth(self) -> dict[str, Any]:
        """As a COCO tree, for `average_precision.score`."""
        rows = []
        for i, number in enumerate(self.numbers.tolist()):
            H, W = self.sizes[i].tolist()
            for row in self.of(i, crowd=True).tolist():
                left, top, right, bottom = self.boxes[row].astype(float).tolist()
                outline = self.outlines.at(row, (H, W))
                box = [[left, top, right, top, right, bottom, left, bottom]]
                rows.append(
                    {
                        "id": row + 1,
                        "image_id": number,
                        "category_id": int(self.category_ids[self.labels[row]]),
                        "bbox": [left, top, right - left, bottom - top],
                        "area": float(self.areas[row]),
                        "iscrowd": int(self.crowd[row]),
                        "segmentation": outlines.runs(box if outline is None else outline, (H, W)),
                    }
                )
        categories = [
            {"id": int(number), "name": name}
            for number, name in zip(self.category_ids, self.classes, strict=True)
        ]
        images = [
            {"id": number, "height": int(H), "width": int(W)}
            for number, (H, W) in zip(self.numbers.tolist(), self.sizes, strict=True)
        ]
        return {"images": images, "annotations": rows, "categories": categories}


def collected(
    where: str,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    category_ids: Sequence[int],
    missing_share: float = MISSING_SHARE,
) -> Annotations:
    """Columns of pictures, in their order.

    Raises:
        UsageError: no picture or no class; too many pictures that are not there; a mask that is none.
    """
    if not classes:
        raise UsageError(f"{where} names no class of objects")
    if not pictures:
        raise UsageError(f"{where} names no picture")
    are = present([str(picture.path) for picture in pictures])
    there = [picture for picture, is_there in zip(pictures, are, strict=True) if is_there]
    missing = np.flatnonzero(~are).tolist()
    named = [printable(bytes(pictures[i].path)) for i in missing[:NAMED]]
    left_out = LeftOut(len(pictures), missing, named)
    left_out.notices(where, 0, missing_share)  # refuses before the objects of the others are read
    usable = _Usable(where)
    drawn = Outlines.of(usable.of(there))  # fills the lists, too
    kept, dropped, points = usable.kept, usable.dropped, usable.points
    left_out = replace(
        left_out,
        dropped=len(dropped),
        first_dropped=dropped[0] if dropped else None,
        points=len(points),
        first_points=points[0] if points else None,
        boxed=usable.boxed,
    )
    return Annotations(
        where,
        tuple(classes),
        np.array(category_ids, np.int64),
        np.array([picture.number for picture in there], np.int64),
        [picture.path for picture in there],
        np.array([picture.size for picture in there], np.int64).reshape(-1, 2),
        np.array(usable.starts, np.int64),
        np.array([box for _, box in kept], np.float32).reshape(-1, 4),
        np.array([told.label for told, _ in kept], np.int64),
        np.array([_area(told, box) for told, box in kept], np.float64),
        np.array([told.crowd for told, _ in kept], bool),
        drawn,
        left_out,
        left_out.notices(where, len(kept), missing_share),
    )


@dataclass
class _Usable:
    """Objects that can be learned from, with their boxes; numbers of the annotations of others.

    starts: where the objects of each picture begin. boxed: how many have no outline.
    """

    where: str
    kept: list[tuple[Found, np.ndarray]] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    dropped: list[Any] = field(default_factory=list)
    points: list[Any] = field(default_factory=list)
    boxed: int = 0

    def of(self, pictures: Sequence[Picture]) -> Iterator[Outline | None]:
        """The outlines of `kept`, one after the other: all of COCO's at once would be a gigabyte."""
        for picture in pictures:
            for told in picture.objects:
                box = _inside(told.box, picture.size)
                if box is None or not (told.area is None or told.area > 0):
                    self.dropped.append(told.number)
                    continue
                outline = _outline(told, picture, self.where)
                if outline is None:
                    self.boxed += 1
                    if told.outline:
                        self.points.append(told.number)
                self.kept.append((told, box))
                yield outline
            self.starts.append(len(self.kept))


def present(paths: Sequence[str]) -> np.ndarray:
    """bool [N]: whether each is a file, or leads to one.

    A folder is listed once, which a shared disk answers sooner than a question for each of its files;
    what is not found so (other spellings that the disk takes, folders that cannot be listed) is asked.
    """
    listed: dict[str, set[str]] = {}
    found = np.zeros(len(paths), bool)
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = _files_of(folder)
        found[i] = name in listed[folder] or Path(path).is_file()
    return found


def _files_of(folder: str) -> set[str]:
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
        return {entry.name for entry in entries if entry.is_file()}
    return set()


def _inside(box: Sequence[float], size: tuple[int, int]) -> np.ndarray | None:
    """A box cut off at its picture; None where less than a pixel a side was told, or nothing is left."""
    H, W = size
    left, top, right, bottom = map(float, box)
    if not (right - left >= 1 and bottom - top >= 1 and math.isfinite(right - left + bottom - top)):
        return None
    left, right = (min(max(x, 0.0), W) for x in (left, right))
    top, bottom = (min(max(y, 0.0), H) for y in (top, bottom))
    return np.array([left, top, right, bottom]) if right > left and bottom > top else None


def _outline(told: Found, picture: Picture, where: str) -> Outline | None:
    if told.outline is None:
        return None
    try:
        return outlines.checked(told.outline, picture.size)
    except ValueError as error:
        raise UsageError(f"annotation {told.number} of {where}: {error}") from None


def _area(told: Found, box: np.ndarray) -> float:
    return float(np.prod(box[2:] - box[:2])) if told.area is None else told.area
