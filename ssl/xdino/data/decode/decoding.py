"""Bytes of an image file -> pixels: a photograph's channels, or a sensor's bands, as asked for."""

import numpy as np

from xdino.config import MAX_PIXELS
from xdino.config.bands import Bands
from xdino.data.decode import npy, tiffs
from xdino.data.decode.pictures import UnreadableImage, decode_picture
from xdino.data.decode.sensors import decode_bands


def decode(data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The first image in `data`: uint8 [H, W, channels].

    channels: `Bands` for a sensor's; a plain 3 for RGB, 1 for ITU-R 601 luma.

    Raises UnreadableImage for what is empty, not an image, truncated, or larger than `max_pixels`
    (before memory for it is taken), and ValueError for a number of channels other than 1 and 3.
    """
    if not isinstance(channels, Bands):
        if not data.startswith(npy.MAGIC):
            _refuse_bands(data, channels)
            return decode_picture(data, channels, max_pixels)
        channels = Bands(channels)
    if not data:
        raise UnreadableImage("the file is empty")
    return decode_bands(data, channels, max_pixels)


def _refuse_bands(data: bytes, channels: int) -> None:
    """Raises UnreadableImage for more bands than Pillow knows of, which it would complain of aloud."""
    bands = tiffs.samples_of(data) if data[:4] in tiffs.MAGIC else 0
    if bands and bands > tiffs.MOST_OF_PHOTOGRAPHS:
        raise UnreadableImage(
            f"it has {bands} bands, and {channels} channels are read of all images"
        )
