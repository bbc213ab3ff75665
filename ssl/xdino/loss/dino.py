"""The DINO loss and its centre (arXiv 2104.14294, equations 1, 3 and 4).

    H(P_t, P_s) = -sum_k P_t,k log P_s,k    P_s = softmax(s / student_temp)
                                            P_t = softmax((t - centre) / teacher_temp)

Letters: G global views, V views in all (the global ones first), B images, K prototypes.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xdino.head import WeightNormLinear
from xdino.loss.chunked import ChunkedLoss, chunked_dino_loss, logits_of
from xdino.loss.objective import Measured, Objective, Views
from xdino.runtime import distributed


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Cross-entropy between each teacher view and every other student view (equation 3).

    As nested loops:

        for g in global views:
            for v in all views but g:
                loss += mean over images of  -sum_k teacher_probs[g] * log_softmax(student[v] / temp)
        loss /= number of (g, v) pairs

    The cross-entropy is linear in the targets, so each student view meets the sum of its targets
    once: V log-softmaxes instead of G * (V - 1).

    Args:
        student_logits: `[V, B, K]`.
        teacher_probs: `[G, B, K]`, rows that sum to one; view g of the teacher is view g of the student.

    Returns:
        A scalar in the logits' precision, at least float32.

    Raises:
        ValueError: shapes that are not those, or a single view, which has nothing to be compared with.
    """
    if student_logits.ndim != 3 or teacher_probs.shape[1:] != student_logits.shape[1:]:
        raise ValueError(
            "student_logits must be [V, B, K] and teacher_probs [G, B, K], got "
            f"{list(student_logits.shape)} and {list(teacher_probs.shape)}"
        )
    if not len(teacher_probs) <= len(student_logits) != 1:
        raise ValueError(
            f"{len(teacher_probs)} teacher views need at least as many student views, and two in "
            f"all, got {len(student_logits)}"
        )
    G, (V, B, _) = len(teacher_probs), student_logits.shape
    total = teacher_probs.sum(dim=0)  # [B, K]
    log_p = F.log_softmax(student_logits / student_temp, dim=-1)
    loss = -((total - teacher_probs) * log_p[:G]).sum() - (total * log_p[G:]).sum()
    return loss / (B * G * (V - 1))


class PrototypeLoss(Objective):
    """`dino_loss` of targets that are a softmax around some centre of the teacher's logits.

    Subclasses say which: `centre_of`.
    """

    def __init__(self, student_temp: float = 0.1, statistics: int = 0) -> None:
        super().__init__(statistics)
        self.student_temp = student_temp

    @abc.abstractmethod
    def centre_of(self, logits: Callable[[], Tensor], teacher_temp: float) -> Tensor:
        """What the targets are centred by, `[1, K]`; `logits` works out the teacher's, `[G, B, K]`."""

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Centred and sharpened teacher probabilities (equation 1 with the centre): `[G, B, K]`."""
        centre = self.centre_of(lambda: teacher_logits, teacher_temp)
        return F.softmax((teacher_logits - centre) / teacher_temp, dim=-1)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
    ) -> Tensor:
        """Student `[V, B, K]` and teacher logits `[G, B, K]` -> the loss. Leaves the centre alone."""
        targets = self.targets(teacher_logits, teacher_temp)
        return dino_loss(student_logits, targets, self.student_temp)

    def of_bottlenecks(
        self,
        student: Tensor,
        teacher: Tensor,
        student_layer: WeightNormLinear,
        teacher_layer: WeightNormLinear,
        teacher_temp: float,
    ) -> ChunkedLoss:
        """The loss that trains: `forward` of the last layers' logits; the student's never exist whole.

        Args:
            student: normalised bottleneck `[V, B, d]`, the teacher's views first.
            teacher: the same of the teacher, `[G, B, d]`.
            student_layer, teacher_layer: onto the prototypes.
        """
        return chunked_dino_loss(
            student,
            teacher,
            student_layer,
            teacher_layer,
            self.centre_of(lambda: logits_of(teacher, teacher_layer), teacher_temp),
            self.student_temp,
            teacher_temp,
        )

    # --- as an objective ---

    def measure(self, views: Views) -> Measured:
        found = self.of_bottlenecks(
            views.student, views.teacher, *_layers(views), views.teacher_temp
        )
        statistics = found.teacher_mean if len(self.blank()) else self.blank()
        return Measured(found.loss, statistics, {"teacher_entropy": found.teacher_entropy})

    def pairs(self, views: Views) -> Tensor:
        """Cross-entropies, means over the images: `[G, V]`."""
        student_layer, teacher_layer = _layers(views)
        targets = self.targets(teacher_layer(views.teacher), views.teacher_temp)
        log_p = F.log_softmax(student_layer(views.student) / self.student_temp, dim=-1)
        return torch.stack([-(q * log_p).sum(-1).mean(-1) for q in targets])

    def diagnose(self, loss: float, told: Mapping[str, float]) -> dict[str, float]:
        entropy = told["teacher_entropy"]
        return {
            "teacher_entropy": entropy,  # nats; ln K when the teacher says nothing
            "kl": loss - entropy,  # nats; cross-entropy = entropy + divergence
        }


class DINOLoss(PrototypeLoss):
    """`dino_loss` with its one piece of state: the centre of the teacher's outputs, `[1, K]`.

    The caller decides when the centre moves: `update_centre` (or `update`) once per optimisation step,
    after the loss, as published.
    """

    watched = "the teacher's mean logit of a prototype"
    centre: Tensor

    def __init__(
        self, prototypes: int, student_temp: float = 0.1, centre_momentum: float = 0.9
    ) -> None:
        super().__init__(student_temp, statistics=prototypes)
        self.centre_momentum = centre_momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def centre_of(self, logits: Callable[[], Tensor], teacher_temp: float) -> Tensor:
        return self.centre

    @torch.no_grad()
    def update_centre(self, batch_mean: Tensor) -> None:
        """Move the centre (equation 4) towards the mean teacher logits of this process, `[K]`.

        The mean is averaged over all processes, which hold equally many images each.
        """
        self.move_centre(distributed.mean(batch_mean.to(self.centre.dtype)))

    @torch.no_grad()
    def move_centre(self, mean: Tensor) -> None:
        """`update_centre` by a mean over all processes, `[K]`, that is known already."""
        self.centre.lerp_(mean.to(self.centre.dtype).view(1, -1), 1 - self.centre_momentum)

    # --- as an objective ---

    def update(self, statistics: Tensor, broken: Tensor | None = None) -> None:
        if broken is not None:
            statistics = torch.where(broken, self.centre[0], statistics)
        self.move_centre(statistics)

    def diagnose(self, loss: float, told: Mapping[str, float]) -> dict[str, float]:
        return {**super().diagnose(loss, told), "centre_norm": self.centre.norm().item()}

    def kept(self) -> dict[str, Tensor]:
        return {"the centre": self.centre}

    def state(self) -> dict[str, Any]:
        return {"centre": self.centre}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict({"centre": state["centre"]})


def _layers(views: Views) -> tuple[WeightNormLinear, WeightNormLinear]:
    if views.student_layer is None or views.teacher_layer is None:
        raise ValueError("this objective needs heads with prototypes, got heads without")
    return views.student_layer, views.teacher_layer
