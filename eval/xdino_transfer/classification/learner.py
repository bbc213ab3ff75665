"""One step of supervised training, as the published engine.py takes it.

Images come normalised, mixed and erased, targets soft: see `mixup` and `erasing`.

Letters: B images, C channels, H x W pixels, K classes.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from xdino.errors import NonFinite, UsageError, nearest
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.ema import ModelEma
from xdino_transfer.classification.losses import (
    Distillation,
    check_classes,
    soft_target_cross_entropy,
)
from xdino_transfer.classification.optim import set_rate

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say of one step."""

    lr: float


class ClassificationLearner:
    """A classifier, its optimiser, and the networks beside it.

    Args:
        classifier: in training mode, on its device.
        optimiser: over `optim.parameter_groups`.
        ema_decay: of a moving average of the weights, which is kept for whoever wants it; 0 for none.
        teacher: [B, C, H, W] -> [B, K], asked where `distillation` has a kind.
        clip: largest norm of all gradients together; 0 for none, as published.
        precision: "fp32", "bf16" or "fp16" (with a gradient scaler, as published).

    Raises:
        UsageError: distillation without a teacher, or from one of other classes; a precision that
            is none.
    """

    def __init__(
        self,
        classifier: Classifier,
        optimiser: Optimizer,
        ema_decay: float = 0.0,
        distillation: Distillation | None = None,
        teacher: nn.Module | None = None,
        clip: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        if precision not in AUTOCAST:
            raise UsageError(
                f'no precision is called "{precision}": {nearest(precision, AUTOCAST)}'
            )
        self.distillation = distillation or Distillation()
        if self.distillation.kind != "none" and teacher is None:
            raise UsageError(f"{self.distillation.kind} distillation needs a teacher")
        self.classifier, self.optimiser, self.clip = classifier, optimiser, clip
        self.device = classifier.head.weight.device
        self.ema = ModelEma(classifier, ema_decay) if ema_decay else None
        self.teacher = teacher
        if teacher is not None:
            classes = getattr(teacher, "num_classes", None)  # ours and timm's say so
            check_classes(classifier.num_classes, classes or classifier.num_classes)
            teacher.to(self.device).eval().requires_grad_(False)
        self.dtype = AUTOCAST[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def step(self, images: Tensor, targets: Tensor, settings: StepSettings) -> Tensor:
        """One update from images [B, C, H, W] and targets [B, K]; the loss, before the update.

        Raises:
            NonFinite: the loss is none; no weight moved.
        """
        set_rate(self.optimiser, settings.lr)
        self.optimiser.zero_grad(set_to_none=True)
        with self._precision():
            teacher = None
            if self.teacher is not None and self.distillation.kind != "none":
                with torch.no_grad():
                    teacher = self.teacher(images)
            logits = self.classifier(images)
            loss = soft_target_cross_entropy(logits, targets)
            loss = self.distillation(loss, logits, teacher)
        if not math.isfinite(loss.item()):
            raise NonFinite(f"the loss became {loss.item()}", loss.item())
        self.scaler.scale(loss).backward()
        if self.clip:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.classifier.parameters(), self.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.classifier)
        return loss.detach()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, but for its random numbers."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.network.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.classifier.load_state_dict(state["classifier"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.network.load_state_dict(state["ema"])
