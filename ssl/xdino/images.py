"""Bytes of an image file -> pixels, for every kind of file that real folders hold.

JPEG goes through libjpeg-turbo (simplejpeg), which leaves the interpreter lock free and decodes
into an array; everything else, and what simplejpeg refuses, goes through Pillow. Two things differ
from `Image.open(path).convert("RGB")` of the published code, because there they are wrong: 16-bit
images are scaled to 8 bits (Pillow clips them to white), and EXIF orientation is applied. One is
the same although one may argue: transparency is dropped, not composited.
"""

import io
import re
import struct

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

#: What an image file is called.
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
)  # fmt: skip

#: Largest image that is decoded, in pixels: Pillow's own limit against decompression bombs.
MAX_PIXELS = 178_956_970

# What Pillow raises for files that are damaged; its readers of rare formats raise nearly anything.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    struct.error,
)
_ORIENTATION = 0x0112  # the EXIF tag


class UnreadableImage(ValueError):
    """The bytes are no image that can be read whole; the message says why."""


def decode(data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The first image in `data`: uint8 [H, W, channels], RGB or (channels=1) ITU-R 601 luma.

    Raises UnreadableImage for what is empty, not an image, truncated, or larger than `max_pixels`
    (before memory for it is taken), and ValueError for a number of channels other than 1 and 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if not data:
        raise UnreadableImage("the file is empty")
    if data[:2] == b"\xff\xd8":
        image = _decode_jpeg(data, channels, max_pixels)
        if image is not None:
            return image
    return _decode_pillow(data, channels, max_pixels)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UnreadableImage(
            f"{width} x {height} pixels are more than the limit of {max_pixels:,} pixels "
            "(data.max_pixels, or --max-pixels of an evaluation)"
        )


def allow_pixels(max_pixels: int) -> None:
    """Lift Pillow's own limit, which holds for the whole process, up to `max_pixels`.

    Only a person who asked for more than `MAX_PIXELS` needs it; it is never lowered.
    """
    # Pillow warns above its number and refuses above twice that.
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


# JPEG


def _decode_jpeg(data: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """uint8 [H, W, channels], or None where Pillow has to try: CMYK, odd or damaged files."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return None
    try:
        # The exact transforms: the fast ones save 4 % and cost a level.
        image = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # strict: this includes a warning about a file that Pillow reads in full
        return None
    return _upright(image, _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8, from a walk over the segments before the pixels; 1 if none."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, position + 2)
        if data[position + 1] == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _tiff_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF header; 1 if absent or damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _ORIENTATION and kind == 3:  # a short, kept in the entry itself
                return struct.unpack_from(order + "H", tiff, entry + 8)[0]
    except struct.error:
        pass  # a damaged header says nothing about how to turn the picture
    return 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation; uint8 [H, W, C], contiguous."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


# Everything else


def _decode_pillow(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.height, image.width, max_pixels)
            return _to_array(image, channels)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image, or of a kind that cannot be read") from None
    except Image.DecompressionBombError as error:  # Pillow looks at the header before we do
        raise UnreadableImage(_bomb(str(error), max_pixels)) from error
    except _DAMAGED as error:
        raise UnreadableImage(f"damaged: {error or type(error).__name__}") from error


def _bomb(message: str, max_pixels: int) -> str:
    """Pillow's refusal in our words; its own limit holds where ours is higher (`allow_pixels`)."""
    found = re.search(r"\((\d+) pixels\)", message)
    pixels = f"{int(found[1]):,}" if found else "its"
    limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
    return (
        f"{pixels} pixels are more than the limit of {limit:,} pixels "
        "(data.max_pixels, or --max-pixels of an evaluation)"
    )


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)  # loads the pixels, so a truncated file ends here
    if deep:
        levels = np.asarray(image, np.float64)
        image = Image.fromarray(_eight_bits(levels, known_16=sixteen and image.mode != "F"))
    return np.array(image.convert("RGB" if channels == 3 else "L")).reshape(
        image.height, image.width, channels
    )


def _eight_bits(levels: np.ndarray, known_16: bool) -> np.ndarray:
    """One channel of deep pixels [H, W] -> uint8; a float or 32-bit file does not say its range."""
    if not np.isfinite(levels).all():
        raise UnreadableImage("it holds pixels that are not finite")
    low, high = levels.min(), levels.max()
    if known_16 or (low >= 0 and 255 < high <= 65535):
        levels = levels / 257
    elif low >= 0 and high <= 1:
        levels = levels * 255
    elif low < 0 or high > 65535:
        levels = (levels - low) * (255 / max(high - low, 1e-12))
    return np.rint(levels).astype(np.uint8)
