"""Bytes of a file -> the bands of a sensor as uint8, whichever format holds them.

TIFF by tifffile, NPY by its header, anything else by Pillow: a 16-bit PNG of an X-ray with 12 bits is
read by its declared range, too.

Letters: H x W pixels, n bands.
"""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from xdino.config.bands import MOST, Bands
from xdino.data.decode import npy, tiffs
from xdino.data.decode.levels import Found, Range, eight_bits, full_range
from xdino.data.decode.pictures import (
    UnreadableImage,
    check_size,
    formats,
    jpeg_orientation,
    upright,
)

_DEEP = ("I", "F")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def decode_bands(data: bytes, bands: Bands, max_pixels: int) -> np.ndarray:
    """The image in `data`: uint8 [H, W, n], black 0 and white 255 by `bands.range`.

    Raises:
        UnreadableImage: no image of so many bands, or its values are none of that range.
        UsageError: a TIFF, and tifffile is not installed.
    """
    found = read_values(data, int(bands), max_pixels)
    return eight_bits(found.values, bands.of_each() or [found.said], found.inverted)


def read_values(data: bytes, count: int, max_pixels: int) -> Found:
    """The numbers of `count` bands as they are stored, upright. Raises as `decode_bands`."""
    if data.startswith(npy.MAGIC):
        shape = npy.shape_of(data)
        height, width = sorted(shape)[-2:]
        check_size(height, width, max_pixels)
        values = npy.values_of(data, count)
        return Found(values, full_range(values.dtype), False)
    if data[:4] in tiffs.MAGIC:
        return tiffs.read(data, count, max_pixels)
    return Found(*_by_pillow(data, count, max_pixels), False)


def _by_pillow(data: bytes, count: int, max_pixels: int) -> tuple[np.ndarray, Range]:
    """[H, W, n] as it is stored, and what its type holds."""
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            check_size(image.height, image.width, max_pixels)
            image.load()
            deep = image.mode in _DEEP or image.mode.startswith("I;")
            have = (
                1
                if deep
                else len(image.convert("RGB").getbands() if image.mode == "P" else image.getbands())
            )
            if have != count or count not in _MODES:
                raise UnreadableImage(
                    f"it has {have} channels, and {count} bands are read of all images"
                )
            if deep:
                values = np.asarray(image)
                said = (0.0, 1.0) if image.mode == "F" else (0.0, 65535.0)
            else:
                values, said = np.array(image.convert(_MODES[count])), (0.0, 255.0)
            if data[:2] == b"\xff\xd8":
                turned = jpeg_orientation(data)
            else:
                turned = int(image.getexif().get(0x0112, 1))
            return upright(values.reshape(image.height, image.width, count), turned), said
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image, or of a kind that cannot be read") from None
    except MemoryError as error:
        raise UnreadableImage("it needs more memory than there is") from error
    except Exception as error:  # over damaged files its readers raise nearly anything
        lines = str(error).splitlines()
        raise UnreadableImage(f"damaged: {lines[0] if lines else type(error).__name__}") from error


# What a header says


@dataclass(frozen=True)
class Layout:
    """kind: of its numbers, "uint16" and the like."""

    height: int
    width: int
    bands: int
    kind: str


def layout_of(data: bytes) -> Layout:
    """What the image in `data` is, before any pixel is read.

    Raises:
        UnreadableImage: none; UsageError: a TIFF, and tifffile is not installed.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    if data.startswith(npy.MAGIC):
        shape, kind = npy.shape_of(data), npy.type_of(data)
        bands = npy.bands_of(shape) or 0
        first = 0 if len(shape) == 2 or shape[2] == bands else 1
        return Layout(shape[first], shape[first + 1], bands, str(kind))
    if data[:4] in tiffs.MAGIC:
        return Layout(*tiffs.layout_of(data))
    channels = _of_photograph(data)
    if channels is None:
        raise UnreadableImage("not an image, or of a kind that cannot be read")
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        deep = image.mode in _DEEP or image.mode.startswith("I;")
        return Layout(image.height, image.width, channels, "uint16" if deep else "uint8")


# How many bands, where nobody says


def bands_in(data: bytes, photographs: bool = False) -> int | None:
    """Bands of an image; 0 for a photograph, unless `photographs` count, too; None if it is damaged.

    What Pillow reads is one, as ever.
    """
    try:
        if data.startswith(npy.MAGIC):
            return npy.bands_of(npy.shape_of(data))
        if data[:4] in tiffs.MAGIC and (tiffs.samples_of(data) or 0) > tiffs.MOST_OF_PHOTOGRAPHS:
            return tiffs.samples_of(data)  # Pillow would complain of it aloud
        channels = _of_photograph(data)
        if channels is not None and not photographs:
            return 0
        return tiffs.samples_of(data) if data[:4] in tiffs.MAGIC else channels
    except UnreadableImage:
        return None


def _of_photograph(data: bytes) -> int | None:
    """Channels of what Pillow reads; None for the rest."""
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            return 3 if image.mode == "P" else len(image.getbands())
    except Exception:  # noqa: BLE001 - its readers raise nearly anything
        return None


def pages_in(data: bytes) -> int:
    """Pages of a TIFF that Pillow reads; 0 for the rest."""
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 - its readers raise nearly anything
        return 0


def usual(counts: Iterable[int | None]) -> int | None:
    """What most of some images have, among what can be had."""
    found = Counter(count for count in counts if count is not None and count <= MOST)
    return found.most_common(1)[0][0] if found else None
