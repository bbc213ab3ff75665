"""Statistics of images of bands: measured once from a sample, and written into the run's configuration.

ImageNet's mean and standard deviation are of colours; what a sensor's bands have nobody knows before.
The sample follows from the number of images alone, so every process and every start measures the same.

Letters: n bands.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from xdino.config.bands import Bands, worked_out
from xdino.data import Source
from xdino.data.decode import UnreadableImage
from xdino.data.source import SENSORS
from xdino.errors import UsageError
from xdino.runtime import rng

SAMPLED = 256  # images
FEW = 9  # that are tried where nothing is measured
_PIXELS = 1 << 14  # of an image, about: evenly spread
_DIM = 32  # of 255: where nearly all pixels are darker, 8 bits are too few for them
_LEAST = 1 / 255  # of a standard deviation: a band without content divides by it


def measured(config: Any, source: Source, views: str = "crops") -> Any:
    """The configuration with the number of bands, their colours, mean and standard deviation.

    Of photographs as it is. views: the section that statistics belong to.

    Raises:
        UsageError: none of the sample can be read.
    """
    bands = source.channels
    if not isinstance(bands, Bands):
        return config
    given = getattr(config, views)
    if given.mean is not None and given.std is not None:
        return worked_out(config, bands, given.mean, given.std, views)
    mean, std, bright = _statistics(source)
    source.remarks += _remarks(source, bright)
    return worked_out(config, bands, mean, std, views)


def too_dim(source: Source) -> list[str]:
    """A sentence where bands use little of what was declared; none of photographs."""
    try:
        return (
            _remarks(source, _statistics(source)[2]) if isinstance(source.channels, Bands) else []
        )
    except UsageError:
        return []


def _remarks(source: Source, bright: float) -> list[str]:
    if bright >= _DIM:
        return []
    return [
        f"the pixels of {source.name} reach {bright / 255:.0%} of white, and 8 bits are few for so "
        "little: declare what is black and white in them, --data.range 0,4095 say"
    ]


def _statistics(source: Source) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Mean and standard deviation of every band, on a scale of 0 to 1, and what one in a thousand
    levels is above."""
    count, sums, squares = 0, np.zeros(int(source.channels)), np.zeros(int(source.channels))
    levels = np.zeros(256, np.int64)
    for pixels in _sample(source):
        count += len(pixels)
        sums += pixels.sum(0, dtype=np.int64)
        squares += (pixels.astype(np.int64) ** 2).sum(0)
        levels += np.bincount(pixels.ravel(), minlength=256)
    if not count:
        raise _unreadable(source, SAMPLED)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    bright = float(np.searchsorted(levels.cumsum(), 0.999 * levels.sum()))
    return _rounded(mean / 255), _rounded(np.maximum(std / 255, _LEAST)), bright


def check_bands(source: Source) -> None:
    """Raises UsageError where images may be of bands, and none of a few can be read as asked for."""
    bands = isinstance(source.channels, Bands) or source.member(0).lower().endswith(SENSORS)
    if bands and next(_sample(source, FEW), None) is None:
        raise _unreadable(source, FEW)


def _unreadable(source: Source, tried: int) -> UsageError:
    return UsageError(
        f"none of {min(tried, len(source))} images of {source.name} that were tried can be read "
        f"as {int(source.channels)} bands{_first_reason(source)}"
    )


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def _sample(source: Source, most: int = SAMPLED) -> Iterator[np.ndarray]:
    """uint8 [pixels, n] of each image that can be read."""
    for index in rng.sample(b"bands", most, len(source)).tolist():
        try:
            image = source.read(index)
        except (UnreadableImage, OSError):
            continue
        step = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / _PIXELS)))
        yield image[::step, ::step].reshape(-1, image.shape[2])


def _first_reason(source: Source) -> str:
    try:
        source.read(int(rng.sample(b"bands", SAMPLED, len(source))[0]))
    except (UnreadableImage, OSError) as error:
        return f": {error}"
    return ""
