"""Single image files that a person named or laid into a folder: listed, measured, read.

Folders of pictures hold anything: folders called `a.png`, named pipes, names in no encoding, files
cut short. Whatever is wrong with one becomes a sentence that names it.
"""

import os
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from xdino.data.decode import SUFFIXES, UnreadableImage, decode
from xdino.data.listing import entries
from xdino.errors import UsageError, asked, reason

#: What Pillow raises for damaged files; its readers of rare formats raise nearly anything.
DAMAGED = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError,
    EOFError, RuntimeError, MemoryError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
_NO_LETTER = re.compile("[\ud800-\udfff]")  # how Python keeps a byte that is no text
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


class Unreadable(UsageError):
    """A file that is no image, or not whole; where many are looked at, it may be left out."""


def listed(folder: Path) -> list[Path]:
    """The image files directly in `folder`, by name; hidden ones and what is no file left out.

    Raises:
        UsageError: the folder cannot be listed.
    """
    with asked(f"{folder} cannot be listed"):
        found = [Path(os.fsdecode(e.path)) for e in entries(os.fsencode(folder)) if e.is_file()]
    return [path for path in found if path.name.lower().endswith(SUFFIXES)]


def shown_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is shown, from its header alone.

    Raises:
        Unreadable: no file, or no image.
    """
    try:
        _regular(path)
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in _TURNED
            return (image.height, image.width) if turned else image.size
    except DAMAGED as error:
        raise Unreadable(f"{path} cannot be read as an image: {why(error)}") from None


def read(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, channels].

    Raises:
        Unreadable: no file, or no image that can be read whole.
    """
    try:
        _regular(path)
        return decode(path.read_bytes(), channels)
    except DAMAGED as error:
        raise Unreadable(f"{path} cannot be read as an image: {why(error)}") from None


def _regular(path: Path) -> None:
    """Refuse what is no file before it is opened: a named pipe would never answer."""
    if path.exists() and not path.is_file():
        raise UnreadableImage("it is no regular file")


def why(error: BaseException) -> str:
    """What is wrong with an image, in half a sentence."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a kind that cannot be read"
    return reason(error)


def printable(name: str | Path) -> str:
    """A file's name for pictures and for names of new files: what is no UTF-8 in it replaced.

    >>> printable(os.fsdecode(b"caf\\xe9.png")) == "caf\\N{REPLACEMENT CHARACTER}.png"
    True
    """
    return _NO_LETTER.sub("\N{REPLACEMENT CHARACTER}", str(name))
