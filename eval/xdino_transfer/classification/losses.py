"""Losses over soft targets, and distillation from a teacher (xcit/losses.py, DeiT's).

XCiT has no distillation token: one class token serves both terms.

Letters: B images, K classes.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from xdino.errors import UsageError

Kind = Literal["none", "soft", "hard"]


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over images of -sum_k targets log softmax(logits); both [B, K].

    With `mixup.smoothed` targets it is the cross-entropy with label smoothing.
    """
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def soft_distillation(logits: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softmax at temperature `tau`; both [B, K].

    The sum times tau^2 over the number of elements B K, as published (not over B).
    """
    student, target = (F.log_softmax(x / tau, dim=-1) for x in (logits, teacher))
    divergence = F.kl_div(student, target, reduction="sum", log_target=True)
    return divergence * (tau * tau) / logits.numel()


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy to the teacher's first choice; both [B, K]."""
    return F.cross_entropy(logits, teacher.argmax(dim=-1))


@dataclass(frozen=True)
class Distillation:
    """How a teacher is listened to: (1 - alpha) of the loss, alpha of the distillation."""

    kind: Kind = "none"
    alpha: float = 0.5
    tau: float = 1.0

    def __call__(self, loss: Tensor, logits: Tensor, teacher: Tensor | None) -> Tensor:
        """The whole loss of a step, from the loss over targets and both networks' logits [B, K]."""
        if self.kind == "none" or teacher is None:
            return loss
        check_classes(logits.shape[1], teacher.shape[1])
        if self.kind == "soft":
            term = soft_distillation(logits, teacher, self.tau)
        else:
            term = hard_distillation(logits, teacher)
        return loss * (1 - self.alpha) + term * self.alpha


def check_classes(network: int, teacher: int) -> None:
    """Raises UsageError where a teacher tells other classes apart than the network."""
    if network != teacher:
        raise UsageError(
            f"the teacher has {teacher:,} classes and the network {network:,}; distillation needs "
            "the same classes in the same order"
        )
