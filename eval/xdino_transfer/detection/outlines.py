"""Outlines of objects as COCO writes them, to masks: polygons, and runs of pixels as a list or a string.

COCO's own code (pycocotools) fills them, so that a mask is the one that is scored. It is an extra of
the installation, asked for where it is needed.

Letters: H x W pixels.
"""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from xdino.errors import UsageError
from xdino_transfer.detection.boxes import Size

Outline = Sequence[Sequence[float] | np.ndarray] | Mapping[str, Any]
"""Polygons [x, y, x, y, ...], or {"size": [H, W], "counts": a list or a string of runs}."""


def pycocotools_mask() -> ModuleType:
    """pycocotools.mask. Raises UsageError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UsageError(
            "masks of objects and average precision need pycocotools: pip install 'xdino[dense]'"
        ) from None
    return mask


def checked(outline: Any, size: Size) -> Outline | None:
    """An outline that can be filled, without polygons of fewer than three points; None for none.

    Raises:
        ValueError: it is none at all, or runs of pixels of another size; the reason in half a sentence.
    """
    if isinstance(outline, Mapping):
        told, counts = outline.get("size"), outline.get("counts")
        if (
            not isinstance(told, list)
            or len(told) != 2
            or not isinstance(counts, list | str | bytes)
        ):
            raise ValueError("its mask is neither polygons nor runs of pixels")
        if tuple(told) != size:
            raise ValueError(
                f"its mask is of {told[1]} x {told[0]} pixels and its image of {size[1]} x {size[0]}"
            )
        if isinstance(counts, list) and (
            not all(isinstance(run, int) and run >= 0 for run in counts)
            or sum(counts) != size[0] * size[1]
        ):
            raise ValueError("its mask's runs of pixels do not add up to its image")
        if not isinstance(counts, list):
            text = counts.encode() if isinstance(counts, str) else counts
            if not _adds_up(text, size[0] * size[1]):
                raise ValueError("its mask's runs of pixels do not add up to its image")
        return outline
    if not isinstance(outline, list):
        raise ValueError("its mask is neither polygons nor runs of pixels")
    polygons = [np.array(polygon, np.float64) for polygon in outline if _is_polygon(polygon)]
    return polygons or None


def _is_polygon(polygon: Any) -> bool:
    """Three points or more; with two pycocotools would take the numbers for a box."""
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        raise ValueError("its mask is neither polygons nor runs of pixels")
    if len(polygon) % 2:
        raise ValueError("a polygon of it has half a point")
    return len(polygon) >= 6 and all(map(math.isfinite, polygon))


def filled(outline: Outline, size: Size) -> np.ndarray:
    """uint8 [H, W], 1 inside.

    Raises:
        UsageError: pycocotools is not installed, or runs that are no mask of this size.
    """
    rle = runs(outline, size)
    found = pycocotools_mask().decode(rle)
    return found


def runs(outline: Outline, size: Size) -> dict[str, Any]:
    """The outline as runs of pixels in COCO's string, {"size", "counts"}."""
    mask, (H, W) = pycocotools_mask(), size
    if not isinstance(outline, Mapping):
        return mask.merge(mask.frPyObjects([[*map(float, p)] for p in outline], H, W))
    if isinstance(outline["counts"], list):
        return mask.frPyObjects(dict(outline), H, W)
    counts = outline["counts"]
    counts = counts.encode() if isinstance(counts, str) else counts
    found = {"size": [H, W], "counts": counts}
    if not _adds_up(counts, H * W):
        raise UsageError("a mask's runs of pixels do not add up to its image: the file is damaged")
    return found


def _adds_up(counts: bytes, pixels: int) -> bool:
    """Whether runs in COCO's string do; if not, decoding them would read beyond the mask."""
    total, previous, value, shift = 0, [0, 0, 0], 0, 0
    for byte in counts:
        digit = byte - 48
        if not 0 <= digit < 64:
            break
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        run = value + (previous[-2] if len(previous) > 5 else 0)
        previous.append(run)
        total, value, shift = total + run, 0, 0
        if run < 0:
            break
    else:
        return total == pixels
    return False


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """bool or uint8 [H, W] -> {"size", "counts"} as COCO's result files have it."""
    found = pycocotools_mask().encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode()}
