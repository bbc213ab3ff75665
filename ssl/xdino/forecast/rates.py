"""How fast a configuration trains here: a few real steps of it, timed.

The steps are those of the run: its images through its loader's threads, its networks, its processes.
The first ones are left out, for they compile, and the batches that were made ahead meanwhile hide how
fast the loader is.
"""

import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from xdino import checkpoint
from xdino.config import Config
from xdino.pretraining import Pretraining
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device, without_trace

LEAST_STEPS, LEAST_WARM = 4, 2
BLOCK = 5  # steps between two looks at a GPU's clock: each look lets it run dry


@dataclass(frozen=True)
class Rates:
    """What was found.

    Args:
        seconds_per_step: the mean of the middle half of the timed steps, logging included.
        images_per_step: of all processes.
        peak_bytes: of the GPU's memory; of a CPU's, the process's largest resident size so far.
        precision: "fp32", "bf16" or "fp16", as resolved.
        device: "cpu", "cuda:0", ...
        cores: threads that torch computes with.
        steps_per_epoch, images: of the plan.
        steps: how many were timed.
        spread: of the timed steps, the quartiles' distance over the median.
        wait_share: of the timed steps, the share that waited for images.
        plan_seconds: what comes first at every start: data opened, networks built.
        warm_seconds: the steps before the timed ones, with what is compiled in them.
        state_seconds: to write one state of the run (where a folder was given for it).
    """

    seconds_per_step: float
    images_per_step: int
    peak_bytes: int
    precision: str
    device: str
    cores: int
    steps_per_epoch: int
    images: int
    steps: int
    spread: float = 0.0
    wait_share: float = 0.0
    plan_seconds: float = 0.0
    warm_seconds: float = 0.0
    state_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images_per_step / self.seconds_per_step


def time_steps(
    config: Config,
    steps: int = 20,
    warm: int | None = None,
    seconds: float | None = None,
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Train some steps of `config` and forget them: nothing is written, no random number is missed.

    Of several processes all have to call it.

    Args:
        steps: to be timed, at most. warm: before them; by default what the loader makes ahead and two.
        seconds: fewer steps where they would take longer, but `LEAST_STEPS`.
        folder: where writing a state is tried; what is written there is removed at once.

    Raises:
        UsageError, RunFailed: as a run of this configuration would. torch's own error where the
            memory does not suffice.
    """
    began = clock()
    warm = config.runtime.prefetch + 2 if warm is None else warm
    blocks = -(-steps // _block(config))
    job = _planned(config, 1 + warm + blocks * _block(config))
    with without_trace(job.device), tempfile.TemporaryDirectory() as nowhere:
        job.build(from_init=True)
        job.open(known_bad=[])
        # The second step is the first one: a run draws its first batch.
        job.start(1)
        planned = clock()
        try:
            lap = _Laps(job, Path(nowhere), clock)
            last = _warmed(lap, warm, seconds, clock)
            if seconds is not None:
                bound = max(1, int(seconds / max(last, 1e-9)) // _block(config))
                least = -(-LEAST_STEPS // _block(config))
                blocks = distributed.from_first(lambda: max(least, min(blocks, bound)))
            warmed, waited = clock(), job.wait_seconds
            laps = [lap.block(_block(config)) for _ in range(blocks)]
            waited = job.wait_seconds - waited
        finally:
            job.close()
        found = dataclasses.replace(
            _rates(job, laps),
            wait_share=min(1.0, waited / max(sum(laps) * _block(config), 1e-9)),
            plan_seconds=planned - began,
            warm_seconds=warmed - planned,
            state_seconds=_state_seconds(job, folder, clock),
        )
        return distributed.from_first(lambda: found)


def _block(config: Config) -> int:
    return BLOCK if resolve_device(config.runtime.device).type == "cuda" else 1


def _planned(config: Config, iterations: int) -> Pretraining:
    """A job of at least so many iterations; its epochs are as many as that takes."""
    job = Pretraining(config)
    job.make_plan(config)
    if job.iterations < iterations:
        epochs = -(-iterations // job.steps_per_epoch)
        train = dataclasses.replace(config.train, epochs=epochs)
        job.make_plan(dataclasses.replace(config, train=train))
    return job


def _warmed(lap: "_Laps", warm: int, seconds: float | None, clock: Callable[[], float]) -> float:
    """Seconds of the last of the steps before the timed ones; fewer steps where they take long."""
    began, last = clock(), lap.block(1)
    for done in range(1, warm):
        late = seconds is not None and done >= LEAST_WARM and clock() - began > seconds
        if distributed.any_true(late):
            break
        last = lap.block(1)
    return last


class _Laps:
    """Steps of a job, one block after the other."""

    def __init__(self, job: Pretraining, folder: Path, clock: Callable[[], float]) -> None:
        self.job, self.folder, self.clock = job, folder, clock
        self.number = 1

    def block(self, steps: int) -> float:
        """Seconds a step of the next `steps` steps."""
        job = self.job
        self._settle()
        began = self.clock()
        for _ in range(steps):
            self.number += 1
            logs = self.number % job.config.runtime.log_every == 0
            result = job.step(self.number, 1.0, logs, self.folder)
            if logs:
                result.loss  # noqa: B018 - waits for the device, as logging does
        self._settle()
        return (self.clock() - began) / steps

    def _settle(self) -> None:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize(self.job.device)


def _rates(job: Pretraining, laps: list[float]) -> Rates:
    middle, spread = _middle(laps)
    device = job.device
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_gpu = device.type == "cuda"
    return Rates(
        seconds_per_step=middle,
        images_per_step=job.images_per_step,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else resident,
        precision=job.plan.precision,
        device=str(device),
        cores=torch.get_num_threads(),
        steps_per_epoch=job.steps_per_epoch,
        images=len(job.plan.source),
        steps=len(laps) * _block(job.config),
        spread=spread,
    )


def _middle(laps: list[float]) -> tuple[float, float]:
    """The mean of the middle half, and the distance of the quartiles over the median.

    The median's deafness to a stray step, without its grain where a loader makes steps alternate.
    """
    ordered, cut = sorted(laps), len(laps) // 4
    half = ordered[cut : len(ordered) - cut]
    return statistics.fmean(half), (half[-1] - half[0]) / statistics.median(ordered)


def _state_seconds(job: Pretraining, folder: Path | None, clock: Callable[[], float]) -> float:
    """What it takes to write one state and its weights."""
    if folder is None or distributed.rank() != 0:
        return 0.0
    began = clock()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        checkpoint.save_state(Path(place) / "state.pt", job.state_dict(0))
        job.export(Path(place) / checkpoint.BACKBONE_FILE, 0)
        return clock() - began
