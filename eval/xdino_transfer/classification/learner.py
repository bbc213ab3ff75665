"""One step of supervised training, as the published engine.py takes it.

Images come normalised, mixed and erased, targets soft: see `mixup` and `erasing`.

Letters: B images, C channels, H x W pixels, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from xdino.errors import UsageError
from xdino.runtime import distributed
from xdino.stepping import Stepping, StepResult
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.ema import ModelEma
from xdino_transfer.classification.losses import (
    Distillation,
    check_classes,
    soft_target_cross_entropy,
)


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say of one step."""

    lr: float


class ClassificationLearner:
    """A classifier, its optimiser, and the networks beside it; what moves them lies in `stepping`.

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
        self.distillation = distillation or Distillation()
        if self.distillation.kind != "none" and teacher is None:
            raise UsageError(f"{self.distillation.kind} distillation needs a teacher")
        self.classifier = classifier
        self.device = classifier.head.weight.device
        self.ema = ModelEma(classifier, ema_decay) if ema_decay else None
        self.teacher = teacher
        if teacher is not None:
            classes = getattr(teacher, "num_classes", None)  # ours and timm's say so
            check_classes(classifier.num_classes, classes or classifier.num_classes)
            teacher.to(self.device).eval().requires_grad_(False)
        averages = {} if self.ema is None else self.ema.network.state_dict()
        self.stepping = Stepping(
            {"classifier": classifier},
            "classifier",
            optimiser,
            clip,
            precision,
            self.device,
            kept={
                f"the average of {name}": value
                for name, value in averages.items()
                if value.is_floating_point()
            },
            together=True,
        )

    def step(self, images: Tensor, targets: Tensor, settings: StepSettings) -> Tensor:
        """One update from images [B, C, H, W] and targets [B, K]; the loss, before the update.

        `begin`, `add` and `finish` are the same, for micro-batches that come one after the other.

        Raises:
            NonFinite: the loss, a gradient or a running statistic is none; nothing moved.
        """
        self.begin(settings)
        self.add(images, targets)
        return self.finish().tensor

    def begin(self, settings: StepSettings, count: int = 1) -> None:
        """Begin a step of `count` micro-batches, of which the optimiser takes the mean gradient."""
        self.stepping.begin(settings.lr)
        self._count, self._seen = count, 0
        self._loss = torch.zeros((), device=self.device)

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Forward and backward passes of a micro-batch."""
        self._seen += 1
        with self.stepping.exchanging(last=self._seen == self._count):
            with self.stepping.precision():
                teacher = None
                if self.teacher is not None and self.distillation.kind != "none":
                    with torch.no_grad():
                        teacher = self.teacher(images)
                logits = self.stepping.network(images)
                loss = soft_target_cross_entropy(logits, targets)
                loss = self.distillation(loss, logits, teacher)
            self._loss = self._loss + loss.detach() / self._count
            self.stepping.backward(loss / self._count)

    def finish(self, ask: bool = False) -> StepResult:
        """Look at the numbers, then move the classifier and its average. As `step`.

        ask: a GPU, too, whether all of them are finite.
        """
        if self._seen != self._count:
            self.stepping.abandon()
            raise ValueError(f"a step of {self._count} micro-batches was given {self._seen}")
        loss = distributed.mean(self._loss)
        watched = self.stepping.watch(loss.view(1), {})
        self.stepping.update(watched)
        if self.ema is not None:
            self.ema.update(self.classifier, watched.broken)
        if ask:
            self.stepping.ask()
        return StepResult(loss)

    def check(self) -> None:
        """Raises NonFinite where a step or anything that is saved is not; every process must ask."""
        self.stepping.check()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, but for its random numbers."""
        return {
            "classifier": self.classifier.state_dict(),
            "ema": None if self.ema is None else self.ema.network.state_dict(),
            **self.stepping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, strictly."""
        self.classifier.load_state_dict(state["classifier"])
        if self.ema is not None:
            self.ema.network.load_state_dict(state["ema"])
        self.stepping.load_state_dict(state)
