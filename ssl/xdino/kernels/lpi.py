"""Local patch interaction with its residual sum and the next LayerNorm (XCiT, section 3.3).

Two kernels forward, because BatchNorm needs the whole batch between them: depthwise convolution and
GELU with the moments of each channel; then normalisation, the second convolution, LayerScale,
stochastic depth, the residual sum and the LayerNorm that reads it. Tokens stay `[B, N, D]`: a
neighbour of a patch is another row of the same image.

The backward pass keeps only the input and the sum. The gradients of a depthwise weight, of the
LayerScale and of the bias all come from ten sums a channel: with P_t the sum over patches of the
gradient times the input at tap t, and P_0 the sum of the gradient, the second convolution's are
gamma * P_t and gamma * P_0, and the LayerScale's is sum_t w_t P_t + b P_0.

Letters: B images, N = h * w tokens, T = B * N rows, D width, (h, w) patch grid.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from xdino.kernels.batch_norm import (
    add_moments,
    finish_statistics,
    gelu,
    gelu_slope,
    gradient_means,
    grid,
    long_grid,
    sizes,
    store_moments,
)
from xdino.kernels.residual import backward_rows, finish_rows, row_sizes
from xdino.kernels.sums import column_sums

# Rows of a block, for sixty-four channels: measured on an H100. A convolution's gradient holds SUMS
# numbers for each place of a block until its end, so it takes few, in half as many programs.
ROWS, FEW_ROWS = 16, 8
SUMS = 12  # partial sums a channel: nine taps, the gradient, and two of the BatchNorm


@triton.jit
def _inside(row, T, h: tl.constexpr, w: tl.constexpr, down: tl.constexpr, right: tl.constexpr):
    """Whether there is a patch `down` and `right` of each; it lies `down * w + right` rows on."""
    y = (row % (h * w)) // w + down
    x = row % w + right
    return (row < T) & (y >= 0) & (y < h) & (x >= 0) & (x < w)


@triton.jit
def _convolve(
    x, weight, bias, row, channel, real, T,
    D: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
):  # fmt: skip
    """Depthwise 3x3 convolution at some rows and channels: float32. `weight` [9, D]."""
    out = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    here = x + row.to(tl.int64)[:, None] * D + channel[None, :]
    for tap in tl.static_range(9):
        inside = _inside(row, T, h, w, tap // 3 - 1, tap % 3 - 1)[:, None] & real[None, :]
        values = tl.load(here + ((tap // 3 - 1) * w + tap % 3 - 1) * D, mask=inside, other=0.0)
        factor = tl.load(weight + tap * D + channel, mask=real, other=0.0).to(tl.float32)
        out = out + values.to(tl.float32) * factor[None, :]
    return out


@triton.jit
def _conv_gelu(
    x, weight, bias, y, moments, T, steps,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """y = GELU(conv(x)); `moments` [programs, 3, C] of each program's part."""
    pid = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    spread = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        mask = (row < T)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        values = gelu(_convolve(x, weight, bias, row, channel, real, T, C, h, w))
        values = values.to(y.dtype.element_ty)
        tl.store(y + at, values, mask=mask)
        if MOMENTS:  # of the values as they are stored
            count, mean, spread = add_moments(count, mean, spread, values.to(tl.float32), row < T)
    if MOMENTS:
        store_moments(moments, count, mean, spread, channel, real, C)


@triton.jit
def _norm_conv_sum(
    y, statistics, bn_weight, bn_bias, weight, bias, x, gamma, drop, ln_weight, ln_bias,
    out, normed, T,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr, NORM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Whole rows, because the LayerNorm needs them."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, P)
    real = channel < D
    mean = tl.load(statistics + channel, mask=real, other=0.0)[None, :]
    factor = tl.load(statistics + D + channel, mask=real, other=0.0)
    factor *= tl.load(bn_weight + channel, mask=real, other=0.0).to(tl.float32)
    level = tl.load(bn_bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    branch = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * D + channel[None, :]
    for tap in tl.static_range(9):
        inside = _inside(row, T, h, w, tap // 3 - 1, tap % 3 - 1)[:, None] & real[None, :]
        away = ((tap // 3 - 1) * w + tap % 3 - 1) * D
        z = tl.load(y + at + away, mask=inside, other=0.0).to(tl.float32)
        # The convolution's padding is zero after the normalisation.
        z = tl.where(inside, (z - mean) * factor[None, :] + level, 0.0)
        kernel = tl.load(weight + tap * D + channel, mask=real, other=0.0).to(tl.float32)
        branch = branch + z * kernel[None, :]
    scale = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    if DROP:
        scale = scale * tl.load(drop + row // (h * w), mask=row < T, other=0.0)[:, None]
    mask = (row < T)[:, None] & real[None, :]
    rows = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + scale * branch
    rows = tl.where(mask, rows, 0.0)
    finish_rows(rows, at, mask, channel, real, out, normed, ln_weight, ln_bias, D, EPS, NORM)


@triton.jit
def _add_tap(
    gradient, weight, row, channel, real, value, scale, d_value, total, T,
    C: tl.constexpr, h: tl.constexpr, w: tl.constexpr, tap: tl.constexpr,
):  # fmt: skip
    """Add one tap's part to the gradient of the input and to the sum for its weight.

    A row was read at tap t by the patch on the other side.
    """
    inside = _inside(row, T, h, w, 1 - tap // 3, 1 - tap % 3)[:, None] & real[None, :]
    here = gradient + row.to(tl.int64)[:, None] * C + channel[None, :]
    g = tl.load(here + ((1 - tap // 3) * w + 1 - tap % 3) * C, mask=inside, other=0.0)
    g = g.to(tl.float32) * scale[:, None]
    factor = tl.load(weight + tap * C + channel, mask=real, other=0.0).to(tl.float32)
    return d_value + g * factor[None, :], total + g * value, g


@triton.jit
def _batch_norm(values, statistics, weight, bias, channel, real, C: tl.constexpr):
    """Values after their BatchNorm, and before its weight and bias."""
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    rstd = tl.load(statistics + C + channel, mask=real, other=0.0)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    x_hat = (values - mean[None, :]) * rstd[None, :]
    return x_hat * w[None, :] + b[None, :], x_hat


@triton.jit
def _conv_backward(
    x, gradient, weight, gamma, drop, statistics, bn_weight, bn_bias, d_x, sums, T, steps,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr, NORM: tl.constexpr, DROP: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Gradient of a depthwise convolution to its input, and `sums` [programs, SUMS, C].

    The input is `x`, or (`NORM`) its BatchNorm; then the gradient is scaled by `gamma` and `drop`.
    Sums 0 to 8 are P_t, 9 is P_0 (without gamma), 10 and 11 sum `d_x` by itself and times x_hat
    (`NORM` only). Kept apart for every row of the block, they meet once, at the end.
    """
    pid = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    p0 = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    p1, p2, p3, p4, p5, p6, p7, p8 = p0, p0, p0, p0, p0, p0, p0, p0
    by_g, by_one, by_x = p0, p0, p0
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        mask = (row < T)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            v, x_hat = _batch_norm(v, statistics, bn_weight, bn_bias, channel, real, C)
        scale = tl.full((BLOCK,), 1.0, tl.float32)
        if DROP:
            scale = tl.load(drop + row // (h * w), mask=row < T, other=0.0)
        d = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        d, p0, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p0, T, C, h, w, 0)
        d, p1, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p1, T, C, h, w, 1)
        d, p2, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p2, T, C, h, w, 2)
        d, p3, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p3, T, C, h, w, 3)
        d, p4, g = _add_tap(gradient, weight, row, channel, real, v, scale, d, p4, T, C, h, w, 4)
        d, p5, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p5, T, C, h, w, 5)
        d, p6, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p6, T, C, h, w, 6)
        d, p7, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p7, T, C, h, w, 7)
        d, p8, _ = _add_tap(gradient, weight, row, channel, real, v, scale, d, p8, T, C, h, w, 8)
        by_g += g  # at the centre, tap 4
        if NORM:
            d *= tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        d = d.to(d_x.dtype.element_ty)
        tl.store(d_x + at, d, mask=mask)
        if NORM:
            by_one += tl.where(mask, d.to(tl.float32), 0.0)
            by_x += tl.where(mask, d.to(tl.float32) * x_hat, 0.0)
    mine = sums + pid * (SUMS * C) + channel
    tl.store(mine + 0 * C, tl.sum(p0, axis=0), mask=real)
    tl.store(mine + 1 * C, tl.sum(p1, axis=0), mask=real)
    tl.store(mine + 2 * C, tl.sum(p2, axis=0), mask=real)
    tl.store(mine + 3 * C, tl.sum(p3, axis=0), mask=real)
    tl.store(mine + 4 * C, tl.sum(p4, axis=0), mask=real)
    tl.store(mine + 5 * C, tl.sum(p5, axis=0), mask=real)
    tl.store(mine + 6 * C, tl.sum(p6, axis=0), mask=real)
    tl.store(mine + 7 * C, tl.sum(p7, axis=0), mask=real)
    tl.store(mine + 8 * C, tl.sum(p8, axis=0), mask=real)
    tl.store(mine + 9 * C, tl.sum(by_g, axis=0), mask=real)
    if NORM:
        tl.store(mine + 10 * C, tl.sum(by_one, axis=0), mask=real)
        tl.store(mine + 11 * C, tl.sum(by_x, axis=0), mask=real)


@triton.jit
def _gelu_backward(
    x, weight, bias, y, d_z, statistics, bn_weight, means, d_u, T,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr,
):  # fmt: skip
    """From the BatchNorm's output back to the first convolution's, which is computed again."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    mask = (row < T)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    rstd = tl.load(statistics + C + channel, mask=real, other=0.0)
    bn_w = tl.load(bn_weight + channel, mask=real, other=0.0).to(tl.float32)
    by_one = tl.load(means + channel, mask=real, other=0.0)
    by_x = tl.load(means + C + channel, mask=real, other=0.0)
    x_hat = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x_hat - mean[None, :]) * rstd[None, :]
    g = tl.load(d_z + at, mask=mask, other=0.0).to(tl.float32)
    g = (g - by_one[None, :] - x_hat * by_x[None, :]) * (rstd * bn_w)[None, :]
    g *= gelu_slope(_convolve(x, weight, bias, row, channel, real, T, C, h, w))
    tl.store(d_u + at, g.to(d_u.dtype.element_ty), mask=mask)


def _taps(weight: Tensor) -> Tensor:
    """A depthwise weight [D, 1, 3, 3] as [9, D]: the channels of one tap side by side."""
    return weight.detach().view(-1, 9).t().contiguous()


class _LPI(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, w1: Tensor, b1: Tensor, bn_weight: Tensor,
        bn_bias: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor, ln_weight: Tensor, ln_bias: Tensor,
        drop: Tensor | None, bn: nn.BatchNorm2d, size: tuple[int, int], eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, residual = x.contiguous(), residual.contiguous()
        D = x.shape[-1]
        T = x.numel() // D
        h, w = size
        constants = sizes(D, ROWS)
        programs, steps = long_grid(T, constants)
        y = torch.empty_like(x)
        moments = x.new_empty(programs[0], 3, D, dtype=torch.float32)
        taps = _taps(w1)
        _conv_gelu[programs](x, taps, b1, y, moments, T, steps, **constants, h=h, w=w, MOMENTS=True)
        statistics = finish_statistics(moments, bn)
        out = residual.new_empty(
            residual.shape, dtype=torch.promote_types(residual.dtype, gamma.dtype)
        )
        normed = residual.new_empty(residual.shape, dtype=dtype)
        rows = row_sizes(D)
        _norm_conv_sum[(triton.cdiv(T, rows["BLOCK"]),)](
            y, statistics, bn_weight, bn_bias, _taps(w2), b2, residual, gamma, drop, ln_weight,
            ln_bias, out, normed, T, **rows, EPS=eps, h=h, w=w, NORM=True, DROP=drop is not None,
        )  # fmt: skip
        ctx.save_for_backward(
            x, out, statistics, w1, b1, bn_weight, bn_bias, w2, b2, gamma, ln_weight, drop
        )
        ctx.bn, ctx.size, ctx.eps, ctx.dtype = bn, size, eps, residual.dtype
        return out, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, out, statistics, w1, b1, bn_weight, bn_bias, w2, b2, gamma, ln_weight, drop = (
            ctx.saved_tensors
        )
        D = x.shape[-1]
        T = x.numel() // D
        h, w = ctx.size
        d_out = gradients[0].contiguous().to(out.dtype)
        g, _, ln_sums = backward_rows(
            out, (d_out, gradients[1].contiguous()), (ln_weight, ctx.eps), h * w
        )
        constants = {**sizes(D, ROWS), "h": h, "w": w}
        programs, steps = long_grid(T, constants)
        taps1, taps2 = _taps(w1), _taps(w2)
        y, d_z = torch.empty_like(x), torch.empty_like(x)
        _conv_gelu[programs](x, taps1, b1, y, None, T, steps, **constants, MOMENTS=False)
        fewer_rows = {**constants, **sizes(D, FEW_ROWS)}
        programs, steps = long_grid(T, fewer_rows, share=2)
        sums = x.new_empty(programs[0], SUMS, D, dtype=torch.float32)
        _conv_backward[programs](
            y, g, taps2, gamma, drop, statistics, bn_weight, bn_bias, d_z, sums, T, steps,
            **fewer_rows, NORM=True, DROP=drop is not None, SUMS=SUMS,
        )  # fmt: skip
        second = column_sums(sums)
        means = gradient_means(second[10:12], T, ctx.bn)
        d_u = d_z  # each number is read before it is written, by the same program
        _gelu_backward[grid(T, constants)](
            x, taps1, b1, y, d_z, statistics, bn_weight, means, d_u, T, **constants
        )
        d_x = y  # no longer needed
        _conv_backward[programs](
            x, d_u, taps1, None, None, None, None, None, d_x, sums, T, steps,
            **fewer_rows, NORM=False, DROP=False, SUMS=SUMS,
        )  # fmt: skip
        first = column_sums(sums)
        products = second[:9], second[9]
        d_gamma = (taps2 * products[0]).sum(0) + b2 * products[1]
        return (
            d_x,
            g.to(ctx.dtype),
            first[:9].t().reshape(w1.shape).to(w1.dtype),
            first[9].to(b1.dtype),
            second[11].to(bn_weight.dtype),
            second[10].to(bn_bias.dtype),
            (gamma * products[0]).t().reshape(w2.shape).to(w2.dtype),
            (gamma * products[1]).to(b2.dtype),
            d_gamma.to(gamma.dtype),
            ln_sums[2].to(ln_weight.dtype),
            ln_sums[3].to(ln_weight.dtype),
            *([None] * 5),
        )


def interact(
    x: Tensor, residual: Tensor, lpi: nn.Module, gamma: Tensor, drop: Tensor | None,
    norm: nn.LayerNorm, size: tuple[int, int], dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`residual + drop * gamma * LPI(x)` and its LayerNorm, `[B, N, D]` both, in training mode.

    Args:
        x, residual: `[B, N, D]`.
        lpi: has `conv1`, `bn` and `conv2`; the running statistics of `bn` are updated.
        gamma: LayerScale `[D]`; the sum has the wider dtype of residual and gamma.
        drop: float32 `[B]`, 0 for a dropped image and 1 / (1 - rate) for another; None for none.
        norm: reads the sum.
        size: the patch grid (h, w), h * w = N.
        dtype: of the norm's output.
    """
    conv1: Any = lpi.conv1
    conv2: Any = lpi.conv2
    bn: Any = lpi.bn
    return _LPI.apply(
        x, residual, conv1.weight, conv1.bias, bn.weight, bn.bias, conv2.weight, conv2.bias,
        gamma, norm.weight, norm.bias, drop, bn, size, norm.eps, dtype,
    )  # fmt: skip
