"""Whether the fused kernels are the faster ones here, on work of the run's own shape."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from xdino.acceleration import equality, graphs
from xdino.augment import MultiCrop, draw_batch, photometric
from xdino.runtime.device import without_trace
from xdino.xcit import XCiT

ROUNDS = 7  # each runs both paths in turn, since a device warms up and throttles
FASTER_BY = 1.03  # two timings of one and the same path differ by as much


@dataclass(frozen=True)
class Comparison:
    """Seconds of both paths, one of each a round."""

    plain: list[float]
    fused: list[float]

    @property
    def speedup(self) -> float:
        """How many times as fast the kernels are: the median of the rounds' ratios."""
        return statistics.median(p / f for p, f in zip(self.plain, self.fused, strict=True))

    def why_not(self) -> str | None:
        """Why not to take the kernels; None where they are faster."""
        if self.speedup >= FASTER_BY:
            return None
        ours, theirs = (1e3 * statistics.median(x) for x in (self.fused, self.plain))
        return f"they are not faster here ({ours:.1f} ms against {theirs:.1f} ms)"


def tried(compare: Callable[[], Comparison]) -> tuple[Comparison | None, str | None]:
    """A comparison and why not to take the kernels; no comparison where one path did not run."""
    try:
        found = compare()
    except equality.failures() as error:
        return None, f"they cannot be timed here ({equality.first_line(error)})"
    return found, found.why_not()


def in_turns(
    plain: Callable[[], object],
    fused: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Both timed `ROUNDS` times, after two runs of each to compile and to settle."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(work: Callable[[], object]) -> float:
        wait()
        began = clock()
        work()
        wait()
        return clock() - began

    for work in (plain, fused, plain, fused):
        work()
    rounds = [(seconds(plain), seconds(fused)) for _ in range(ROUNDS)]
    return Comparison([p for p, _ in rounds], [f for _, f in rounds])


def compare_networks(
    model: XCiT,
    crops: MultiCrop,
    images: int,
    device: torch.device,
    autocast: torch.dtype | None,
    recorded: bool = False,
) -> Comparison:
    """The student's forward and backward pass over `images` images' crops, on both paths.

    recorded: as CUDA graphs, where they can be recorded.
    """
    with without_trace(device):
        depth, rate = len(model.blocks), equality.drop_path_rate(model)
        plain, fused = equality.twins(model, depth, rate, device)
        groups = [
            torch.randn(views * images, model.in_chans, size, size, device=device)
            for size, views in crops.groups
        ]

        def step(network: XCiT) -> None:
            network.zero_grad()
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                features = torch.cat([network(group) for group in groups])
            features.float().square().mean().backward()

        as_run = graphs.replayed if recorded else lambda work: work
        return in_turns(as_run(lambda: step(plain)), as_run(lambda: step(fused)), device)


def compare_views(crops: MultiCrop, images: int, device: torch.device) -> Comparison:
    """From uint8 crops on the device to views, of `images` images, on both paths."""
    with without_trace(device):
        table = draw_batch(crops, 0, 0, np.arange(images))  # [V, B]
        work, first = [], 0
        for size, views in crops.groups:
            shape = (views * images, size, size, crops.channels)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            work.append((pixels, table[first : first + views].reshape(-1)))
            first += views

        def make(fused: bool) -> None:
            for pixels, rows in work:
                photometric.photometric(pixels, rows, crops, fused=fused)

        return in_turns(lambda: make(False), lambda: make(True), device)
