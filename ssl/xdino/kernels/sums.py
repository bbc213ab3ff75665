"""Sums over many rows in two steps, without atomic operations: they come out the same every time.

A kernel's programs leave one partial sum each, and `column_sums` adds those up.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdino.kernels import interpreted

#: Of a kernel that leaves partial sums: eight for each multiprocessor of an H100.
PROGRAMS = 1056
# Rows and columns that a program adds at a time. The interpreter pays for operations, not for these.
ROWS, COLUMNS = (1024, 1024) if interpreted() else (128, 16)


def split(blocks: int) -> tuple[int, int]:
    """Programs, and the blocks that each works through."""
    steps = triton.cdiv(blocks, PROGRAMS)
    return triton.cdiv(blocks, steps), steps


@triton.jit
def _column_sums(x, out, P, C, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < P)[:, None] & (column < C)[None, :]
        total += tl.load(x + row[:, None] * C + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0), mask=column < C)


def column_sums(x: Tensor) -> Tensor:
    """The sum over the first dimension, float32: `[P, ...]` of some million numbers -> `[...]`."""
    P, C = x.shape[0], math.prod(x.shape[1:])
    out = torch.empty(x.shape[1:], dtype=torch.float32, device=x.device)
    _column_sums[(triton.cdiv(C, COLUMNS),)](x, out, P, C, BLOCK=ROWS, BLOCK_C=COLUMNS, num_warps=4)
    return out
