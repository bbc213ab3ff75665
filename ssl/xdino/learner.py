"""Everything that learns, and one optimisation step (DINO, algorithm 1).

Letters: G global views, V views, B images, K prototypes.
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xdino import distributed, optim
from xdino.acceleration import Choice
from xdino.chunked_loss import chunked_dino_loss
from xdino.errors import RunFailed, UsageError, nearest
from xdino.loss import DINOLoss
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, update_teacher

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """The loss of a step, and what was asked to be diagnosed (names as in metrics.jsonl).

    `tensor` is the loss where it was computed; reading `loss` waits for the device.
    """

    tensor: Tensor
    diagnostics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.tensor.item()


class Learner:
    """Student, teacher, loss with its centre, optimiser and gradient scaler of a run.

    Args:
        student: trained by gradient, in training mode.
        teacher: follows the student (`student_teacher.make_teacher`).
        loss: holds the centre.
        optimiser: "adamw", "sgd" or "lars".
        clip: largest gradient norm of one parameter tensor; 0 for none.
        precision: "fp32", "bf16" or "fp16" (with a gradient scaler).
        global_views: how many views of the first resolution the teacher sees.
    """

    def __init__(
        self,
        student: MultiCropNetwork,
        teacher: MultiCropNetwork,
        loss: DINOLoss,
        optimiser: str = "adamw",
        clip: float = 3.0,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        global_views: int = 2,
    ) -> None:
        if precision not in AUTOCAST:
            raise UsageError(
                f'no precision is called "{precision}": {nearest(precision, AUTOCAST)}'
            )
        self.device = torch.device(device)
        self.student, self.teacher = student.to(self.device), teacher.to(self.device)
        self.loss = loss.to(self.device)
        for network in (self.student, self.teacher):
            distributed.synchronise_batch_norm(network, self.device)
        self.optimiser = optim.build(optimiser, self.student)
        self.clip = clip
        self.global_views = global_views
        self.kernels = Choice()  # what `plan.build_learner` found to work; for whoever reports it
        self.autocast = AUTOCAST[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._latest = torch.zeros((), device=self.device)
        self._student: nn.Module = self.student
        if distributed.world_size() > 1:
            # Buffers need no broadcast: the BatchNorms see all processes, so they agree already.
            # torch renamed the option after 2.11.
            known = inspect.signature(DistributedDataParallel).parameters
            name = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )
            options: dict[str, Any] = {name: False}
            self._student = DistributedDataParallel(self.student, **options)

    def step(
        self,
        micro_batches: Iterable[Sequence[Tensor]],
        settings: StepSettings,
        count: int = 1,
        diagnose: bool = False,
    ) -> StepResult:
        """One optimisation step: gradients of `count` micro-batches, then one update of everything.

        Optimiser, centre and teacher each move once, whatever `count` is.

        Args:
            micro_batches: `count` lists of crop groups, one group a resolution, each
                `[V_r, B, C, h, w]`; the first group begins with the global views.
            settings: what the schedules say of this step.
            diagnose: also ask the device for teacher entropy and the rest.

        Raises:
            RunFailed: the loss is not finite on some process. Nothing was updated on any. On a GPU
                this is noticed with `diagnose`, or by `check`.
        """
        optim.set_step(self.optimiser, settings.lr, settings.weight_decay)
        self.optimiser.zero_grad(set_to_none=True)
        batch_mean = torch.zeros_like(self.loss.centre[0])
        total = entropy = batch_mean.new_zeros(())
        for i, groups in enumerate(micro_batches, start=1):
            with self._accumulating(i < count):
                with self._precision():
                    with torch.no_grad():
                        teacher = self.teacher([groups[0][: self.global_views]], embed=True)
                    student = self._student(groups, embed=True)
                    found = chunked_dino_loss(
                        student,
                        teacher,
                        self.student.head.last_layer,  # type: ignore[arg-type]
                        self.teacher.head.last_layer,  # type: ignore[arg-type]
                        self.loss.centre,
                        self.loss.student_temp,
                        settings.teacher_temp,
                    )
                total = total + found.loss.detach() / count
                batch_mean += found.teacher_mean / count
                entropy = entropy + found.teacher_entropy / count
                if i == count:  # under way during the backward pass
                    means = distributed.PendingMean(torch.cat([batch_mean, total.view(1)]))
                self.scaler.scale(found.loss / count).backward()

        mean, loss = means.wait().split([len(batch_mean), 1])
        self._watch(loss[0])
        self.loss.move_centre(torch.where(self._broken(), self.loss.centre[0], mean))
        self._update_student(settings.freeze_last_layer)
        update_teacher(self.teacher, self.student, settings.momentum)
        if not diagnose:
            return StepResult(loss[0])
        self.check()
        return StepResult(loss[0], self._diagnose(loss[0].item(), entropy))

    def _watch(self, loss: Tensor) -> None:
        """Remember the loss; the first that is not finite is kept, and nothing moves after it.

        Every process sees the same mean loss. A GPU is not asked what it was: its optimiser skips
        the update by itself, until somebody calls `check`.
        """
        self._latest = torch.where(self._broken(), self._latest, loss)
        if self.device.type == "cpu" or not isinstance(self.optimiser, torch.optim.AdamW):
            self.check()
        elif not self.scaler.is_enabled():  # a scaler looks for itself
            self.optimiser.found_inf = self._broken().float()  # type: ignore[attr-defined]

    def _broken(self) -> Tensor:
        return ~self._latest.isfinite()

    def check(self) -> None:
        """Ask the device whether every loss so far was finite.

        Raises:
            RunFailed: one was not; student and centre stand where they stood before it.
        """
        value = self._latest.item()
        if not math.isfinite(value):
            raise RunFailed(
                f"the loss became {value}; lower optim.lr or optim.clip_grad, or train in fp32 "
                "(train.precision)"
            )

    def _update_student(self, freeze_last_layer: bool) -> None:
        if self.clip > 0:
            self.scaler.unscale_(self.optimiser)
            optim.clip_each(self.student.parameters(), self.clip)
        if freeze_last_layer:
            optim.drop_gradients(self.student.head.last_layer)  # type: ignore[arg-type]
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _diagnose(self, loss: float, entropy: Tensor) -> dict[str, float]:
        teacher_entropy = distributed.mean(entropy).item()
        return {
            "teacher_entropy": teacher_entropy,  # nats; ln K when the teacher says nothing
            "kl": loss - teacher_entropy,  # nats; cross-entropy = entropy + divergence
            "centre_norm": self.loss.centre.norm().item(),
        }

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _accumulating(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged between processes with the last micro-batch only."""
        if more and isinstance(self._student, DistributedDataParallel):
            return self._student.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, object]:
        """All state as tensors and plain types."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "centre": self.loss.centre,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Restore what `state_dict` gave, strictly."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.loss.load_state_dict({"centre": state["centre"]})
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
