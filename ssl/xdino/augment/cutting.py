"""Crops of images of any number of bands, at the speed of photographs'.

The kernel that resizes uint8 takes 3 or 4 channels; with more it falls back on a path for all types,
some ten times slower a band. So an image of more bands is laid out once in groups of four, each crop
is resized group by group, and its bands are put side by side again.

Letters: H x W pixels, C bands, G groups of four, s side of a crop.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from xdino.augment.multi_crop import crop

_TOGETHER = 4


class Cutter(Protocol):
    def __call__(self, box: Any, size: int, out: np.ndarray | None = None) -> np.ndarray: ...


def cutter(image: np.ndarray) -> Cutter:
    """`multi_crop.crop` of one image, uint8 [H, W, C]: (box, size, out) -> uint8 [s, s, C]."""
    if image.shape[2] <= _TOGETHER:
        return partial(crop, image)
    groups, bands = _apart(np.ascontiguousarray(image)), image.shape[2]

    def cut(box: Any, size: int, out: np.ndarray | None = None) -> np.ndarray:
        if out is None or not out.flags.c_contiguous:
            whole = np.empty((size, size, bands), np.uint8)
            if out is None:
                return cut(box, size, whole)
            out[:] = cut(box, size, whole)
            return out
        parts = np.empty((len(groups), size, size, _TOGETHER), np.uint8)
        for part, group in zip(parts, groups, strict=True):
            crop(group, box, size, part)
        _together(parts, out)
        return out

    return cut


def _apart(image: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [G, H, W, 4]; what is no band is 0."""
    H, W, C = image.shape
    groups = np.zeros((-(-C // _TOGETHER), H, W, _TOGETHER), np.uint8)
    apart, _ = _loops()
    apart(image, groups)
    return groups


def _together(parts: np.ndarray, out: np.ndarray) -> None:
    """[G, s, s, 4] -> [s, s, C]."""
    _, together = _loops()
    together(parts, out)


Move = Callable[[np.ndarray, np.ndarray], None]


@lru_cache(maxsize=1)
def _loops() -> tuple[Move, Move]:
    """Compiled by numba where it can, as the photometric part is."""
    try:
        from xdino.augment import cutting_cpu
    except (ImportError, RuntimeError, OSError):
        return _apart_plainly, _together_plainly
    return cutting_cpu.apart, cutting_cpu.together


def _apart_plainly(image: np.ndarray, groups: np.ndarray) -> None:
    for group, start in zip(groups, range(0, image.shape[2], _TOGETHER), strict=True):
        bands = image[..., start : start + _TOGETHER]
        group[..., : bands.shape[2]] = bands


def _together_plainly(parts: np.ndarray, out: np.ndarray) -> None:
    for part, start in zip(parts, range(0, out.shape[2], _TOGETHER), strict=True):
        bands = out[..., start : start + _TOGETHER]
        bands[:] = part[..., : bands.shape[2]]
