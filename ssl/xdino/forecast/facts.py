"""What `choices` is told: of the images by a sample, of the machine by a few numbers."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from xdino.config.bands import Bands
from xdino.data import Source
from xdino.data.decode import UnreadableImage
from xdino.errors import UsageError
from xdino.plan.feasibility import free_memory
from xdino.runtime import rng
from xdino.runtime.device import is_faster_in_bf16

SAMPLED = 64  # images
PATIENCE = 5.0  # seconds for them; huge ones take a tenth each
LEAST_SAMPLED = 4


@dataclass(frozen=True)
class Images:
    """A data set, by a sample of it.

    Args:
        count: of images to train on.
        side: median of the shorter sides, in pixels. smallest, largest: of the sample.
        channels: of the source: 1 where nobody has to say so, 3 of files.
        grey: whether every pixel of the sample is grey.
        mean, std: of the grey levels of the sample, from 0 to 1.
        labelled: whether there are labelled images to judge by.
        sampled: how many were read.
    """

    count: int
    side: int
    smallest: int
    largest: int
    channels: int = 3
    grey: bool = False
    mean: float = 0.449
    std: float = 0.226
    labelled: bool = False
    sampled: int = SAMPLED


@dataclass(frozen=True)
class Machine:
    """Where the run is to be.

    Args:
        device: "cpu" or "cuda". cores: threads that torch computes with, of each process.
        cpus: cores of the machine. bf16: whether the device is faster in it.
        memory: bytes of the GPU, or of the machine as far as they are free; None: nobody tells.
        processes: that train together.
    """

    device: str
    cores: int
    cpus: int
    bf16: bool
    memory: int | None = None
    processes: int = 1


def look_at(source: Source, labelled: bool, clock: Callable[[], float] = time.monotonic) -> Images:
    """A sample of the images: the same ones every time, fewer where they take long.

    Raises:
        UsageError: none of the sample can be read.
    """
    began, grey = clock(), not isinstance(source.channels, Bands)
    sides: list[int] = []
    levels: list[np.ndarray] = []
    chosen = rng.sample(b"sides", SAMPLED, len(source))
    # Not in their order: where patience ends early, the last folders were seen as well.
    for index in np.concatenate([chosen[start::8] for start in range(8)]).tolist():
        if len(sides) >= LEAST_SAMPLED and clock() - began > PATIENCE:
            break
        try:
            image = source.read(index)
        except (UnreadableImage, OSError):
            continue
        sides.append(min(image.shape[:2]))
        grey = grey and bool((image == image[..., :1]).all())
        pixels = image[:: max(1, len(image) // 64), :: max(1, image.shape[1] // 64), 0]
        levels.append(pixels.astype(np.float64).ravel() / 255)
    if not sides:
        raise UsageError(
            f"none of {min(SAMPLED, len(source))} images of {source.name} that were tried can be read"
        )
    seen = np.concatenate(levels)
    return Images(
        count=len(source),
        side=int(np.median(sides)),
        smallest=min(sides),
        largest=max(sides),
        channels=source.channels,
        grey=grey,
        mean=round(float(seen.mean()), 3),
        std=round(max(float(seen.std()), 0.01), 3),
        labelled=labelled,
        sampled=len(sides),
    )


def machine_of(device: torch.device, processes: int) -> Machine:
    """This machine, for each of so many processes on `device`."""
    return Machine(
        device=device.type,
        cores=torch.get_num_threads(),
        cpus=os.cpu_count() or 1,
        bf16=is_faster_in_bf16(device),
        memory=free_memory(device),
        processes=processes,
    )
