"""Bytes of an image file -> pixels, by what was asked for: a photograph's channels, or a sensor's bands."""

import numpy as np

from xdino.config import MAX_PIXELS
from xdino.config.bands import Bands
from xdino.data.decode import npy
from xdino.data.decode.pictures import UnreadableImage, decode_picture
from xdino.data.decode.sensors import decode_bands


def decode(data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The first image in `data`: uint8 [H, W, channels].

    channels: `Bands` for a sensor's; a plain 3 for RGB, 1 for ITU-R 601 luma.

    Raises UnreadableImage for what is empty, not an image, truncated, or larger than `max_pixels`
    (before memory for it is taken), and ValueError for a number of channels other than 1 and 3.
    """
    if not isinstance(channels, Bands):
        if data.startswith(npy.MAGIC):
            channels = Bands(channels)
        else:
            return decode_picture(data, channels, max_pixels)
    if not data:
        raise UnreadableImage("the file is empty")
    return decode_bands(data, channels, max_pixels)
