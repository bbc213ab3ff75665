"""A smaller image of bands: the numbers keep their type and meaning, so that any declared range holds.

An array stays an array; all else becomes a TIFF that says black and white as the file itself did.
"""

import io

import numpy as np
from PIL import Image

from xdino.data.decode import npy, tiffs
from xdino.data.decode.levels import Found
from xdino.data.decode.pictures import UnreadableImage
from xdino.data.decode.sensors import read_values


def shrink_bands(data: bytes, side: int, count: int, max_pixels: int) -> tuple[bytes, str] | None:
    """An image of `count` bands whose shorter side has `side` pixels, and its suffix; None if it has no
    more than that.

    Each band is resized as crops are (bicubic, antialiased).

    Raises:
        UnreadableImage: as `decode`, and for numbers that are not finite.
        UsageError: a TIFF, and tifffile is not installed.
    """
    found = read_values(data, count, max_pixels)
    height, width = found.values.shape[:2]
    short, long = min(height, width), max(height, width)
    if short <= side:
        return None
    longer = round(side * long / short)
    size = (side, longer) if width == short else (longer, side)
    values = np.stack([_resized(found.values[..., band], size) for band in range(count)], axis=-1)
    if data.startswith(npy.MAGIC):
        target = io.BytesIO()
        np.save(target, values, allow_pickle=False)
        return target.getvalue(), ".npy"
    return _tiff(values, found), ".tif"


def _resized(band: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] -> [h, w] of the same type; size: width and height."""
    kind = np.dtype(np.uint8) if band.dtype.kind == "b" else band.dtype
    plain = band.astype(np.float32)
    if not np.isfinite(plain).all():
        raise UnreadableImage("it holds pixels that are not finite (NaN or infinite)")
    small = np.asarray(Image.fromarray(plain).resize(size, Image.Resampling.BICUBIC))
    if band.dtype.kind == "b":
        return small >= 0.5
    if kind.kind in "ui":  # a bicubic filter oversteps
        limits = np.iinfo(kind)
        small = np.rint(small.astype(np.float64)).clip(limits.min, limits.max)
    return small.astype(kind.newbyteorder("="))


def _tiff(values: np.ndarray, found: Found) -> bytes:
    """Bands side by side, with SMinSampleValue and SMaxSampleValue."""
    tifffile, target = tiffs.library(), io.BytesIO()
    count = values.shape[2]
    told = [
        (tag, "d", count, (value,) * count, True)
        for tag, value in zip((tiffs.SMIN, tiffs.SMAX), found.said, strict=True)
    ]
    tifffile.imwrite(
        target,
        values if count > 1 else values[..., 0],
        photometric="miniswhite" if found.inverted else "minisblack",
        planarconfig="contig" if count > 1 else None,
        metadata=None,
        extratags=told,
    )
    return target.getvalue()
