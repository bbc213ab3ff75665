"""Which device a name means, on this machine and for this process, and the precision that suits it.

The one place that decides either.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from xdino import values
from xdino.errors import UsageError
from xdino.runtime import rendezvous

#: What torch.compile makes for CPUs corrupts memory before it: seen with 2.11 and 2.12, not with 2.13.
COMPILES_FOR_CPUS = (2, 13)
PRODUCTS = 7  # timed in each precision; the first ones compile
_PRECISIONS = torch.float32, torch.bfloat16


def cuda_devices() -> int:
    """How many CUDA devices this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(network: nn.Module) -> torch.device:
    """Where the network's first parameter is; the CPU for a network without any."""
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def free_memory(device: torch.device) -> int | None:
    """Bytes: of a GPU, all that it has; of the machine, what is free. None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        found += [int(limit)] if limit.isdigit() else []
    except (OSError, ValueError, KeyError):
        pass
    return min(found, default=None)


def compiles(device: torch.device) -> bool:
    """Whether this torch's torch.compile is sound there."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return device.type != "cpu" or version >= COMPILES_FOR_CPUS


def check_compile(asked: bool, device: torch.device) -> None:
    """Raises UsageError where `runtime.compile` is asked for and would crash."""
    if asked and not compiles(device):
        raise UsageError(
            f"runtime.compile on a CPU needs torch {'.'.join(map(str, COMPILES_FOR_CPUS))}: what torch "
            f"{torch.__version__} makes for it crashes. Leave it off, or take a newer torch"
        )


def resolve_device(name: str) -> torch.device:
    """The device that `name` says: auto, cpu, cuda or cuda:N.

    "auto" is this process's CUDA device where there is one, else the CPU; "cuda" is this process's.

    Raises:
        UsageError: any other name, or a device that this machine does not have.
    """
    try:
        values.device(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    found = cuda_devices()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not found:
        raise UsageError(
            f"the device is to be {name}, but torch finds no CUDA device here; use cpu or auto"
        )
    here = "cuda:0" if found == 1 else f"cuda:0 to cuda:{found - 1}"
    number = rendezvous.local_rank() if name == "cuda" else int(name.removeprefix("cuda:"))
    if name == "cuda" and found == 1 and "SLURM_LOCALID" in os.environ:
        number = 0  # SLURM may show each task its own GPU alone
    if number >= found and name == "cuda":
        raise UsageError(
            f"process {number} of this machine finds no CUDA device of its own, only {here}: start "
            f"{found} at most, one a device"
        )
    if number >= found:
        raise UsageError(f"there is no device {name} here: this machine has {here}")
    return torch.device("cuda", number)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16.

    Processors: AVX512-BF16 or AMX. Without them bf16 is emulated, and ten times slower than fp32
    (tests/benchmarks/README.md).
    """
    if device.type == "cuda":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_faster_in_bf16(device: torch.device) -> bool:
    """Whether products of bf16 are worth it: on CUDA, and on a processor where they are faster.

    Having instructions for them is not enough: without AMX, which virtual machines may hide, products on
    an Intel Xeon take twice as long as in fp32 (tests/benchmarks/README.md).
    """
    return device.type == "cuda" or (multiplies_bf16(device) and _times_favour_bf16())


@functools.lru_cache(maxsize=1)
def _times_favour_bf16() -> bool:
    """Asked once a process: the quickest of a few products each, in turn, on one thread.

    The processors that were measured lie far from the bound, so that noise does not decide.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [[_product_seconds(dtype) for dtype in _PRECISIONS] for _ in range(PRODUCTS)]
    finally:
        torch.set_num_threads(threads)
    single, half = (min(taken) for taken in zip(*turns, strict=True))
    return half < single


def _product_seconds(dtype: torch.dtype) -> float:
    """CPU seconds of a product as an MLP of XCiT has it, whatever else runs on the core."""
    a, b = torch.ones(1024, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
    began = time.thread_time()
    a @ b
    return time.thread_time() - began


def resolve_precision(name: str, device: torch.device, before: str | None = None) -> str:
    """The precision that `name` says: itself, or what "auto" is on this device.

    "auto" is bf16 on CUDA, and on a processor that is faster in it. Steps were 1.2 to 2.1 times as
    fast there, and the demo learned alike (one seed; tests/benchmarks/README.md).

    Args:
        before: of a run that is continued, what it was. On a CPU it stays that if it can, so that a
            run which moves to another processor goes on as it began.
    """
    if name != "auto":
        return name
    kept = before == "fp32" or (before == "bf16" and multiplies_bf16(device))
    if device.type == "cpu" and before is not None and kept:
        return before
    return "bf16" if is_faster_in_bf16(device) else "fp32"


@contextlib.contextmanager
def without_trace(device: torch.device) -> Iterator[None]:
    """Random numbers go on as if nothing had been drawn; the peak of memory is the run's own."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        try:
            yield
        finally:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
