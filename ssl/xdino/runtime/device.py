"""Which device a name means, on this machine and for this process: the one place that decides it."""

import os

import torch

from xdino import values
from xdino.errors import UsageError
from xdino.runtime import rendezvous


def cuda_devices() -> int:
    """How many CUDA devices this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


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
