"""Bytes of an image file -> pixels: photographs of every kind, and the bands of sensors."""

from xdino.data.decode.decoding import decode
from xdino.data.decode.pictures import (
    HEAD,
    SUFFIXES,
    UnreadableImage,
    allow_pixels,
    from_pillow,
    recognised,
)
from xdino.data.decode.sensors import bands_in, layout_of, pages_in, usual

__all__ = [
    "HEAD", "SUFFIXES", "UnreadableImage", "allow_pixels", "bands_in", "decode", "from_pillow",
    "layout_of", "pages_in", "recognised", "usual",
]  # fmt: skip
