"""Copies between the CPU and a device that keep neither waiting.

A GPU works through its queue of jobs while Python writes the next ones down. A plain `.to` breaks
that twice: it stands in the queue behind the work that is there, and where the memory of the CPU is
not pinned, Python waits with it. On a CPU device everything here is what a plain `.to` would do.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The queue of copies to `device`."""
    return torch.cuda.Stream(device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, on the CPU, on `device`: copied while the device computes, if `x` is pinned.

    What is queued on the device afterwards waits for the copy; Python does not.
    """
    if device.type != "cuda":
        return x.to(device)
    beside, main = _beside(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        there = x.to(device, non_blocking=True)
    main.wait_stream(beside)
    there.record_stream(main)  # its memory belongs to the copies' queue, but is in use on this one
    return there


class Arriving:
    """`x` on its way to the CPU, while the device goes on with what is queued after it."""

    def __init__(self, x: Tensor) -> None:
        self._there = x.to("cpu", non_blocking=x.is_cuda)  # then into pinned memory
        self._event = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def wait(self) -> Tensor:
        """The tensor, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._there
