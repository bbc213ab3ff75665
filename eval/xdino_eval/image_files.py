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

from xdino.errors import UsageError, asked, reason
from xdino.images import SUFFIXES, UnreadableImage, decode

#: What Pillow raises for damaged files; its readers of rare formats raise nearly anything.
DAMAGED = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError,
    EOFError, RuntimeError, MemoryError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
_NO_LETTER = re.compile("[\ud800-\udfff]")  # how Python keeps a byte that is no text
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def listed(folder: Path) -> list[Path]:
    """The image files directly in `folder`, by name; hidden ones and what is no file left out.

    Raises:
        UsageError: the folder cannot be listed.
    """
    with asked(f"{folder} cannot be listed"), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    found = [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
    return [folder / name for name in sorted(found)]


def shown_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is shown, from its header alone.

    Raises:
        UsageError: no file, or no image.
    """
    try:
        _regular(path)
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in _TURNED
            return (image.height, image.width) if turned else image.size
    except DAMAGED as error:
        raise UsageError(f"{path} cannot be read as an image: {_why(error)}") from None


def read(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, channels].

    Raises:
        UsageError: no file, or no image that can be read whole.
    """
    try:
        _regular(path)
        return decode(path.read_bytes(), channels)
    except DAMAGED as error:
        raise UsageError(f"{path} cannot be read as an image: {_why(error)}") from None


def _regular(path: Path) -> None:
    """Refuse what is no file before it is opened: a named pipe would never answer."""
    if path.exists() and not path.is_file():
        raise UnreadableImage("it is no regular file")


def _why(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a kind that cannot be read"
    return reason(error)


def printable(name: str | Path) -> str:
    """A file's name for pictures and for names of new files: what is no UTF-8 in it replaced.

    >>> printable(os.fsdecode(b"caf\\xe9.png")) == "caf\\N{REPLACEMENT CHARACTER}.png"
    True
    """
    return _NO_LETTER.sub("\N{REPLACEMENT CHARACTER}", str(name))
