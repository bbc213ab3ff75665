"""What the terms of a loss ask of the images of other processes, and with one process of none.

A step averages the gradients of its processes, so each of these is the part of a mean over processes:
whatever every process does with the result, the averaged gradient is that of the mean of their losses.

Letters: W processes, B images of one of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xdino.runtime import distributed


def mean_with_gradient(x: Tensor) -> Tensor:
    """The mean of `x` over all processes; its gradient reaches the inputs of all of them."""
    if distributed.world_size() == 1:
        return x
    found: Tensor = distributed.MeanOverProcesses.apply(x)
    return found


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        every = [torch.empty_like(x) for _ in range(distributed.world_size())]
        dist.all_gather(every, x.contiguous())
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(distributed.world_size())[distributed.rank()]


def of_all(x: Tensor) -> Tensor:
    """`x` `[B, ...]` of every process, in order of rank: `[W * B, ...]`, with gradient."""
    if distributed.world_size() == 1:
        return x
    found: Tensor = _OfAll.apply(x)
    return found


def log_sum_exp(x: Tensor) -> Tensor:
    """log sum exp over the first dimension and all processes; without gradient."""
    mine = torch.logsumexp(x, dim=0)
    if distributed.world_size() == 1:
        return mine
    top = mine.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = (mine - top).exp_()
    dist.all_reduce(total)
    return top + total.log_()
