"""Bytes of an image file -> pixels: photographs of every kind, and the bands of sensors."""

from xdino.data.decode.decoding import decode
from xdino.data.decode.pictures import (
    ARRAYS,
    HEAD,
    SUFFIXES,
    UnreadableImage,
    allow_pixels,
    from_pillow,
    recognised,
)
from xdino.data.decode.sensors import bands_in, layout_of, pages_in, usual
from xdino.data.decode.shrinking import shrink_bands

__all__ = [
    "ARRAYS", "HEAD", "SUFFIXES", "UnreadableImage", "allow_pixels", "bands_in", "decode", "from_pillow",
    "layout_of", "pages_in", "recognised", "shrink_bands", "usual",
]  # fmt: skip
