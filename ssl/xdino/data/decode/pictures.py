"""Bytes of an image file -> pixels, for every kind of file that real folders hold.

JPEG goes through libjpeg-turbo (simplejpeg), which leaves the interpreter lock free and decodes
into an array; everything else, and what simplejpeg refuses, goes through Pillow, which is given the
list of formats that count: its readers of documents start other programs. Two things differ from
`Image.open(path).convert("RGB")` of the published code, because there they are wrong: deep images
are scaled to 8 bits (Pillow clips them to white), and EXIF orientation is applied. One is the same
although one may argue: transparency is dropped, not composited.

Deep pixels are scaled by what the file declares, never by the values that it happens to hold, so
that two images of one camera stay comparable:

- TIFF's SMinSampleValue and SMaxSampleValue are black and white, where both are there;
- else floats run from 0 to 1, unsigned integers of b bits from 0 to 2^b - 1, signed ones from 0 to
  2^(b-1) - 1 (PGM's maxval and JPEG 2000's precision are brought to 16 bits by Pillow);
- TIFF's "white is zero" is turned over; what lies outside black and white is cut off.

Where that would show nothing, the file is refused with the reason: a tenth of its pixels lies
farther outside than black and white are apart (floats from 0 to 255, say), or 32-bit integers all
end in one level.

Metadata never cost an image its pixels: where Pillow stumbles over them, it gets the file without.
"""

import io
import math
import re
import struct
import zlib
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, TiffTags
from PIL.TiffImagePlugin import TiffImageFile

from xdino.config import MAX_PIXELS

#: What an image file is called: the suffixes of `_FORMATS`.
ARRAYS = (".npy",)  # suffixes of arrays, which are images where there are no others
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif",
    ".bmp", ".dib", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".pcx", ".sgi", ".qoi",
)  # fmt: skip

#: Bytes at the start of a file that `recognised` looks at.
HEAD = 32

# Pillow's names. TGA has no signature, so it comes last. EPS, PDF, WMF, FITS and the like are left
# out: they start interpreters, or are no pictures.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "PCX", "SGI",
    "QOI", "TGA",
)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _SMIN, _SMAX = 258, 262, 339, 340, 341  # TIFF's tags
_TIFF_METADATA = (*TiffTags.TAGS_V2_GROUPS, 700, 33723, 34377, 34675)  # XMP, IPTC, Photoshop, ICC
_SCANS = 32  # of a progressive JPEG; encoders write some ten


class UnreadableImage(ValueError):
    """The bytes are no image that can be read whole; the message says why."""


def decode_picture(data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
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
    try:
        return _decode_pillow(data, channels, max_pixels)
    except UnreadableImage:
        bare = _without_metadata(data)
        if bare is None:
            raise
        try:
            turned = jpeg_orientation(data) if data[:2] == b"\xff\xd8" else None
            return _decode_pillow(bare, channels, max_pixels, turned)
        except UnreadableImage:
            pass  # the first reason is the better one
        raise


def recognised(head: bytes) -> str | None:
    """The suffix for a file that starts with `head`, by its signature; None if it is no image."""
    for suffix, signature in _SIGNATURES:
        if signature.match(head):
            return suffix
    return None


_SIGNATURES = [
    (suffix, re.compile(signature, re.DOTALL))
    for suffix, signature in (
        (".jpg", rb"\xff\xd8\xff"),
        (".png", rb"\x89PNG\r\n\x1a\n"),
        (".gif", rb"GIF8[79]a"),
        (".webp", rb"RIFF....WEBP"),
        (".avif", rb"....ftyp(avif|avis)"),
        (".tif", rb"II[*+]\0|MM\0[*+]"),
        (".bmp", rb"BM....\0\0\0\0"),
        (".jp2", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        (".qoi", rb"qoif"),
        (".ppm", rb"P[1-6f][ \t\r\n]+([0-9]|#)"),
    )
]


def check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise _too_large(f"{width} x {height}", max_pixels)


def _too_large(pixels: str, limit: int) -> UnreadableImage:
    return UnreadableImage(
        f"{pixels} pixels are more than the limit of {limit:,} pixels "
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
    except (ValueError, RuntimeError, MemoryError):
        return None
    check_size(height, width, max_pixels)
    scans = data.count(b"\xff\xda")  # pixels never hold this: an encoder puts 0 after 0xFF
    if scans > _SCANS and scans * height * width > _SCANS / 2 * max_pixels:
        raise UnreadableImage(f"its {scans:,} scans would take minutes to decode")
    if colorspace in ("CMYK", "YCCK"):
        return None
    try:
        # The exact transforms: the fast ones save 4 % and cost a level.
        image = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except (ValueError, RuntimeError, MemoryError):
        return None  # strict: this includes a warning about a file that Pillow reads in full
    return upright(image, jpeg_orientation(data))


def _jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of the segments before the pixels; from the marker on, fill bytes out."""
    segments, position = [], 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # any number of these may stand before a marker
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            position += 2
        elif marker in (0x00, 0xD9, 0xDA):
            break
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            segments.append((marker, position, end))
            position = end
    return segments


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 if none or damaged."""
    for marker, start, end in _jpeg_segments(data):
        exif = data[start + 4 : end]
        if marker == 0xE1 and exif.startswith(b"Exif\0"):
            while exif.startswith(b"Exif\0"):  # some writers put the prefix twice
                exif = exif[6:]
            return _tiff_orientation(exif)
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF header; 1 if absent or damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        for entry in _tiff_entries(tiff, order):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            # A byte, short or long, kept in the entry itself.
            if tag == _ORIENTATION and kind in (1, 3, 4):
                code = {1: "B", 3: "H", 4: "I"}[kind]
                return struct.unpack_from(order + code, tiff, entry + 8)[0]
    except struct.error:
        pass  # a damaged header says nothing about how to turn the picture
    return 1


def _tiff_entries(tiff: bytes, order: str) -> range:
    """Where the entries of the first directory start."""
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    return range(start + 2, start + 2 + 12 * count, 12)


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation; uint8 [H, W, C], contiguous."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


# Everything else


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_pillow(
    data: bytes, channels: int, max_pixels: int, orientation: int | None = None
) -> np.ndarray:
    """orientation: of the picture, where its metadata were taken away."""
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            check_size(image.height, image.width, max_pixels)
            image.load()
            if orientation is None:
                orientation = _orientation(image, data)
            return upright(_to_array(image, channels), orientation)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image, or of a kind that cannot be read") from None
    except Image.DecompressionBombError as error:  # Pillow looks at the header before we do
        found = re.search(r"\((\d+) pixels\)", str(error))
        # Pillow's own limit holds where ours is higher (`allow_pixels`).
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise _too_large(f"{int(found[1]):,}" if found else "its", limit) from error
    except MemoryError as error:
        raise UnreadableImage("it needs more memory than there is") from error
    except Exception as error:  # over damaged files its readers raise nearly anything
        lines = str(error).splitlines()
        raise UnreadableImage(f"damaged: {lines[0] if lines else type(error).__name__}") from error


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation of a loaded image, 1 where it is damaged."""
    if data[:2] == b"\xff\xd8":
        return jpeg_orientation(data)
    if image.format == "TIFF":
        return 1  # Pillow has turned it already
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - a damaged header says nothing about how to turn the picture
        return 1


def from_pillow(image: Image.Image, channels: int) -> np.ndarray:
    """An image that somebody opened with Pillow: uint8 [H, W, channels], by the rules of `decode`."""
    return np.ascontiguousarray(_to_array(ImageOps.exif_transpose(image), channels))


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        gray = _eight_bits(image)[..., None]
        return np.repeat(gray, channels, axis=2)
    return np.array(image.convert("RGB" if channels == 3 else "L")).reshape(
        image.height, image.width, channels
    )


# Deep pixels


def _eight_bits(image: Image.Image) -> np.ndarray:
    """One channel of deep pixels -> uint8 [H, W], by the rule at the top."""
    low, high = _black_and_white(image)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    levels = np.asarray(image)
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
        levels = levels.view(np.uint32)  # Pillow has no unsigned mode and wraps them
    # Sixteen bits fit float32, which halves the memory.
    levels = levels.astype(np.float32 if image.mode.startswith("I;") else np.float64)
    if not np.isfinite(levels).all():
        raise UnreadableImage("it holds pixels that are not finite")
    varied = levels.max() > levels.min()
    levels -= low
    levels *= 255 / (high - low)
    if ((levels < -255) | (levels > 510)).mean() > 0.1:
        raise UnreadableImage(
            f"its pixels are not between {low:g} and {high:g}, black and white of their type; "
            "declare others (TIFF's SMinSampleValue and SMaxSampleValue)"
        )
    np.clip(levels, 0, 255, out=levels)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        np.subtract(255, levels, out=levels)
    gray = np.rint(levels, out=levels).astype(np.uint8)
    if image.mode == "I" and varied and high > 65535 and gray.min() == gray.max():
        raise UnreadableImage(
            f"its 32-bit pixels use less than one 256th of what lies between {low:g} and {high:g}, "
            "black and white of their type; declare others (TIFF's SMinSampleValue and "
            "SMaxSampleValue), or write 16 bits"
        )
    return gray


def _black_and_white(image: Image.Image) -> tuple[float, float]:
    """The values that mean black and white."""
    if not isinstance(image, TiffImageFile):
        return (0, 1) if image.mode == "F" else (0, 65535)
    tags = image.tag_v2
    said = [_first_number(tags.get(tag)) for tag in (_SMIN, _SMAX)]
    if all(map(math.isfinite, said)) and said[0] < said[1]:
        return said[0], said[1]
    if image.mode == "F":
        return 0, 1
    bits = tags.get(_BITS, (16,))[0]
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    return 0, 2 ** (bits - signed) - 1


def _first_number(value: object) -> float:
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if isinstance(first, int | float) else math.nan


# Metadata


def _without_metadata(data: bytes) -> bytes | None:
    """The file without what is not needed for its pixels, None where there is nothing to drop."""
    bare = None
    if data[:2] == b"\xff\xd8":
        bare = _bare_jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        bare = _bare_png(data)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        bare = _bare_tiff(data)
    elif data[4:8] == b"ftyp":
        # AVIF: an item of a type that no reader knows. Its table of items is near the start.
        bare = data[:65536].replace(b"Exif", b"free") + data[65536:]
    return bare if bare != data else None


def _bare_jpeg(data: bytes) -> bytes:
    """Without comments and APP segments, but for JFIF's and Adobe's: these say what colours mean."""
    kept, after = bytearray(data[:2]), 2
    for marker, start, after in _jpeg_segments(data):
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept += data[start:after]
    return bytes(kept + data[after:])


def _bare_png(data: bytes) -> bytes:
    """Without text, profiles and animation; EXIF stays where it is whole."""
    kept, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        kind, chunk = data[position + 4 : position + 8], data[position:end]
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or (
            kind == b"eXIf" and chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        ):
            kept += chunk
        position = end
    return bytes(kept)


def _bare_tiff(data: bytes) -> bytes:
    """With the references to EXIF, GPS and the like renamed to a tag that means nothing."""
    order = "<" if data[:2] == b"II" else ">"
    kept = bytearray(data)
    try:
        for entry in _tiff_entries(data, order):
            (tag,) = struct.unpack_from(order + "H", data, entry)
            if tag in _TIFF_METADATA:
                struct.pack_into(order + "H", kept, entry, 65000)
    except struct.error:
        pass
    return bytes(kept)
