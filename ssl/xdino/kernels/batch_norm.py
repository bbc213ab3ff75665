"""Training BatchNorm with GELU for the stem, and batch statistics over all processes.

Rows of channels `[T, C]` (an image in channels-last layout, or tokens) are read once for the
statistics, and once more to be normalised and passed through GELU. Statistics are means and sums of
squared deviations of blocks, merged as Chan et al. do (1979), so that no precision is lost where
the mean is large; the running ones are updated as `torch.nn.BatchNorm2d` does. The backward pass
recomputes the normalised values from the input.

Letters: T rows, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor, nn

from xdino.kernels import interpreted, residual
from xdino.runtime import distributed

# Rows and channels of a block. The interpreter pays for operations, not for what they hold.
ROWS, COLUMNS = (1024, 1024) if interpreted() else (32, 64)


@triton.jit
def gelu(x):
    """x times the probability that a normal variable is below x, as torch's exact GELU."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """The derivative of `gelu`."""
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def merge_moments(count, mean, spread, values, rows):
    """Add a block of values [BLOCK, C] to a count, means and sums of squared deviations [C].

    `rows` [BLOCK] says which rows of the block are real.
    """
    more = tl.sum(rows.to(tl.float32), axis=0)
    total = tl.maximum(count + more, 1.0)
    centre = tl.sum(tl.where(rows[:, None], values, 0.0), axis=0) / tl.maximum(more, 1.0)
    apart = tl.where(rows[:, None], values - centre[None, :], 0.0)
    delta = tl.where(more > 0, centre - mean, 0.0)
    spread += tl.sum(apart * apart, axis=0) + delta * delta * (count * more / total)
    return count + more, mean + delta * (more / total), spread


@triton.jit
def _moments(
    x, moments, T, steps, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`moments` [programs, 3, C]: count, mean and sum of squared deviations of each program."""
    pid = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    spread = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        mask = (row < T)[:, None] & real[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        count, mean, spread = merge_moments(count, mean, spread, values, row < T)
    mine = moments + pid * (3 * C) + channel
    tl.store(mine, tl.zeros((BLOCK_C,), tl.float32) + count, mask=real)
    tl.store(mine + C, mean, mask=real)
    tl.store(mine + 2 * C, spread, mask=real)


@triton.jit
def _apply(
    x, statistics, weight, bias, out, T,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (row < T)[:, None] & real[None, :]
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    rstd = tl.load(statistics + C + channel, mask=real, other=0.0)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    values = (values - mean[None, :]) * (rstd * w)[None, :] + b[None, :]
    if GELU:
        values = gelu(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_sums(
    x, statistics, weight, bias, d_out, sums, T, steps,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """`sums` [programs, 2, C]: of the gradient before GELU, by itself and times x_hat."""
    pid = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    rstd = tl.load(statistics + C + channel, mask=real, other=0.0)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    by_one = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    by_x = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        mask = (row < T)[:, None] & real[None, :]
        x_hat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x_hat - mean[None, :]) * rstd[None, :]
        gradient = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            gradient *= gelu_slope(x_hat * w[None, :] + b[None, :])
        by_one += gradient
        by_x += gradient * x_hat
    mine = sums + pid * (2 * C) + channel
    tl.store(mine, tl.sum(by_one, axis=0), mask=real)
    tl.store(mine + C, tl.sum(by_x, axis=0), mask=real)


@triton.jit
def _backward_apply(
    x, statistics, weight, bias, means, d_out, d_x, T,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (row < T)[:, None] & real[None, :]
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    rstd = tl.load(statistics + C + channel, mask=real, other=0.0)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    x_hat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x_hat - mean[None, :]) * rstd[None, :]
    gradient = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        gradient *= gelu_slope(x_hat * w[None, :] + b[None, :])
    by_one = tl.load(means + channel, mask=real, other=0.0)
    by_x = tl.load(means + C + channel, mask=real, other=0.0)
    gradient = (gradient - by_one[None, :] - x_hat * by_x[None, :]) * (rstd * w)[None, :]
    tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=mask)


def synchronised(norm: nn.Module) -> bool:
    """Whether `norm` takes its statistics over all processes."""
    kinds = (nn.SyncBatchNorm, distributed.GlobalBatchNorm)
    return isinstance(norm, kinds) and distributed.world_size() > 1


def sizes(C: int) -> dict[str, int]:
    """The constants of kernels that hold blocks of rows and channels."""
    return {
        "C": C,
        "BLOCK": ROWS,
        "BLOCK_C": min(COLUMNS, triton.next_power_of_2(C)),
        "num_warps": 8,
    }


def grid(T: int, sizes: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(T, sizes["BLOCK"]), triton.cdiv(sizes["C"], sizes["BLOCK_C"])


def long_grid(T: int, sizes: dict[str, int]) -> tuple[tuple[int, int], int]:
    """A grid for kernels with partial sums, and the blocks that each program works through."""
    blocks, columns = grid(T, sizes)
    steps = triton.cdiv(blocks * columns, residual.PROGRAMS)
    return (triton.cdiv(blocks, steps), columns), steps


def finish_statistics(moments: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Merge `moments` [P, 3, C], over processes too, into mean and 1 / standard deviation [2, C].

    Updates the running statistics of `norm`, whose momentum is a number, as torch does: by the
    unbiased variance.
    """
    if synchronised(norm):
        count, mean, spread = _merged(moments)
        local = torch.stack((count, mean, spread))
        gathered = local.new_empty(distributed.world_size() * 3, local.shape[1])
        dist.all_gather_into_tensor(gathered, local)
        moments = gathered.view(-1, *local.shape)
    count, mean, spread = _merged(moments)
    if norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        unbiased = spread / (count - 1).clamp_min(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return torch.stack((mean, torch.rsqrt(spread / count + norm.eps)))


def _merged(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[P, 3, C]` -> count, mean, sum of squared deviations, `[C]` each."""
    count, mean, spread = moments.unbind(1)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    return total, centre, (spread + count * (mean - centre).square()).sum(0)


def gradient_means(sums: Tensor, T: int, norm: nn.BatchNorm2d) -> Tensor:
    """`sums` over T rows of this process -> means over the rows of all that share statistics."""
    means = sums / T  # every process holds equally many rows, so the mean of means is the mean
    return distributed.mean(means) if synchronised(norm) else means


class _BatchNormGELU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, gelu: bool
    ) -> Tensor:
        T, C = x.shape
        constants = sizes(C)
        programs, steps = long_grid(T, constants)
        moments = x.new_empty(programs[0], 3, C, dtype=torch.float32)
        _moments[programs](x, moments, T, steps, **constants)
        statistics = finish_statistics(moments, norm)
        out = torch.empty_like(x)
        _apply[grid(T, constants)](x, statistics, weight, bias, out, T, **constants, GELU=gelu)
        ctx.save_for_backward(x, statistics, weight, bias)
        ctx.norm, ctx.gelu = norm, gelu
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias = ctx.saved_tensors
        T, C = x.shape
        d_out = gradients[0].contiguous()
        constants = sizes(C)
        programs, steps = long_grid(T, constants)
        sums = x.new_empty(programs[0], 2, C, dtype=torch.float32)
        _backward_sums[programs](
            x, statistics, weight, bias, d_out, sums, T, steps, **constants, GELU=ctx.gelu
        )
        sums = sums.sum(0)
        means = gradient_means(sums, T, ctx.norm)
        d_x = torch.empty_like(x)
        _backward_apply[grid(T, constants)](
            x, statistics, weight, bias, means, d_out, d_x, T, **constants, GELU=ctx.gelu
        )
        return d_x, sums[1].to(weight.dtype), sums[0].to(bias.dtype), None, None


def batch_norm_gelu(x: Tensor, norm: nn.BatchNorm2d, gelu: bool = True) -> Tensor:
    """BatchNorm by the batch's own statistics, then GELU, on rows `[T, C]`; dtype as `x`.

    Updates the running statistics of `norm`; `gelu` False leaves the activation out.
    """
    return _BatchNormGELU.apply(x.contiguous(), norm.weight, norm.bias, norm, gelu)
