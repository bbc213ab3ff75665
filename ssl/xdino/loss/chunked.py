"""The last layer and the DINO loss together, in chunks of prototypes.

At 65,536 prototypes the logits of ten views are the largest tensor of a step, and softmax, loss and
their gradients pass over it a dozen times. Nothing needs it whole. With unit prototypes w_k, student
logits s_v = z_v . w / temp, and teacher probabilities q_g, equation 3 of arXiv 2104.14294 is

    sum over g, v != g of  -sum_k q_gk log_softmax(s_v)_k
        = sum over v of  m_v lse(s_v) - sum over g != v of (sum_k q_gk w_k) . z_v / temp

with m_v the number of teacher views that v meets: log-sum-exps, which add up over chunks, and one
vector of the bottleneck's width for each teacher view. The backward pass computes the logits of a
chunk again, turns them into gradients while they are in the cache, and forgets them. The weight
norm is folded in: it scales columns of logits instead of rows of weights.

Letters: V student views, G teacher views, B images, R rows (views x images), K prototypes, c
prototypes of a chunk, d width of the bottleneck.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdino.head import WeightNormLinear

#: Prototypes of a chunk: logits and weights stay in a core's cache; a GPU wants fewer launches.
CPU_CHUNK, CUDA_CHUNK = 2048, 16384


@dataclass(frozen=True)
class ChunkedLoss:
    """loss: scalar with gradient. teacher_mean: mean teacher logits `[K]`, before centring.
    teacher_entropy: of the centred and sharpened teacher, in nats, mean over rows."""

    loss: Tensor
    teacher_mean: Tensor
    teacher_entropy: Tensor


def chunked_dino_loss(
    student: Tensor,
    teacher: Tensor,
    student_layer: WeightNormLinear,
    teacher_layer: WeightNormLinear,
    centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk: int | None = None,
) -> ChunkedLoss:
    """`dino_loss` of the last layers' logits, without the logits.

    Args:
        student: normalised bottleneck `[V, B, d]`, the teacher's views first.
        teacher: the same of the teacher, `[G, B, d]`.
        centre: `[1, K]`.
        chunk: prototypes at a time; None for what suits the device.

    Products run in autocast's precision, all else in float32.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            "student must be [V, B, d] and teacher [G, B, d], got "
            f"{list(student.shape)} and {list(teacher.shape)}"
        )
    if not len(teacher) <= len(student) != 1:
        raise ValueError(
            f"{len(teacher)} teacher views need at least as many student views, and two in all, "
            f"got {len(student)}"
        )
    if chunk is None:
        chunk = CPU_CHUNK if student.device.type == "cpu" else CUDA_CHUNK
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 prototype, got {chunk}")
    kind = student.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.autocast(kind, enabled=False):
        found = _ChunkedDINOLoss.apply(
            student,
            student_layer.weight_v,
            student_layer.weight_g,
            teacher.detach(),
            teacher_layer.weight_v.detach(),
            teacher_layer.weight_g.detach(),
            centre,
            (student_temp, teacher_temp, chunk, half),
        )
    return ChunkedLoss(*found)


@torch.no_grad()
def logits_of(z: Tensor, layer: WeightNormLinear, chunk: int | None = None) -> Tensor:
    """The logits `[..., K]` of a normalised bottleneck `[..., d]` as the loss sees them, whole.

    The product runs in autocast's precision; the rest, and what comes out, in the weights'.
    """
    kind = z.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    chunk = chunk or (CPU_CHUNK if kind == "cpu" else CUDA_CHUNK)
    with torch.autocast(kind, enabled=False):
        seen = _Layer(layer.weight_v, layer.weight_g, half)
        rows = seen.cast(z.reshape(-1, z.shape[-1]))
        logits = seen.v.new_empty(len(rows), len(seen.v))
        for start in range(0, len(seen.v), chunk):
            k = slice(start, start + chunk)
            seen.measure(k)
            logits[:, k] = seen.logits(rows, k)
    return logits.view(*z.shape[:-1], -1)


def _row_norms(weight: Tensor) -> Tensor:
    return weight.square().sum(1).sqrt_()  # torch's own along the last dimension is slower


class _Layer:
    """A weight-normed layer seen chunk by chunk."""

    def __init__(self, v: Tensor, g: Tensor, half: torch.dtype | None) -> None:
        self.v, self.g, self.half = v, g[:, 0], half
        self.gain = torch.empty_like(self.g)  # g / |v|, [K]

    def cast(self, x: Tensor) -> Tensor:
        return x if self.half is None else x.to(self.half)

    def measure(self, k: slice) -> None:
        self.gain[k] = self.g[k] / _row_norms(self.v[k])

    def logits(self, z: Tensor, k: slice) -> Tensor:
        """z (cast already) `[R, d]` -> `[R, c]` in the weights' precision."""
        return (z @ self.cast(self.v[k]).T).to(self.v.dtype).mul_(self.gain[k])


class _LogSumExp:
    """log sum exp of rows that come in chunks, and sums weighted by the exponentials."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.top = like.new_full((rows, 1), -torch.inf)
        self.total = like.new_zeros(rows, 1)

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites x `[R, c]` by exp(x - top); returns it, and what older sums shrink by."""
        top = torch.maximum(self.top, x.amax(1, keepdim=True))
        shrink = (self.top - top).exp_()
        exponentials = x.sub_(top).exp_()
        self.total.mul_(shrink).add_(exponentials.sum(1, keepdim=True))
        self.top = top
        return exponentials, shrink

    def value(self) -> Tensor:
        return self.top + self.total.log()  # [R, 1]


class _ChunkedDINOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_v: Tensor,
        student_g: Tensor,
        teacher: Tensor,
        teacher_v: Tensor,
        teacher_g: Tensor,
        centre: Tensor,
        how: tuple[float, float, int, torch.dtype | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        student_temp, teacher_temp, chunk, half = how
        V, B, d = student.shape
        G, K = len(teacher), len(student_v)
        layer, judge = _Layer(student_v, student_g, half), _Layer(teacher_v, teacher_g, half)
        z, y = student.reshape(-1, d), teacher.reshape(-1, d)
        z_cast, y_cast = layer.cast(z), layer.cast(y)
        lse_s, lse_t = _LogSumExp(student_v, V * B), _LogSumExp(student_v, G * B)
        pull = student_v.new_zeros(G * B, d)  # sum_k q w
        mean_logit = student_v.new_zeros(G * B, 1)  # sum_k q t, for the entropy
        teacher_mean = student_v.new_empty(K)
        for start in range(0, K, chunk):
            k = slice(start, start + chunk)
            layer.measure(k)
            judge.measure(k)
            t = judge.logits(y_cast, k)  # [G * B, c]
            teacher_mean[k] = t.mean(0)
            t.sub_(centre[:, k]).div_(teacher_temp)
            q, shrink = lse_t.add(t.clone())
            mean_logit.mul_(shrink).add_(t.mul_(q).sum(1, keepdim=True))
            q = layer.cast(q.mul_(layer.gain[k]))
            pull.mul_(shrink).add_(q @ layer.cast(student_v[k]))
            lse_s.add(layer.logits(z_cast, k).div_(student_temp))
        pull.div_(lse_t.total)
        entropy = (lse_t.value() - mean_logit / lse_t.total).mean()
        pull = pull.view(G, B, d)
        pulls = pull.sum(0) * student.to(pull.dtype).sum(
            0
        )  # every teacher view against every view ...
        own = pull * student[:G]  # ... but itself
        met = lse_s.value().view(V, B)
        norm = B * G * (V - 1)
        entropic = G * met.sum() - met[:G].sum()
        loss = (entropic - (pulls.sum() - own.sum()) / student_temp) / norm
        ctx.save_for_backward(
            student, student_v, student_g, teacher, teacher_v, teacher_g, centre,
            layer.gain, judge.gain, lse_s.value(), lse_t.value(),
        )  # fmt: skip
        ctx.how, ctx.norm = how, norm
        ctx.mark_non_differentiable(teacher_mean, entropy)
        return loss, teacher_mean, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (student, student_v, student_g, teacher, teacher_v, teacher_g, centre,
         layer_gain, judge_gain, lse_s, lse_t) = ctx.saved_tensors  # fmt: skip
        student_temp, teacher_temp, chunk, half = ctx.how
        V, B, d = student.shape
        G, K = len(teacher), len(student_v)
        layer, judge = _Layer(student_v, student_g, half), _Layer(teacher_v, teacher_g, half)
        layer.gain, judge.gain = layer_gain, judge_gain
        z, y = student.reshape(-1, d), teacher.reshape(-1, d)
        z_cast, y_cast = layer.cast(z), layer.cast(y)
        grad_z = torch.zeros_like(z, dtype=student_v.dtype)
        grad_v = torch.empty_like(student_v)
        grad_g = torch.empty_like(student_g)
        mass = student_v.new_full((V, 1, 1), float(G))  # teacher views that a view meets
        mass[:G] = G - 1
        for start in range(0, K, chunk):
            k = slice(start, start + chunk)
            q = judge.logits(y_cast, k).sub_(centre[:, k]).div_(teacher_temp)
            q = q.sub_(lse_t).exp_().view(G, B, -1)
            s = layer.logits(z_cast, k).div_(student_temp)  # [V * B, c]
            slope = (s - lse_s).exp_().view(V, B, -1).mul_(mass)
            slope.sub_(q.sum(0))
            slope[:G].add_(q)
            slope = slope.view(V * B, -1)  # of the loss by s, times norm
            along = s.mul_(slope).sum(0).mul_(student_temp)  # [c], of the loss by log g
            step = slope.mul_(layer.gain[k])
            step = layer.cast(step)
            weights = layer.cast(student_v[k])
            grad_z.add_(step @ weights)
            if half is None:
                torch.mm(step.T, z, out=grad_v[k])
            else:
                grad_v[k] = step.T @ z_cast
            n_squared = (student_g[k, 0] / layer.gain[k]).square_()
            grad_v[k].addcmul_(student_v[k], (along / n_squared)[:, None], value=-1)
            grad_g[k, 0] = along / student_g[k, 0]
        scale = gradient / (ctx.norm * student_temp)
        return (
            grad_z.mul_(scale).view(V, B, d).to(student.dtype),
            grad_v.mul_(scale) if ctx.needs_input_grad[1] else None,
            grad_g.mul_(scale) if ctx.needs_input_grad[2] else None,
            None, None, None, None, None,
        )  # fmt: skip
