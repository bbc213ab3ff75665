"""TIFF files of sensors, through tifffile: any number of bands, side by side or plane by plane.

A page is an image, its samples are the bands. Reduced copies of it (pyramids) and masks are passed
over. What writes each band as a page of its own is taken at its word only where the number of bands
was declared: a stack of slices or moments looks alike.

Letters: H x W pixels.
"""

import io
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from xdino.config.bands import MOST
from xdino.data.decode.levels import Found, Range, check_type, full_range
from xdino.data.decode.pictures import UnreadableImage, check_size, upright
from xdino.errors import UsageError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_OF_PHOTOGRAPHS = 6  # samples of a pixel that Pillow knows: two beside colour and transparency
_SAMPLES, _ORIENTATION, SMIN, SMAX = 277, 274, 340, 341  # tags
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
T = TypeVar("T")
_PAGES = 64  # looked at; no image has as many


def samples_of(data: bytes) -> int | None:
    """Bands of the first page, from its header alone; None where that is damaged."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        first, step = (start + 8, 20) if big else (start + 2, 12)
        for entry in range(first, first + min(count, 4096) * step, step):
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            if tag == _SAMPLES:
                code = {3: "H", 4: "I"}[kind]
                return int(
                    struct.unpack_from(order + code, data, entry + step - (8 if big else 4))[0]
                )
    except (struct.error, KeyError):
        return None
    return 1


def read(data: bytes, count: int, max_pixels: int) -> Found:
    """Raises UnreadableImage for what is no image of `count` bands, UsageError without tifffile."""
    return _opened(data, lambda file: _read(file, count, max_pixels))


def layout_of(data: bytes) -> tuple[int, int, int, str]:
    """Height, width, bands, and the type of the numbers. Raises as `read`."""

    def look(file: Any) -> tuple[int, int, int, str]:
        pages = _own_pages(file)
        page = pages[0]
        bands = page.samplesperpixel if page.samplesperpixel > 1 else len(pages)
        return page.imagelength, page.imagewidth, bands, str(page.dtype)

    return _opened(data, look)


def _opened(data: bytes, look: Callable[[Any], T]) -> T:
    tifffile = library()
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return look(file)
    except (UnreadableImage, UsageError):
        raise
    except MemoryError as error:
        raise UnreadableImage("it needs more memory than there is") from error
    except Exception as error:  # over damaged files it raises nearly anything
        lines = str(error).splitlines()
        raise UnreadableImage(f"damaged: {lines[0] if lines else type(error).__name__}") from error


def library() -> Any:
    """tifffile. Raises UsageError where it is not installed."""
    try:
        import tifffile
    except ImportError:
        raise UsageError(
            "TIFFs of other bands than a photograph's are read by tifffile: pip install "
            "'xdino[bands]' (or write the images as .npy)"
        ) from None
    return tifffile


def _read(file: Any, count: int, max_pixels: int) -> Found:
    pages = _own_pages(file)
    page = pages[0]
    _check_page(page, max_pixels)
    if page.samplesperpixel == count and len(pages) == 1:
        values = _values(page)
    elif page.samplesperpixel == 1 and len(pages) == count:
        for other in pages[1:]:
            _check_page(other, max_pixels)
        values = np.concatenate([_values(each) for each in pages], axis=2)
    else:
        raise UnreadableImage(_other_bands(page.samplesperpixel, len(pages), count))
    turned = page.tags.get(_ORIENTATION)
    if turned is not None and turned.value in range(2, 9):
        values = upright(values, int(turned.value))
    return Found(values, _black_white(page, values.dtype), int(page.photometric) == 0)


def _own_pages(file: Any) -> list[Any]:
    """Pages that are images of their own, the first always."""
    found = []
    for number, page in enumerate(file.pages):
        if number >= _PAGES:
            raise UnreadableImage(f"it has more than {_PAGES} pages: write one image a file")
        page = page.aspage() if hasattr(page, "aspage") else page
        kind = int(page.subfiletype or 0)
        if not number or not kind & (_REDUCED | _MASK):
            found.append(page)
    if not found:
        raise UnreadableImage("damaged: it has no page")
    return found


def _other_bands(samples: int, pages: int, count: int) -> str:
    bands = f"{samples} bands" if samples > 1 else "1 band"
    if pages > 1:
        return (
            f"it has {pages} pages of {bands}: write one image a file, its bands in one page (pages "
            "are taken for bands where model.in_chans says as many)"
        )
    most = f" (at most {MOST} are possible)" if samples > MOST else ""
    return f"it has {bands}{most}, and {count} are read of all images"


def _check_page(page: Any, max_pixels: int) -> None:
    check_size(page.imagelength, page.imagewidth, max_pixels)
    if page.imagedepth > 1:
        raise UnreadableImage(f"it is a volume of {page.imagedepth} slices: write them one by one")
    if page.samplesperpixel > MOST:
        raise UnreadableImage(_other_bands(page.samplesperpixel, 1, 0).partition(", and")[0])
    if page.dtype is None:
        raise UnreadableImage(f"its pixels of {page.bitspersample} bits cannot be read")
    check_type(np.dtype(page.dtype))


def _values(page: Any) -> np.ndarray:
    """[H, W, samples] of one page."""
    values = np.asarray(page.asarray(maxworkers=1, squeeze=False))
    # tifffile's full shape is [separate samples, depth, H, W, samples side by side].
    planes, _, height, width, together = values.shape
    if planes > 1:
        return values.reshape(planes, height, width).transpose(1, 2, 0)
    return values.reshape(height, width, together)


def _black_white(page: Any, dtype: np.dtype) -> Range:
    """SMinSampleValue and SMaxSampleValue where both are there, else all of the type."""
    said = []
    for tag in (SMIN, SMAX):
        found = page.tags.get(tag)
        value = found.value if found is not None else None
        value = value[0] if isinstance(value, tuple) and value else value
        said.append(float(value) if isinstance(value, int | float) else float("nan"))
    if np.isfinite(said).all() and said[0] < said[1]:
        return said[0], said[1]
    bits = page.bitspersample
    return full_range(dtype, bits if isinstance(bits, int) else None)
