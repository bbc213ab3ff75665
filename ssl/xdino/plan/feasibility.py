"""Whether a run can start: do the networks take these crops, is there room in memory and on disk.

Networks are tried on torch's "meta" device, which works out shapes and computes nothing: a forward
pass takes milliseconds, no memory, and leaves no trace in weights, statistics or random numbers.
What meta refuses is tried once more for real on a copy, since some networks ask their tensors for
values. Bytes are compared with what is free to refuse what clearly cannot be; what barely fits is
the machine's to decide.
"""

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from xdino.errors import UsageError, reason
from xdino.runtime import device as devices

Network = TypeVar("Network", bound=nn.Module)

# What networks raise over shapes that they do not take; timm's assert, multiply and divide.
_REFUSALS = (RuntimeError, ValueError, AssertionError, TypeError, LookupError, ArithmeticError)
_LARGEST_TRIED = 2**31  # bytes of weights and pixels of a network that is tried for real


@dataclass(frozen=True)
class Trial:
    """One forward pass that must work: `batch` images of `size` pixels; `key` asked for them."""

    key: str
    size: int
    batch: int = 2
    training: bool = True
    builds: bool = False  # the network is made for this size


def on_meta(build: Callable[[], Network]) -> Network:
    """What `build` makes, without its memory; what cannot be made so, for real.

    Raises:
        UsageError: as `build`.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (UsageError, *_REFUSALS):
            return build()


def why_not(
    network: nn.Module, channels: int, trial: Trial, real: Callable[[], nn.Module] | None = None
) -> str | None:
    """Why the network does not take such images, in half a sentence; None where it does.

    The network itself is left as it is. `real` builds one that computes, where this is on meta.
    """
    shape = trial.batch, channels, trial.size, trial.size
    found = _try(copy.deepcopy(network).to("meta"), shape, trial.training)
    if found is None:
        return None
    if next(network.parameters()).is_meta:
        if real is None or _bytes(network) + 4 * channels * trial.size**2 > _LARGEST_TRIED:
            return found
    else:
        real = copy.deepcopy(network).cpu
    with torch.random.fork_rng(devices=[]):
        return _try(real(), shape, trial.training)


def _try(network: nn.Module, shape: tuple[int, ...], training: bool) -> str | None:
    network.train(training)
    parameter = next(network.parameters())
    try:
        with torch.no_grad():
            out = network(torch.zeros(shape, device=parameter.device, dtype=parameter.dtype))
    except _REFUSALS as error:
        return reason(error) if str(error) else "its layers do not fit together there"
    width = network.embed_dim
    if not isinstance(out, Tensor) or out.shape != (shape[0], width):
        what = f"{list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        return f"it makes {what} of them, where [{shape[0]}, {width}] is needed"
    return None


def check_sizes(
    network: nn.Module,
    arch: str,
    channels: int,
    trials: Iterable[Trial],
    rebuilt: Callable[[int], nn.Module] | None = None,
    own: Iterable[int] = (),
    real: Callable[[], nn.Module] | None = None,
) -> None:
    """Raises UsageError, with the nearest sizes that work, where one of the trials does not.

    Args:
        rebuilt: the network made for another size, for the trial whose size it is made for.
        own: sizes that the network may have been meant for. real: see `why_not`.
    """
    for trial in trials:
        why = why_not(network, channels, trial, real)
        if why is None:
            continue
        sizes = _nearest_sizes(network, channels, trial, rebuilt, own)
        mend = f"take {' or '.join(map(str, sizes))}" if sizes else "another size or network"
        patch = _patch(network)
        if patch and trial.size % patch and sizes:
            what = f"is no multiple of the patch, {patch}"
        elif sizes:
            what = f"is no size for {arch} ({why})"
        else:
            what = f"cannot be given to {arch} ({why})"
        raise UsageError(f"{trial.key} {trial.size} {what}: {mend}")


def _patch(network: nn.Module) -> int | None:
    size = getattr(network, "patch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _nearest_sizes(
    network: nn.Module,
    channels: int,
    trial: Trial,
    rebuilt: Callable[[int], nn.Module] | None,
    own: Iterable[int],
) -> list[int]:
    """The nearest size below and above that the network takes: multiples of its patch, or its own."""
    candidates = set(own)
    for step in {_patch(network) or 16, 32}:
        first = trial.size // step
        candidates |= {step * n for n in range(max(1, first - 3), first + 5)}
    below: list[int] = []
    above: list[int] = []
    meta = copy.deepcopy(network).to("meta")
    for size in sorted(candidates - {trial.size}, key=lambda size: abs(size - trial.size)):
        side = below if size < trial.size else above
        if side:
            continue
        with contextlib.suppress(UsageError):
            other = rebuilt(size) if rebuilt and trial.builds else meta
            if _try(other, (trial.batch, channels, size, size), trial.training) is None:
                side.append(size)
    return below + above


# Room

free_memory = devices.free_memory


def _bytes(network: nn.Module, trained: bool = False) -> int:
    parameters = [p for p in network.parameters() if p.requires_grad or not trained]
    return sum(p.numel() * p.element_size() for p in parameters)


def state_bytes(student: nn.Module, optimiser: str) -> int:
    """About the size of a checkpoint: student, teacher, the optimiser's moments."""
    moments = 2 if optimiser == "adamw" else 1
    return 2 * _bytes(student) + moments * _bytes(student, trained=True)


def trained_bytes(student: nn.Module) -> int:
    """Of the gradients."""
    return _bytes(student, trained=True)


def check_memory(what: str, needed: int, device: torch.device, mend: str) -> None:
    """Raises UsageError where `needed` bytes are more than there can be."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UsageError(
            f"{what} take about {gigabytes(needed)}, and {device.type} has {gigabytes(free)}: {mend}"
        )


def check_disk(folder: Path, needed: int, states: int = 2) -> None:
    """Raises UsageError where the disk of `folder`, which need not exist, has no such room.

    `states`: how many of them it is for.
    """
    parent = folder.absolute()
    try:
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        held = folder / "checkpoints" / "last.pt"
        needed -= held.stat().st_size if held.exists() else 0
        total, _, free = shutil.disk_usage(parent)
    except OSError:  # a quota, a network: the save will tell
        return
    if total and needed > free:
        count = "two" if states == 2 else states
        raise UsageError(
            f"{count} checkpoints take about {gigabytes(needed)}, and the disk of {folder} has "
            f"{gigabytes(free)} free: make room, or choose another folder"
        )


def gigabytes(size: int) -> str:
    """
    >>> gigabytes(3_200_000_000)
    '3.2 GB'
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"
