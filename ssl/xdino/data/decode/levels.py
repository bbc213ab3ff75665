"""Values of a sensor -> uint8 levels, by the black and white that were declared.

Views have 8 bits from here on, as those of photographs have: what a crop goes through next (brightness
and contrast by up to 40 %, a blur) is coarser, crops stay a quarter of float32's bytes on the way to
the network, and kernels of resizing are there for uint8 alone. What 8 bits lose is at most half of a
255th of the *declared* range, so a sensor of 12 bits loses its last 4, not the 8 that dividing 16 bits
by 256 would cost (docs/bands.md has what that does to scores).

Letters: H x W pixels, n bands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from xdino.data.decode.pictures import UnreadableImage

TRIED = 1 << 16  # values that are looked at for whether they lie in the range at all
OUTSIDE = 0.1  # share of them that may lie farther outside than black and white are apart
_BLOCK = 1 << 18  # values that are worked on together: they stay in a core's cache

Range = tuple[float, float]


@dataclass(frozen=True)
class Found:
    """values: [H, W, bands] of any type; said: black and white by the file; inverted: white is 0."""

    values: np.ndarray
    said: Range
    inverted: bool


def full_range(dtype: np.dtype, bits: int | None = None) -> Range:
    """Black and white where nobody declared them: all that `bits` of the type hold; floats: 0 to 1."""
    if dtype.kind == "f":
        return 0.0, 1.0
    if dtype.kind == "i":
        return 0.0, float(2 ** ((bits or 8 * dtype.itemsize) - 1) - 1)
    return 0.0, float(2 ** (bits or 8 * dtype.itemsize) - 1)


def check_type(dtype: np.dtype) -> None:
    """Raises UnreadableImage for values that are no real numbers."""
    if dtype.kind == "c":
        raise UnreadableImage("its pixels are complex numbers: write their magnitude")
    if dtype.kind == "O" or dtype.hasobject:
        raise UnreadableImage("it holds Python's objects, which are not read; write plain numbers")
    if dtype.kind not in "buif":
        raise UnreadableImage(f"its pixels are {dtype}, which are no numbers")


def eight_bits(values: np.ndarray, ranges: Sequence[Range], inverted: bool = False) -> np.ndarray:
    """Numbers [H, W, n] -> uint8 [H, W, n], contiguous. ranges: of each band, or one of all.

    Raises:
        UnreadableImage: values that are not finite, or most of them outside of the range.
    """
    if values.dtype.kind == "b":
        values, ranges = values.view(np.uint8), [(0.0, 1.0)]
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    alike = len(set(ranges)) == 1
    if values.dtype == np.uint8 and alike and ranges[0] == (0, 255):
        out = np.ascontiguousarray(values)
        return 255 - out if inverted else out
    count = values.shape[2]
    # Planes one by one where they lie so, or differ.
    if alike:
        out = _scaled(values, ranges[0], inverted)
    else:
        out = np.empty(values.shape, np.uint8)
        for band in range(count):
            out[..., band] = _scaled(values[..., band], ranges[band], inverted)
    return np.ascontiguousarray(out)


def _scaled(values: np.ndarray, black_white: Range, inverted: bool) -> np.ndarray:
    """One range for all of `values`; uint8 of the same shape, lying in memory as they do."""
    _check_range(values, black_white)
    low, high = black_white
    top, bottom = (low, high) if inverted else (high, low)
    if values.dtype.kind in "ui" and values.dtype.itemsize <= 2:
        table = _table(values.dtype.str, bottom, top)
        return np.take(table, values if values.dtype.kind == "u" else _unsigned(values))
    order = sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis]))
    flat = np.ascontiguousarray(values.transpose(order))
    out = np.empty(flat.shape, np.uint8)
    source, target = flat.reshape(-1), out.reshape(-1)
    wide = np.float64 if values.dtype.itemsize > 4 or values.dtype.kind in "ui" else np.float32
    for start in range(0, len(source), _BLOCK):
        levels: Any = source[start : start + _BLOCK].astype(wide)
        if not np.isfinite(levels).all():
            raise UnreadableImage("it holds pixels that are not finite (NaN or infinite)")
        levels -= bottom
        levels *= 255 / (top - bottom)
        np.clip(levels, 0, 255, out=levels)
        target[start : start + _BLOCK] = np.rint(levels, out=levels)
    return out.transpose(np.argsort(order))


def _unsigned(values: np.ndarray) -> np.ndarray:
    return values.view(values.dtype.str.replace("i", "u"))


@lru_cache(maxsize=64)
def _table(dtype: str, bottom: float, top: float) -> np.ndarray:
    """The level of every value that the type can have, by its bits: uint8 [256 or 65536]."""
    kind = np.dtype(dtype)
    values = np.arange(2 ** (8 * kind.itemsize), dtype=np.dtype(dtype.replace("i", "u")))
    levels = (values.view(kind).astype(np.float64) - bottom) * (255 / (top - bottom))
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


def _check_range(values: np.ndarray, black_white: Range) -> None:
    """Raises UnreadableImage where a tenth of the pixels lies far outside."""
    low, high = black_white
    step = max(1, int(np.sqrt(values.size / TRIED)))
    some = values[::step, ::step]
    if some.dtype.kind in "ui" and some.dtype.itemsize <= 2:
        limits = np.iinfo(some.dtype)
        if limits.min >= 2 * low - high and limits.max <= 2 * high - low:
            return
    far = high - low
    with np.errstate(invalid="ignore"):
        share = ((some < low - far) | (some > high + far)).mean()
    if share > OUTSIDE:
        raise UnreadableImage(
            f"its pixels are not between {low:g} and {high:g}, black and white as far as anybody "
            f"said; in a sample they lie from {np.nanmin(some):g} to {np.nanmax(some):g}: declare "
            "data.range"
        )
