"""How much memory a piece of work takes at its peak, in a process of its own."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from xdino.errors import RunFailed, UsageError


def in_a_process(measure: Callable[..., float], *arguments: object, lower: str) -> float:
    """What `measure(*arguments)` gives in a new process.

    Raises:
        RunFailed: the process died; `lower` says which option to lower.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:
            raise RunFailed(
                "the process whose memory was measured died, perhaps of too little memory; "
                f"lower {lower}"
            ) from None


def status(name: str) -> float:
    """MB that the kernel reports for this process (VmRSS: now, VmHWM: the most so far)."""
    file = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", file.read_text()) if file.exists() else None
    if found is None:
        raise UsageError("--memory needs Linux's /proc, which this machine does not have")
    return int(found[1]) * 1024 / 1e6
