"""LayerScale, stochastic depth, the residual sum and the next LayerNorm in one pass over the tokens.

Plain PyTorch reads and writes the float32 residual stream once for the sum and once for the norm
(`x + gamma * branch`: CaiT, arXiv 2103.17239, section 2). The backward pass recomputes the norm's
statistics from the row it has at hand, and sums the gradients of gamma, weight and bias in two
steps, so that they come out the same every time. The bias of the linear layer in front learns from
these sums as well, for its gradient is the branch's.

Letters: B images, N tokens, T = B * N rows, D width (padded to P).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdino.kernels import interpreted
from xdino.kernels.sums import column_sums, split

# Numbers that a program of whole rows holds. The interpreter pays for operations, not for these.
# Measured on an H100: one warp with two rows of 384 needs no barrier for their sums, and takes two
# thirds of the time of eight warps with four rows (tests/benchmarks/README.md).
NUMBERS = 2**17 if interpreted() else 1024


@triton.jit
def row_statistics(x, real, D: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1 / standard deviation [BLOCK] of rows x [BLOCK, P], float32, zero outside D."""
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(real[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def finish_rows(
    x, at, mask, channel, real, out, normed, weight, bias,
    D: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store rows of the residual stream and, where there is one, of the norm that reads them."""
    x = x.to(out.dtype.element_ty)
    tl.store(out + at, x, mask=mask)
    if NORM:
        x = x.to(tl.float32)  # as rounded: what the backward pass finds
        mean, rstd = row_statistics(x, real, D, EPS)
        w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    x, branch, gamma, drop, weight, bias, out, normed, T, N,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, P)
    real = channel < D
    mask = (row < T)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * D + channel[None, :]
    scale = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    if DROP:
        scale = scale * tl.load(drop + row // N, mask=row < T, other=0.0)[:, None]
    rows = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    rows += scale * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    finish_rows(rows, at, mask, channel, real, out, normed, weight, bias, D, EPS, NORM)


@triton.jit
def _backward(
    out, branch, gamma, drop, weight, d_out, d_normed, d_x, d_branch, sums, T, N, steps,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """`sums` [programs, 4, D]: partial sums for gamma, the branch's bias, the norm's weight and bias.

    That for the branch's bias is without gamma.
    """
    pid = tl.program_id(0)
    channel = tl.arange(0, P)
    real = channel < D
    gamma_sum = tl.zeros((P,), tl.float32)
    branch_sum = tl.zeros((P,), tl.float32)
    weight_sum = tl.zeros((P,), tl.float32)
    bias_sum = tl.zeros((P,), tl.float32)
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        mask = (row < T)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * D + channel[None, :]
        gradient = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            x = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
            mean, rstd = row_statistics(x, real, D, EPS)
            x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            d_y = tl.load(d_normed + at, mask=mask, other=0.0).to(tl.float32)
            weight_sum += tl.sum(d_y * x_hat, axis=0)
            bias_sum += tl.sum(d_y, axis=0)
            d_y *= tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)[None, :]
            along = tl.sum(d_y * x_hat, axis=1) / D
            level = tl.sum(d_y, axis=1) / D
            gradient += (d_y - level[:, None] - x_hat * along[:, None]) * rstd[:, None]
        tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=mask)
        if BRANCH:
            if DROP:
                gradient *= tl.load(drop + row // N, mask=row < T, other=0.0)[:, None]
            gradient = tl.where(mask, gradient, 0.0)
            values = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            gamma_sum += tl.sum(gradient * values, axis=0)
            branch_sum += tl.sum(gradient, axis=0)
            scale = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32)[None, :]
            tl.store(d_branch + at, (gradient * scale).to(d_branch.dtype.element_ty), mask=mask)
    mine = sums + pid * (4 * D) + channel
    if BRANCH:
        tl.store(mine, gamma_sum, mask=real)
        tl.store(mine + D, branch_sum, mask=real)
    if NORM:
        tl.store(mine + 2 * D, weight_sum, mask=real)
        tl.store(mine + 3 * D, bias_sum, mask=real)


def row_sizes(D: int) -> dict[str, int]:
    """The constants of kernels that hold whole rows: NUMBERS a program, or one row."""
    P = triton.next_power_of_2(D)
    return {"D": D, "P": P, "BLOCK": max(1, NUMBERS // P), "num_warps": 1}


def backward_rows(
    out: Tensor,
    gradients: tuple[Tensor, Tensor | None],
    norm: "tuple[Tensor, float] | None",
    N: int,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients to the residual stream and the branch `[T, D]`, and `sums` [4, D].

    Args:
        out: the stream after the sum, float.
        gradients: to the stream and to the norm's output.
        norm: weight and eps of the norm; None for none.
        branch, gamma, drop: of the sum; `branch` None for the norm alone.

    The sums are the gradients of gamma, of the branch's bias (gamma left out), of the norm's weight and
    of its bias; zeros for a part that is not there.
    """
    D = out.shape[-1]
    T = out.numel() // D
    sizes = row_sizes(D)
    programs, steps = split(triton.cdiv(T, sizes["BLOCK"]))
    d_x = torch.empty_like(out)
    d_branch = None if branch is None else torch.empty_like(branch)
    new = out.new_zeros if norm is None or branch is None else out.new_empty
    sums = new(programs, 4, D, dtype=torch.float32)
    weight, eps = norm if norm is not None else (None, 0.0)
    _backward[(programs,)](
        out, branch, gamma, drop, weight, gradients[0], gradients[1], d_x, d_branch, sums,
        T, N, steps, **sizes,
        EPS=eps, NORM=norm is not None, DROP=drop is not None, BRANCH=branch is not None,
    )  # fmt: skip
    return d_x, d_branch, column_sums(sums)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gamma: Tensor, drop: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype,
        branch_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x, branch = x.contiguous(), branch.contiguous()
        D, N = x.shape[-1], x.shape[1]
        T = x.numel() // D
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gamma.dtype))
        normed = None if weight is None else x.new_empty(x.shape, dtype=dtype)
        sizes = row_sizes(D)
        _forward[(triton.cdiv(T, sizes["BLOCK"]),)](
            x, branch, gamma, drop, weight, bias, out, normed, T, N,
            **sizes, EPS=eps, NORM=weight is not None, DROP=drop is not None,
        )  # fmt: skip
        ctx.save_for_backward(out if weight is not None else None, branch, gamma, drop, weight)
        ctx.eps, ctx.dtype, ctx.like = eps, x.dtype, out.dtype
        ctx.branch_bias = None if branch_bias is None else branch_bias.dtype
        return out, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        out, branch, gamma, drop, weight = ctx.saved_tensors
        d_out = gradients[0].contiguous().to(ctx.like)
        norm = None if weight is None else (weight, ctx.eps)
        d_x, d_branch, sums = backward_rows(
            d_out if out is None else out,
            (d_out, None if weight is None else gradients[1].contiguous()),
            norm, branch.shape[1], branch, gamma, drop,
        )  # fmt: skip
        d_weight = d_bias = d_branch_bias = None
        if weight is not None:
            d_weight, d_bias = sums[2].to(weight.dtype), sums[3].to(weight.dtype)
        if ctx.branch_bias is not None:
            d_branch_bias = (sums[1] * gamma).to(ctx.branch_bias)
        d_gamma = sums[0].to(gamma.dtype)
        return (
            d_x.to(ctx.dtype), d_branch, d_gamma, None, d_weight, d_bias, None, None, d_branch_bias
        )  # fmt: skip


def add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, drop: Tensor | None, norm: torch.nn.LayerNorm | None,
    dtype: torch.dtype, branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`x + drop * gamma * branch` and its LayerNorm, `[B, N, D]` both.

    Args:
        x, branch: `[B, N, D]`.
        gamma: LayerScale `[D]`; the sum has the wider dtype of x and gamma.
        drop: float32 `[B]`, 0 for a dropped image and 1 / (1 - rate) for another; None for none.
        norm: what reads the sum next; None for nothing, and None is returned for its output.
        dtype: of the norm's output.
        branch_bias: `[D]`, added to the branch without a gradient (`mlp.without_bias_gradient`), which
            it gets here.
    """
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return _AddNorm.apply(x, branch, gamma, drop, weight, bias, eps, dtype, branch_bias)
