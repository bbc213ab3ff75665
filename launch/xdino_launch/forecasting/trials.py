"""Steps that are trained to be timed, in a process of their own.

So that the memory is theirs: a process's peak forgets nothing that it held before. It imports what
pretraining imports.
"""

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from xdino.config import Config
from xdino.errors import RunFailed
from xdino.forecast.costs import Workload, count_step, kept, memory_bytes
from xdino.forecast.machines import Machine
from xdino.forecast.outlook import Trial
from xdino.forecast.rates import Rates, time_steps
from xdino_launch import local  # noqa: F401 - what pretraining imports is part of its memory

Found = TypeVar("Found")

STEPS, SECONDS = 30, 12.0  # of a trial, at most
LONGEST_STEP = 5.0  # seconds that a step may take by what is counted; else fewer images are tried
MEMORY_SHARE = 0.5  # of what is free, that a trial may take
LARGEST_STATE = 2 << 30  # bytes of a checkpoint that is written to be timed


def try_out(work: Workload, machine: Machine) -> Trial:
    """Train some steps of `work` here, at a batch that takes seconds and fits.

    Raises:
        UsageError, RunFailed: as a run of this configuration would.
    """
    small = work.with_batch(_affordable(work, machine))
    began = time.time()
    rates, started = in_a_process(_timed, small.config, kept(work).state <= LARGEST_STATE)
    return Trial(rates, small, max(0.0, started - began))


def in_a_process(call: Callable[..., Found], *arguments: object) -> Found:
    """Run `call` in a fresh process.

    Raises:
        RunFailed: it was killed.
    """
    context = multiprocessing.get_context("spawn")
    # Where a person interrupts, it ends without a traceback.
    quiet = signal.SIGINT, signal.SIG_DFL
    with ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=quiet) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool:
            raise RunFailed(
                "the trial of a few steps was killed, mostly for want of memory: lower "
                "train.batch_size"
            ) from None


def _timed(config: Config, with_state: bool) -> tuple[Rates, float]:
    began = time.time()
    folder = Path(tempfile.gettempdir()) if with_state else None
    return time_steps(config, STEPS, seconds=SECONDS, folder=folder), began


def _affordable(work: Workload, machine: Machine) -> int:
    """Images of a micro-batch for a trial: all of them where a step takes seconds and fits."""
    B = work.config.train.batch_size
    step, held = count_step(work), kept(work)
    longest = machine.seconds(step, work.precision) / LONGEST_STEP
    room = MEMORY_SHARE * machine.memory
    needed = machine.needs(memory_bytes(work, held, step), work.precision, step.peak)
    fullest = (needed - held.state) / max(room - held.state, 1.0) if room else 0.0
    share = max(longest, fullest)
    return B if share <= 1 else max(2, min(B, int(B / share)))
