"""GELU behind a linear layer, whose bias learns from the same pass over memory.

The gradient of a bias is the sum over all tokens of the gradient behind it: plain PyTorch reads the
widest tensor of a block once more for it.

Letters: T tokens, C channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from xdino.kernels.batch_norm import gelu_slope, long_grid, sizes
from xdino.kernels.sums import column_sums


@triton.jit
def _gelu_backward(
    x, d_out, d_x, sums, T, steps, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`sums` [programs, C]: partial sums of `d_x`."""
    pid = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        mask = (row < T)[:, None] & real[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
        gradient *= gelu_slope(values)
        tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=mask)
        total += gradient
    tl.store(sums + pid * C + channel, tl.sum(total, axis=0), mask=real)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.like = bias.dtype
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        C = x.shape[-1]
        T = x.numel() // C
        constants = sizes(C)
        programs, steps = long_grid(T, constants)
        d_x = torch.empty_like(x)
        sums = x.new_empty(programs[0], C, dtype=torch.float32)
        _gelu_backward[programs](x, gradients[0].contiguous(), d_x, sums, T, steps, **constants)
        return d_x, column_sums(sums).to(ctx.like)


def without_bias_gradient(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, the gradient of whose bias is somebody else's work."""
    return F.linear(x, layer.weight, None if layer.bias is None else layer.bias.detach())


def linear_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """`gelu(layer(x))`."""
    if layer.bias is None:
        return F.gelu(layer(x))
    return _GELU.apply(without_bias_gradient(layer, x).contiguous(), layer.bias)
