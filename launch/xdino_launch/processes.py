"""`xdino pretrain --gpus N`: several processes on this machine by torch's own launcher.

The same as `torchrun --standalone --nproc-per-node N -m xdino_launch pretrain ...`, with the exit
codes of a single process: torchrun answers 1 whatever its workers say.
"""

import inspect
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from xdino.errors import RunFailed, Stopped, UsageError
from xdino.runtime.stopping import SIGNALS

LAUNCHED = ("WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS")
GRACE = 600  # seconds that workers have to save after a signal, before they are killed


def count(gpus: int | None, processes: int | None) -> int:
    """How many processes --gpus or --processes ask for; 1 where neither is given.

    Raises:
        UsageError: both are given, or so many cannot be started here.
    """
    if gpus is None and processes is None:
        return 1
    if gpus is not None and processes is not None:
        raise UsageError("--gpus and --processes exclude each other: GPUs have one process each")
    if any(os.environ.get(name, "1") != "1" for name in LAUNCHED):
        raise UsageError(
            "--gpus and --processes start processes, and this is one of several already: leave "
            "them out under torchrun or srun"
        )
    if gpus is not None:
        from xdino.runtime.device import cuda_devices  # imports torch, which --help does without

        there = cuda_devices()
        if gpus > there:
            advice = ": --processes N trains on the CPU" if there == 0 else ""
            raise UsageError(f"--gpus {gpus}, but this machine has {there}{advice}")
        return gpus
    assert processes is not None
    cores = os.cpu_count() or 1
    if processes > 4 * cores:
        raise UsageError(f"--processes {processes}, but this machine has {cores} cores")
    return processes


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `xdino ARGUMENTS` in `count` processes; 0 when all are done.

    Returns:
        What the processes agree on: 0, or the exit code of the first that failed.

    Raises:
        Stopped: this process was asked to stop, and passed it on.
        RunFailed: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it tells of a failure is its own traceback; the workers have said theirs in a sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    newer: dict[str, Any] = {}
    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        newer["shutdown_timeout"] = GRACE  # else 30 s: short for a large state on a slow disk
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(number.name for number in (*SIGNALS, signal.SIGHUP)),
        **newer,
    )
    command = ["-u", "-m", "xdino_launch", *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        killed = [code for code in codes if code < 0]
        if killed and len(killed) == len(codes):
            raise RunFailed(
                f"a process was killed by signal {-killed[0]}; the same command continues the run"
            ) from None
        return next(code for code in codes if code > 0)
    except SignalException as error:
        raise Stopped(
            f"stopped by {error.sigval.name}; the same command continues the run"
        ) from None
    return 0
