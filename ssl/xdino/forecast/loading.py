"""What it takes to read, decode and crop an image on one core of this machine."""

import io
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from xdino.augment import MultiCrop
from xdino.config.bands import Bands, channels_of
from xdino.data import CropLoader, Source, open_source
from xdino.runtime import rng

SECONDS, LEAST_LAPS = 1.0, 3
MADE_SIZE = (400, 500)  # of the image that stands in where there is no data: 0.2 megapixels


@dataclass(frozen=True)
class Loading:
    """Seconds an image takes one core; `said`: which images."""

    seconds: float
    said: str


def time_loading(source: Source | None, crops: MultiCrop, seconds: float = SECONDS) -> Loading:
    """Load for about so many seconds, in this thread; None: a made JPEG of 0.2 megapixels, an array
    of bands.

    Raises:
        RunFailed: too many images cannot be read.
    """
    if source is not None:
        laps, count = _laps(source, crops, seconds)
        return Loading(statistics.median(laps), f"{count} of its images")
    with tempfile.TemporaryDirectory() as folder:
        channels = channels_of(crops.channels, None)
        bands = isinstance(channels, Bands)
        made = _array(crops.channels) if bands else _jpeg()
        (Path(folder) / ("made.npy" if bands else "made.jpg")).write_bytes(made)
        laps, _ = _laps(open_source(folder, channels=channels), crops, seconds)
    kind = "array" if bands else "JPEG"
    return Loading(
        statistics.median(laps), f"a made {kind} of 0.2 megapixels and {len(made) / 1e3:.0f} kB"
    )


def _laps(source: Source, crops: MultiCrop, seconds: float) -> tuple[list[float], int]:
    """Seconds an image, micro-batch by micro-batch, and how many images they were."""
    batch = min(8, len(source))
    loader = CropLoader(source, crops, batch, seed=0, workers=0, max_bad_share=1.0)
    batches = loader.iterate(0, 1 << 40)
    laps: list[float] = []
    next(batches)  # compiles, and reads what the system has to find first
    ends = time.perf_counter() + seconds
    while len(laps) < LEAST_LAPS or time.perf_counter() < ends:
        began = time.thread_time()  # what other programs take is not the image's
        next(batches)
        laps.append((time.thread_time() - began) / batch)
    batches.close()
    return laps, batch * len(laps)


def _array(bands: int) -> bytes:
    """Noise of so many bands in 16 bits, as bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, rng.subset().integers(0, 1 << 16, (*MADE_SIZE, bands), np.uint16))
    return buffer.getvalue()


def _jpeg() -> bytes:
    """Something between a photograph and noise, as bytes of a JPEG."""
    height, width = MADE_SIZE
    coarse = rng.subset().integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.int16)
    grain = rng.subset().integers(-12, 13, (height, width, 1), np.int16)
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
