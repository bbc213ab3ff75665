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

from xdino.kernels import interpreted, sums
from xdino.kernels.sums import column_sums
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
def add_moments(count, mean, spread, values, rows):
    """Take one more value each into `mean` and `spread` (squared deviations) [BLOCK, C].

    Welford's way (1962): no place of the block asks another. `rows` [BLOCK] says which are real, `count`
    [BLOCK] how many were.
    """
    count += rows.to(tl.float32)
    apart = tl.where(rows[:, None], values - mean, 0.0)
    mean += apart / tl.maximum(count, 1.0)[:, None]
    return count, mean, spread + apart * (values - mean)


@triton.jit
def store_moments(moments, count, mean, spread, channel, real, C: tl.constexpr):
    """Merge the places of a block, and store a program's count, mean and squared deviations [3, C]."""
    total = tl.sum(count, axis=0)
    centre = tl.sum(count[:, None] * mean, axis=0) / tl.maximum(total, 1.0)
    apart = mean - centre[None, :]
    together = tl.sum(spread + count[:, None] * apart * apart, axis=0)
    mine = moments + tl.program_id(0) * (3 * C) + channel
    tl.store(mine, tl.zeros_like(centre) + total, mask=real)
    tl.store(mine + C, centre, mask=real)
    tl.store(mine + 2 * C, together, mask=real)


@triton.jit
def _moments(
    x, moments, T, steps, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`moments` [programs, 3, C]: count, mean and sum of squared deviations of each program."""
    pid = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    spread = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        mask = (row < T)[:, None] & real[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        count, mean, spread = add_moments(count, mean, spread, values, row < T)
    store_moments(moments, count, mean, spread, channel, real, C)


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


@triton.jit
def _finish(
    moments, merged, statistics, running_mean, running_var, P, momentum, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge `moments` [P, 3, C] into `merged` [3, C], `statistics` [2, C] and the running ones.

    Each of these that is not None is written.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    count = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK):
        row = start + tl.arange(0, BLOCK)
        at = moments + row[:, None] * (3 * C) + channel[None, :]
        mask = (row < P)[:, None] & real[None, :]
        more = tl.load(at, mask=mask, other=0.0)
        count += more
        mean += more * tl.load(at + C, mask=mask, other=0.0)
    total = tl.sum(count, axis=0)
    centre = tl.sum(mean, axis=0) / tl.maximum(total, 1.0)
    spread = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK):
        row = start + tl.arange(0, BLOCK)
        at = moments + row[:, None] * (3 * C) + channel[None, :]
        mask = (row < P)[:, None] & real[None, :]
        apart = tl.load(at + C, mask=mask, other=0.0) - centre[None, :]
        spread += tl.load(at + 2 * C, mask=mask, other=0.0)
        spread += tl.load(at, mask=mask, other=0.0) * apart * apart
    squares = tl.sum(spread, axis=0)
    if merged is not None:
        tl.store(merged + channel, total, mask=real)
        tl.store(merged + C + channel, centre, mask=real)
        tl.store(merged + 2 * C + channel, squares, mask=real)
    if statistics is not None:
        tl.store(statistics + channel, centre, mask=real)
        tl.store(
            statistics + C + channel,
            1.0 / tl.sqrt(squares / tl.maximum(total, 1.0) + eps),
            mask=real,
        )
    if running_mean is not None:
        old = tl.load(running_mean + channel, mask=real, other=0.0).to(tl.float32)
        new = old + momentum * (centre - old)
        tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), mask=real)
        unbiased = squares / tl.maximum(total - 1.0, 1.0)
        old = tl.load(running_var + channel, mask=real, other=0.0).to(tl.float32)
        new = old + momentum * (unbiased - old)
        tl.store(running_var + channel, new.to(running_var.dtype.element_ty), mask=real)


def synchronised(norm: nn.Module) -> bool:
    """Whether `norm` takes its statistics over all processes."""
    kinds = (nn.SyncBatchNorm, distributed.GlobalBatchNorm)
    return isinstance(norm, kinds) and distributed.world_size() > 1


def sizes(C: int, rows: int | None = None) -> dict[str, int]:
    """The constants of kernels that hold blocks of rows (ROWS, or at most `rows`) and channels."""
    return {
        "C": C,
        "BLOCK": ROWS if rows is None or interpreted() else min(rows, ROWS),
        "BLOCK_C": min(COLUMNS, triton.next_power_of_2(C)),
        "num_warps": 4,
    }


def grid(T: int, sizes: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(T, sizes["BLOCK"]), triton.cdiv(sizes["C"], sizes["BLOCK_C"])


def long_grid(T: int, sizes: dict[str, int], share: int = 1) -> tuple[tuple[int, int], int]:
    """A grid for kernels with partial sums, and the blocks that each program works through.

    share: one in so many of the programs that there may be.
    """
    blocks, columns = grid(T, sizes)
    steps = triton.cdiv(blocks * columns * share, sums.PROGRAMS)
    return (triton.cdiv(blocks, steps), columns), steps


def finish_statistics(moments: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Merge `moments` [P, 3, C], over processes too, into mean and 1 / standard deviation [2, C].

    Updates the running statistics of `norm`, whose momentum is a number, as torch does: by the
    unbiased variance.
    """
    C = moments.shape[2]
    if synchronised(norm):
        gathered = moments.new_empty(distributed.world_size() * 3, C)
        dist.all_gather_into_tensor(gathered, merge(moments))
        moments = gathered.view(-1, 3, C)
    statistics = moments.new_empty(2, C)
    running: tuple[Tensor | None, Tensor | None] = None, None
    if norm.track_running_stats and norm.running_mean is not None:
        assert norm.num_batches_tracked is not None
        running = norm.running_mean, norm.running_var
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    _run_finish(moments, None, statistics, *running, norm.momentum, norm.eps)
    return statistics


def merge(moments: Tensor) -> Tensor:
    """`[P, 3, C]` -> count, mean and sum of squared deviations of all, `[3, C]`."""
    merged = torch.empty_like(moments[0])
    _run_finish(moments, merged, None, None, None, 0.0, 0.0)
    return merged


def _run_finish(
    moments: Tensor, merged: Tensor | None, statistics: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
) -> None:  # fmt: skip
    P, _, C = moments.shape
    _finish[(triton.cdiv(C, sums.COLUMNS),)](
        moments, merged, statistics, running_mean, running_var, P, momentum, eps,
        C=C, BLOCK=sums.ROWS, BLOCK_C=sums.COLUMNS, num_warps=4,
    )  # fmt: skip


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
        parts = x.new_empty(programs[0], 2, C, dtype=torch.float32)
        _backward_sums[programs](
            x, statistics, weight, bias, d_out, parts, T, steps, **constants, GELU=ctx.gelu
        )
        whole = column_sums(parts)
        means = gradient_means(whole, T, ctx.norm)
        d_x = torch.empty_like(x)
        _backward_apply[grid(T, constants)](
            x, statistics, weight, bias, means, d_out, d_x, T, **constants, GELU=ctx.gelu
        )
        return d_x, whole[1].to(weight.dtype), whole[0].to(bias.dtype), None, None


def batch_norm_gelu(x: Tensor, norm: nn.BatchNorm2d, gelu: bool = True) -> Tensor:
    """BatchNorm by the batch's own statistics, then GELU, on rows `[T, C]`; dtype as `x`.

    Updates the running statistics of `norm`; `gelu` False leaves the activation out.
    """
    return _BatchNormGELU.apply(x.contiguous(), norm.weight, norm.bias, norm, gelu)
