"""NumPy's .npy files, whose header says all: no pickle is ever opened, no memory taken unasked."""

import io
import math

import numpy as np

from xdino.config.bands import MOST
from xdino.data.decode.levels import check_type
from xdino.data.decode.pictures import UnreadableImage

MAGIC = b"\x93NUMPY"


def shape_of(data: bytes) -> tuple[int, ...]:
    """What the header says. Raises UnreadableImage for what is no image."""
    return _header(data)[0]


def type_of(data: bytes) -> np.dtype:
    """Of its numbers."""
    return _header(data)[2]


def values_of(data: bytes, count: int) -> np.ndarray:
    """[H, W, count], of files of [H, W], [H, W, count] or [count, H, W].

    Where both ends have `count`, the last is the bands.

    Raises:
        UnreadableImage: another shape, objects, or fewer numbers than the header says.
    """
    shape, fortran, dtype, start = _header(data)
    size = math.prod(shape) * dtype.itemsize
    if len(data) - start < size:
        raise UnreadableImage(
            f"it is cut short: {len(data) - start:,} bytes of the {size:,} that its header says"
        )
    flat = np.frombuffer(data, dtype, math.prod(shape), start)
    values = flat.reshape(shape, order="F" if fortran else "C")
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[2] != count and values.shape[0] == count:
        values = values.transpose(1, 2, 0)
    if values.shape[2] != count:
        have = bands_of(shape)
        found = f"{have} band{'s' * (have > 1)}" if have else f"the shape {list(shape)}"
        raise UnreadableImage(f"it has {found}, and {count} are read of all images")
    return values


def bands_of(shape: tuple[int, ...]) -> int | None:
    """How many bands an array of this shape has: of two ends that both could be, the last; None: none."""
    if len(shape) == 2:
        return 1
    return next((end for end in (shape[2], shape[0]) if 1 <= end <= MOST), None)


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
    except Exception as error:
        raise UnreadableImage("damaged: its header is none of an .npy file") from error
    check_type(dtype)
    if len(shape) not in (2, 3) or not math.prod(shape):
        raise UnreadableImage(
            f"an array of the shape {list(shape)} is no image: [H, W], [H, W, bands] or [bands, H, W]"
        )
    return tuple(shape), fortran, dtype, file.tell()
