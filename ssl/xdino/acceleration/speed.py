"""Are the fused kernels faster than the plain path, on this device and at the sizes of the run?"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from xdino import augment
from xdino.acceleration.equality import both_paths, failures, first_line
from xdino.augment import photometric
from xdino.xcit import XCiT

IMAGES = 32  # of the largest crop: enough that the device works, and not only its launches
REPEATS = 7
Work = Callable[[], object]


def time_both(
    plain: Work, fused: Work, wait: Work, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Median seconds of each, run in turns; the first turn, which compiles, does not count.

    `wait`: until the device has done all that it was given.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(REPEATS + 1):
        for work, found in zip((plain, fused), seconds, strict=True):
            wait()
            begun = clock()
            work()
            wait()
            found.append(clock() - begun)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def why_slower(what: str, plain: float, fused: float) -> str | None:
    """Half a sentence where `fused` seconds are no less than `plain` ones; None where they are."""
    if fused < plain:
        return None
    return f"{what} take {1e3 * fused:.2f} ms where the plain path takes {1e3 * plain:.2f} ms"


def compare_network(
    model: XCiT, crops: augment.MultiCrop, device: torch.device, autocast: torch.dtype | None
) -> str | None:
    """Why the kernels are no gain for a network of this width on these crops; None where they are.

    Two blocks of it, forward and backward, in the precision of the run.
    """
    size = crops.views[0].size

    def step(network: XCiT) -> None:
        network.zero_grad()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            tokens = network.patch_tokens(images)[0]
        tokens.float().square().mean().backward()

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        plain, fused = both_paths(model, device)
        images = torch.randn(IMAGES, model.in_chans, size, size, device=device)
        return _compared("those of the network", lambda: step(plain), lambda: step(fused), device)


def compare_views(crops: augment.MultiCrop, device: torch.device) -> str | None:
    """Why the photometric kernels are no gain for these crops on `device`; None where they are."""
    size = crops.views[0].size
    table = augment.draw_batch(crops, 0, 0, np.arange(IMAGES))[0]
    generator = torch.Generator().manual_seed(0)
    shape = IMAGES, size, size, crops.channels
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    def views(fused: bool) -> object:
        return photometric.photometric(pixels, table, crops, fused=fused)

    return _compared("the photometric ones", lambda: views(False), lambda: views(True), device)


def _compared(what: str, plain: Work, fused: Work, device: torch.device) -> str | None:
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    try:
        return why_slower(what, *time_both(plain, fused, wait))
    except failures() as error:
        return f"{what} do not run here ({first_line(error)})"
