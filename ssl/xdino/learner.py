"""What learns, and one step of it (DINO, arXiv 2104.14294, algorithm 1).

Letters: G global views, V views, B images, d width of the bottleneck.
"""

from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xdino.acceleration import Choice
from xdino.acceleration.graphs import Passes
from xdino.loss import Measured, Objective, Views
from xdino.runtime import distributed
from xdino.schedules import StepSettings
from xdino.stepping import Stepping, StepResult
from xdino.student_teacher import MultiCropNetwork, update_teacher


class Learner:
    """Student, teacher and the objective with its state; what moves them lies in `stepping`.

    Args:
        student: trained by gradient, in training mode.
        teacher: follows the student (`student_teacher.make_teacher`).
        loss: the objective; holds what it remembers (DINO's centre).
        optimiser: "adamw", "sgd" or "lars".
        clip: largest gradient norm of one parameter tensor; 0 for none.
        precision: "fp32", "bf16" or "fp16" (with a gradient scaler).
        global_views: how many views of the first resolution the teacher sees.
        graphs: replay forward and backward passes as CUDA graphs; of one process alone.
    """

    def __init__(
        self,
        student: MultiCropNetwork,
        teacher: MultiCropNetwork,
        loss: Objective,
        optimiser: str = "adamw",
        clip: float = 3.0,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        global_views: int = 2,
        graphs: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.student, self.teacher = student.to(self.device), teacher.to(self.device)
        self.loss = loss.to(self.device)
        self.global_views = global_views
        self.kernels = Choice()  # what `plan.build_learner` found to work; for whoever reports it
        self.stepping = Stepping(
            {"student": self.student, "teacher": self.teacher},
            "student",
            optimiser,
            clip,
            precision,
            self.device,
            kept=self.loss.kept(),
        )
        trained = [p for _, p in self.stepping.trained]
        self.passes: Passes[tuple[Measured, Tensor | None]] | None = None
        if graphs:
            self.passes = Passes(trained)

    def step(
        self,
        micro_batches: Iterable[Sequence[Tensor]],
        settings: StepSettings,
        count: int | None = None,
        diagnose: bool = False,
    ) -> StepResult:
        """One optimisation step: the mean gradient of the micro-batches, one update of everything.

        `begin`, `add` and `finish` are the same, for micro-batches that come one after the other.

        Args:
            micro_batches: lists of crop groups, one group a resolution, each `[V_r, B, C, h, w]`;
                the first group begins with the global views.
            settings: what the schedules say of this step.
            count: how many micro-batches an iterator gives; what has a length is counted.
            diagnose: also ask the device for the objective's numbers.

        Raises:
            NonFinite: the loss, a gradient, its statistics or a running one are not finite on some
                process. Nothing was moved on any. On a GPU this is noticed with `diagnose`, or by
                `check`.
        """
        if isinstance(micro_batches, Sized):
            count = len(micro_batches)
        elif count is None:
            micro_batches = [*micro_batches]
            count = len(micro_batches)
        self.begin(settings, count)
        for groups in micro_batches:
            self.add(groups)
        return self.finish(diagnose)

    def begin(self, settings: StepSettings, count: int = 1) -> None:
        """Begin a step of `count` micro-batches.

        Optimiser, objective and teacher each move once, however many there are.
        """
        self.stepping.begin(settings.lr, settings.weight_decay)
        if self.passes is not None:
            self.passes.begin()
        self._settings, self._count, self._seen = settings, count, 0
        self._statistics = self.loss.blank()  # [S]
        self._loss = self._statistics.new_zeros(())
        self._told: dict[str, Tensor] = {}
        self._norms: Tensor | None = None  # of gradients that are clipped already

    def add(self, groups: Sequence[Tensor]) -> None:
        """Forward and backward passes of one micro-batch's views."""
        self._seen += 1
        if self._seen > self._count:
            self._miscounted()
        if self.passes is not None:
            temp = self._settings.teacher_temp if self.loss.of_prototypes else None
            found, self._norms = self.passes.run(
                (temp, self._count), self._both_passes, groups, alone=self._count == 1
            )
            self._note(found)
            return
        with self.stepping.exchanging(last=self._seen == self._count):
            found = self._measure(groups)
            self._note(found)
            self.stepping.backward(found.loss / self._count)

    def _both_passes(self, groups: Sequence[Tensor]) -> tuple[Measured, Tensor | None]:
        """What was measured of one micro-batch, whose gradient is added to what there is.

        Where it is the step's only one, the gradients are clipped too, and their norms come with it.
        """
        found = self._measure(groups)
        self.stepping.backward(found.loss / self._count)
        norms = self.stepping.clipped() if self._count == 1 else None
        return replace(found, loss=found.loss.detach()), norms

    def _measure(self, groups: Sequence[Tensor]) -> Measured:
        """The forward passes of teacher and student, and the objective of what they made."""
        with self.stepping.precision():
            with torch.no_grad():
                teacher = self.teacher([groups[0][: self.global_views]], embed=True)
            student = self.stepping.network(groups, embed=True)
            return self.loss.measure(
                Views(
                    student.bottleneck,  # [V, B, d]
                    teacher.bottleneck,  # [G, B, d]
                    student.tokens,
                    self._settings.teacher_temp,
                    self.student.head.last_layer,
                    self.teacher.head.last_layer,
                )
            )

    def _note(self, found: Measured) -> None:
        """Add up what is measured; with the last micro-batch processes begin to tell each other."""
        self._loss = self._loss + found.loss.detach() / self._count
        self._statistics += found.statistics / self._count
        for name, value in found.told.items():
            self._told[name] = self._told.get(name, 0) + value / self._count
        if self._seen == self._count:  # under way during the backward pass
            both = torch.cat([self._statistics, self._loss.view(1)])
            self._means = distributed.PendingMean(both)

    def finish(self, diagnose: bool = False) -> StepResult:
        """Look at the numbers, then move objective, student and teacher. As `step`."""
        if self._seen != self._count or not self._count:
            self._miscounted()
        settings = self._settings
        statistics, loss = self._means.wait().split([len(self._statistics), 1])
        watched = self.stepping.watch(loss, {self.loss.watched: statistics}, self._norms)
        broken = watched.broken  # None: all is well
        self.loss.update(statistics, broken)
        frozen = self.student.head.last_layer if settings.freeze_last_layer else None
        self.stepping.update(watched, still=frozen)
        update_teacher(self.teacher, self.student, settings.momentum, broken)
        if not diagnose:
            return StepResult(loss[0])
        self.stepping.ask()
        told = {name: distributed.mean(value).item() for name, value in self._told.items()}
        return StepResult(loss[0], self.loss.diagnose(loss[0].item(), told))

    def _miscounted(self) -> None:
        self.stepping.abandon()
        raise ValueError(f"a step of {self._count} micro-batches was given {self._seen}")

    def check(self) -> None:
        """Raises NonFinite where a step or anything that is saved is not; every process must ask."""
        self.stepping.check()

    def state_dict(self) -> dict[str, Any]:
        """All state as tensors and plain types."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            **self.loss.state(),
            **self.stepping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, strictly."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.loss.restore(state)
        self.stepping.load_state_dict(state)
