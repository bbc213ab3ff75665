"""Cross-covariance attention (XCiT, arXiv 2106.09681, equation 4) between its two projections.

The output of the qkv projection is read where it lies. One program works on one head of one image:
it accumulates the d x d Gram matrix of queries and keys and their sums of squares over the tokens,
divides the one by the other (which equals normalising queries and keys), takes the softmax, and
applies it to the values in a second walk over the tokens. Only the cosines and the norms are kept
for the backward pass, which walks twice as well and needs no atomic operation.

Letters: B images, N tokens, D width, H heads, d = D / H channels a head (padded to P).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdino.kernels import DTYPES, interpreted
from xdino.kernels.sums import column_sums

MAX_HEAD_DIM = 64  # the d x d matrices of a wider head do not fit the registers of one program
TOKENS = {torch.bfloat16: 64, torch.float32: 32}  # a step of the walks


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """float16 is left to the plain path: its gradients of the Gram matrix can underflow."""
    return head_dim <= MAX_HEAD_DIM and dtype in DTYPES and dtype != torch.float16


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a @ b in float32. The interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _softmax_rows(cosine, temperature, real):
    """Softmax over the second axis of cosine * temperature, zero outside the d real columns."""
    logits = tl.where(real[None, :], cosine * temperature, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward(
    qkv, temperature, out, cosines, norms, N,
    H: tl.constexpr, d: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * d
    pid = tl.program_id(0)
    head = pid % H
    image = (pid // H).to(tl.int64)
    channel = tl.arange(0, P)
    real = channel < d
    queries = qkv + image * N * (3 * D) + head * d
    gram = tl.zeros((P, P), tl.float32)
    q_squares = tl.zeros((P,), tl.float32)
    k_squares = tl.zeros((P,), tl.float32)
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < N)[:, None] & real[None, :]
        at = token[:, None] * (3 * D) + channel[None, :]
        q = tl.load(queries + at, mask=mask, other=0.0)
        k = tl.load(queries + D + at, mask=mask, other=0.0)
        gram += _product(tl.trans(q), k, PRECISION, INTERPRETED)
        q, k = q.to(tl.float32), k.to(tl.float32)
        q_squares += tl.sum(q * q, axis=0)
        k_squares += tl.sum(k * k, axis=0)
    # Clamped under the root like the plain path, whose gradient is zero there.
    q_norm = tl.sqrt(tl.maximum(q_squares, EPS * EPS))
    k_norm = tl.sqrt(tl.maximum(k_squares, EPS * EPS))
    cosine = gram / (q_norm[:, None] * k_norm[None, :])
    both = real[:, None] & real[None, :]
    square = channel[:, None] * d + channel[None, :]
    pid = pid.to(tl.int64)
    tl.store(cosines + pid * (d * d) + square, cosine, mask=both)
    tl.store(norms + pid * (2 * d) + channel, q_norm, mask=real)
    tl.store(norms + pid * (2 * d) + d + channel, k_norm, mask=real)
    attention = _softmax_rows(cosine, tl.load(temperature + head).to(tl.float32), real)
    attention = tl.trans(attention).to(qkv.dtype.element_ty)
    result = out + image * N * D + head * d
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < N)[:, None] & real[None, :]
        at = token[:, None] * (3 * D) + channel[None, :]
        v = tl.load(queries + 2 * D + at, mask=mask, other=0.0)
        o = _product(v, attention, PRECISION, INTERPRETED)
        at = token[:, None] * D + channel[None, :]
        tl.store(result + at, o.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    qkv, temperature, cosines, norms, d_out, d_qkv, d_temperature, N,
    H: tl.constexpr, d: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * d
    pid = tl.program_id(0)
    head = pid % H
    image = (pid // H).to(tl.int64)
    channel = tl.arange(0, P)
    real = channel < d
    queries = qkv + image * N * (3 * D) + head * d
    d_queries = d_qkv + image * N * (3 * D) + head * d
    d_result = d_out + image * N * D + head * d
    d_attention = tl.zeros((P, P), tl.float32)
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < N)[:, None] & real[None, :]
        at = token[:, None] * (3 * D) + channel[None, :]
        v = tl.load(queries + 2 * D + at, mask=mask, other=0.0)
        at = token[:, None] * D + channel[None, :]
        d_o = tl.load(d_result + at, mask=mask, other=0.0)
        d_attention += _product(tl.trans(d_o), v, PRECISION, INTERPRETED)
    both = real[:, None] & real[None, :]
    square = channel[:, None] * d + channel[None, :]
    wide = pid.to(tl.int64)
    cosine = tl.load(cosines + wide * (d * d) + square, mask=both, other=0.0)
    q_norm = tl.load(norms + wide * (2 * d) + channel, mask=real, other=1.0)
    k_norm = tl.load(norms + wide * (2 * d) + d + channel, mask=real, other=1.0)
    tau = tl.load(temperature + head).to(tl.float32)
    attention = _softmax_rows(cosine, tau, real)
    inner = tl.sum(attention * d_attention, axis=1)
    d_logits = attention * (d_attention - inner[:, None])
    by_cosine = d_logits * cosine
    tl.store(d_temperature + pid, tl.sum(tl.sum(by_cosine, axis=1), axis=0))
    # logits = gram * tau / (|q| |k|): the part through the norms is along q and along k. A norm
    # that was clamped has none.
    q_part = -tau * tl.sum(by_cosine, axis=1) / (q_norm * q_norm)
    k_part = -tau * tl.sum(by_cosine, axis=0) / (k_norm * k_norm)
    q_part = tl.where(q_norm > EPS, q_part, 0.0)
    k_part = tl.where(k_norm > EPS, k_part, 0.0)
    d_gram = d_logits * tau / (q_norm[:, None] * k_norm[None, :])
    d_gram = d_gram.to(qkv.dtype.element_ty)
    attention = attention.to(qkv.dtype.element_ty)
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < N)[:, None] & real[None, :]
        at = token[:, None] * (3 * D) + channel[None, :]
        q = tl.load(queries + at, mask=mask, other=0.0)
        k = tl.load(queries + D + at, mask=mask, other=0.0)
        d_o = tl.load(d_result + token[:, None] * D + channel[None, :], mask=mask, other=0.0)
        d_q = _product(k, tl.trans(d_gram), PRECISION, INTERPRETED)
        d_q += q.to(tl.float32) * q_part[None, :]
        d_k = _product(q, d_gram, PRECISION, INTERPRETED)
        d_k += k.to(tl.float32) * k_part[None, :]
        d_v = _product(d_o, attention, PRECISION, INTERPRETED)
        tl.store(d_queries + at, d_q.to(d_qkv.dtype.element_ty), mask=mask)
        tl.store(d_queries + D + at, d_k.to(d_qkv.dtype.element_ty), mask=mask)
        tl.store(d_queries + 2 * D + at, d_v.to(d_qkv.dtype.element_ty), mask=mask)


def precision() -> str:
    """How products of float32 matrices are to be rounded: as torch does at this moment."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _sizes(qkv: Tensor, heads: int, eps: float) -> tuple[int, dict[str, Any]]:
    """Programs, and the constants of both kernels."""
    d = qkv.shape[2] // 3 // heads
    constants = {
        "H": heads,
        "d": d,
        "P": max(16, triton.next_power_of_2(d)),  # 16: the least side of a matrix product
        "BLOCK": TOKENS[qkv.dtype],
        "EPS": eps,
        "PRECISION": precision(),
        "INTERPRETED": interpreted(),
        "num_warps": 4 if qkv.dtype == torch.bfloat16 else 8,
        "num_stages": 1,
    }
    return qkv.shape[0] * heads, constants


class _XCA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, temperature: Tensor, heads: int, eps: float) -> Tensor:
        B, N, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        qkv = qkv.contiguous()
        programs, constants = _sizes(qkv, heads, eps)
        d = constants["d"]
        out = qkv.new_empty(B, N, D)
        cosines = qkv.new_empty(programs, d, d, dtype=torch.float32)
        norms = qkv.new_empty(programs, 2, d, dtype=torch.float32)
        _forward[(programs,)](qkv, temperature, out, cosines, norms, N, **constants)
        ctx.save_for_backward(qkv, temperature, cosines, norms)
        ctx.heads, ctx.eps = heads, eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, temperature, cosines, norms = ctx.saved_tensors
        d_out = gradients[0].contiguous().to(qkv.dtype)
        programs, constants = _sizes(qkv, ctx.heads, ctx.eps)
        d_qkv = torch.empty_like(qkv)
        d_temperature = qkv.new_empty(programs, dtype=torch.float32)
        _backward[(programs,)](
            qkv, temperature, cosines, norms, d_out, d_qkv, d_temperature, qkv.shape[1],
            **constants,
        )  # fmt: skip
        d_temperature = column_sums(d_temperature.view(-1, ctx.heads)).view_as(temperature)
        return d_qkv, d_temperature.to(temperature.dtype), None, None


def attend(qkv: Tensor, temperature: Tensor, heads: int, eps: float) -> Tensor:
    """Cross-covariance attention of `qkv` [B, N, 3D] (all queries, all keys, all values): [B, N, D].

    Args:
        qkv: float32 or bfloat16; the result has its dtype.
        temperature: one for each head, `[H, 1, 1]`.
        eps: the least l2 norm of a channel of queries or keys.
    """
    return _XCA.apply(qkv, temperature, heads, eps)
