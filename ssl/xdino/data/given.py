"""Images as somebody hands them over in Python: paths, Pillow's images, arrays, tensors.

Each becomes uint8 [H, W, C] by the rules that files are read by: orientation applied, grey repeated
to three channels, colours weighed to one, transparency dropped. A list may mix all kinds.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from xdino.data import image_files
from xdino.data.decode import from_pillow
from xdino.data.files import FileSource, open_folder
from xdino.errors import UsageError, asked

Given = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""One image: a path; Pillow's; an array [H, W] or [H, W, C]; a tensor [H, W] or [C, H, W]. Pixels are
uint8, or floats from 0 to 1; channels 1, 3, or 4 with transparency."""

_CHANNELS = (1, 3, 4)


def one_by_one(images: Given | Iterable[Given]) -> Iterator[Given]:
    """The images of what was given: itself, those of a list, a batch or a folder.

    A batch is an array [N, H, W] or [N, H, W, C], or a tensor [N, C, H, W]; a folder stands for all
    images below it, sorted by their paths.

    Raises:
        UsageError: none of these.
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        with asked(str(images)):
            folder = path.is_dir()
        yield from _below(path) if folder else [images]
    elif isinstance(images, np.ndarray | Tensor):
        yield from images if _is_batch(images) else [images]
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, Iterable):
        yield from images
    else:
        raise _not_an_image(images)


def single(image: Given) -> Given:
    """The one image of what was given.

    Raises:
        UsageError: there are more, or none.
    """
    found = list(islice(one_by_one(image), 2))
    if len(found) != 1:
        raise UsageError(f"one image is needed here, got {'none' if not found else 'several'}")
    return found[0]


def _below(folder: Path) -> list[str]:
    source = open_folder(str(folder), folder, None, 3, labelled=False)
    if not isinstance(source, FileSource):
        raise UsageError(f"{folder} holds tars and no image files: `xdino features` reads those")
    return [source.path(i) for i in range(len(source))]


def _is_batch(pixels: np.ndarray | Tensor) -> bool:
    """Three dimensions are one image where they end (a tensor's: begin) in a number of channels."""
    if pixels.ndim == 3:
        return pixels.shape[0 if isinstance(pixels, Tensor) else 2] not in _CHANNELS
    return pixels.ndim == 4


def pixels_of(image: Given, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]; `channels` 1 or 3.

    Raises:
        UsageError: no image, or one that cannot be read whole; the message names the file.
    """
    if isinstance(image, str | os.PathLike):
        path = Path(image).expanduser()
        with asked(str(image)):
            if not path.is_file():
                raise UsageError(f"there is no image file {path}")
        return image_files.read(path, channels)
    if isinstance(image, Image.Image):
        try:
            return from_pillow(image, channels)
        except image_files.DAMAGED as error:
            why = image_files.why(error)
            raise UsageError(f"an image of Pillow cannot be read: {why}") from None
    if isinstance(image, Tensor):
        if image.ndim == 3:
            image = image.permute(1, 2, 0)
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return from_pillow(Image.fromarray(_eight_bits(image)), channels)
    raise _not_an_image(image)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3 or 4] of an array of pixels."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in _CHANNELS):
        raise UsageError(
            "an image is an array [height, width] or [height, width, 1, 3 or 4 channels], or a "
            f"tensor [channels, height, width]; got the shape {list(pixels.shape)}"
        )
    if not pixels.size:
        raise UsageError(f"an image without pixels: its shape is {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UsageError(f"pixels must be uint8, or floats from 0 to 1; got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(
            f"pixels of floats must lie from 0 to 1, got {low:.3g} to {high:.3g}: divide by 255, or "
            "give a batch that is normalised already to the network itself, model(batch)"
        )
    return np.rint(pixels * 255).astype(np.uint8)


def _not_an_image(image: Any) -> UsageError:
    return UsageError(
        "an image is a path, an array, a tensor or an image of Pillow, got "
        f"{'None' if image is None else f'a {type(image).__name__}'}"
    )


def in_batches(images: Iterable[Given], size: int) -> Iterator[Sequence[Given]]:
    """`size` at a time, the last ones as many as are left."""
    rest = iter(images)
    while batch := list(islice(rest, size)):
        yield batch
