"""Annotated pictures, whatever their layout: what a detector learns from and is scored against.

Objects are kept as columns over all pictures. What cannot be learned from (boxes without an area,
outside of their picture) is left out and counted in `notices`, as published; what contradicts itself
is refused, with the number of the annotation.

Letters: N pictures, M objects, K classes, H x W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xdino.config import MAX_PIXELS
from xdino.data.decode import UnreadableImage, decode
from xdino.data.listing import printable
from xdino.errors import UsageError
from xdino_transfer.detection import outlines
from xdino_transfer.detection.outlines import Outline

MISSING_SHARE = 0.05  # of the pictures that may not be there


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
class Annotations:
    """Columns. starts: int64 [N + 1], objects of picture i are starts[i] to starts[i + 1].

    category_ids: int64 [K], numbers of the classes in the files. boxes: float32 [M, 4], cut off at
    their pictures. crowd: bool [M], regions of many that are not learned from.
    """

    where: str
    classes: tuple[str, ...]
    category_ids: np.ndarray
    numbers: np.ndarray  # int64 [N]
    paths: list[Path]
    sizes: np.ndarray  # int64 [N, 2]
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray  # int64 [M]
    areas: np.ndarray  # float64 [M]
    crowd: np.ndarray
    outlines: list[Outline | None]
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
        outline = self.outlines[row]
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
                outline = self.outlines[row]
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
    there, notices = _present(where, pictures, missing_share)
    kept: list[tuple[Found, np.ndarray, Outline | None]] = []
    starts, dropped, boxed, points = [0], [], 0, []
    for picture in there:
        for told in picture.objects:
            box = _inside(told.box, picture.size)
            if box is None or not (told.area is None or told.area > 0):
                dropped.append(told.number)
                continue
            outline = _outline(told, picture, where)
            if outline is None:
                boxed += 1
                if told.outline:
                    points.append(told.number)
            kept.append((told, box, outline))
        starts.append(len(kept))
    if dropped:
        notices.append(
            f"{where}: {len(dropped):,} objects have boxes without an area, or outside of their "
            f"picture, and are left out (first: annotation {dropped[0]})"
        )
    if points:
        notices.append(
            f"{where}: {len(points):,} objects have polygons of fewer than three points only, and "
            f"their boxes stand for them (first: annotation {points[0]})"
        )
    if boxed and boxed < len(kept):
        notices.append(f"{where}: {boxed:,} of {len(kept):,} objects are boxes without an outline")
    return Annotations(
        where,
        tuple(classes),
        np.array(category_ids, np.int64),
        np.array([picture.number for picture in there], np.int64),
        [picture.path for picture in there],
        np.array([picture.size for picture in there], np.int64).reshape(-1, 2),
        np.array(starts, np.int64),
        np.array([box for _, box, _ in kept], np.float32).reshape(-1, 4),
        np.array([told.label for told, _, _ in kept], np.int64),
        np.array([_area(told, box) for told, box, _ in kept], np.float64),
        np.array([told.crowd for told, _, _ in kept], bool),
        [outline for _, _, outline in kept],
        notices,
    )


def _present(
    where: str, pictures: Sequence[Picture], missing_share: float
) -> tuple[list[Picture], list[str]]:
    """The pictures whose files are there, and a notice on the others."""
    if not pictures:
        raise UsageError(f"{where} names no picture")
    there = [picture for picture in pictures if picture.path.is_file()]
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if not missing:
        return there, []
    names = ", ".join(printable(bytes(path)) for path in missing[:3])
    told = f"{len(missing):,} of the {len(pictures):,} pictures of {where} are not there: {names}"
    told += ", ..." if len(missing) > 3 else ""
    if len(missing) > missing_share * len(pictures):
        raise UsageError(told)
    return there, [f"{told}; they are left out"]


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
