"""Everything that learns, and one optimisation step (DINO, algorithm 1).

A step whose loss, gradients, centre or running statistics are not finite moves nothing: all of them
are looked at in one vector (`_Evidence`) between the backward pass and the first thing that moves.
The running statistics alone have moved by then, in the forward passes; they are put back. A CPU is
asked at once. A GPU is not asked, for that would let it run dry: from the broken step on everything
stands still by a flag on the device, and the learner hears of it when it asks for numbers anyway.

Letters: G global views, V views, B images, K prototypes, P parameters.
"""

import contextlib
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xdino import optim
from xdino.acceleration import Choice
from xdino.chunked_loss import chunked_dino_loss
from xdino.errors import NonFinite, UsageError, nearest
from xdino.loss import DINOLoss
from xdino.runtime import distributed
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, update_teacher

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Buffers that a forward pass moves: of every BatchNorm, and of others that are called alike.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
SMALLEST_SCALE = 2.0**-16  # of fp16 losses: gradients that are infinite below it are so without it


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


class _RunningStatistics:
    """The running statistics of networks, and what they were before a step."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.named: dict[str, Tensor] = {}  # those that can be infinite, in order of `values`
        self._groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        self._before: dict[torch.dtype, Tensor] = {}
        for role, network in networks.items():
            for name, buffer in network.named_buffers():
                if name.rpartition(".")[2] in RUNNING:
                    self._groups[buffer.dtype].append(buffer)
                    if buffer.is_floating_point():
                        self.named[f"{name} of the {role}"] = buffer

    def remember(self) -> None:
        self._before = {dtype: _flat(group) for dtype, group in self._groups.items()}

    def values(self) -> list[Tensor]:
        return [x.reshape(-1) for x in self.named.values()]

    def put_back(self, where: Tensor | None = None) -> None:
        """As they were at `remember`; `where`: only if this flag on the device is set."""
        for dtype, group in self._groups.items():
            old = self._before[dtype]
            new = old if where is None else torch.where(where, old, _flat(group))
            pieces = new.split([x.numel() for x in group])
            torch._foreach_copy_(
                group, [piece.view_as(x) for piece, x in zip(pieces, group, strict=True)]
            )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


@dataclass(frozen=True)
class _Evidence:
    """The numbers of a step that must be finite, in one vector, and whose they are.

    values: the loss, one norm for each of `gradients`, the teacher's mean logits `[K]`, statistics.
    """

    values: Tensor
    gradients: list[str]
    prototypes: int
    statistics: Mapping[str, Tensor]

    def finite(self) -> Tensor:
        return self.values.isfinite().all()

    def sentence(self) -> str | None:
        """Which number it was; None where all are finite."""
        owners = {"the loss": 1}
        owners |= {f"the gradient of {name}": 1 for name in self.gradients}
        owners |= {"the teacher's mean logit of a prototype": self.prototypes}
        owners |= {name: x.numel() for name, x in self.statistics.items()}
        loss = self.values[0].item()
        at = f", at a loss of {loss:.6g}" if math.isfinite(loss) else ""
        for owner, part in zip(owners, self.values.split([*owners.values()]), strict=True):
            bad = part[~part.isfinite()]
            if len(bad):
                return f"{owner} became {bad[0].item()}{at}"
        return None


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
        self.asks_every_step = False  # a GPU too; each time it waits for the device
        self._trained = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        self._first: _Evidence | None = None  # of the first broken step; the others until then
        self._statistics = _RunningStatistics({"student": self.student, "teacher": self.teacher})
        self._broken = torch.zeros((), dtype=torch.bool, device=self.device)
        self._standing = torch.zeros((), dtype=torch.int64, device=self.device)
        self._student: nn.Module = self.student
        if distributed.world_size() > 1:
            # Buffers need no broadcast: the BatchNorms see all processes, so they agree already.
            # torch renamed the option after 2.11.
            known = inspect.signature(DistributedDataParallel).parameters
            name = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )
            options: dict[str, Any] = {name: False}
            # Of 1 x 1 convolutions' strides, which mean the same; every process would say so.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            self._student = DistributedDataParallel(self.student, **options)

    def step(
        self,
        micro_batches: Iterable[Sequence[Tensor]],
        settings: StepSettings,
        count: int | None = None,
        diagnose: bool = False,
    ) -> StepResult:
        """One optimisation step: the mean gradient of the micro-batches, one update of everything.

        Optimiser, centre and teacher each move once, however many there are.

        Args:
            micro_batches: lists of crop groups, one group a resolution, each `[V_r, B, C, h, w]`;
                the first group begins with the global views.
            settings: what the schedules say of this step.
            count: how many micro-batches there are, where they have no length, so that they need
                not lie in memory together.
            diagnose: also ask the device for teacher entropy and the rest.

        Raises:
            NonFinite: the loss, a gradient, the centre or a running statistic is not finite on some
                process. Nothing was moved on any. On a GPU this is noticed with `diagnose`, or by
                `check`.
        """
        if count is None:
            micro_batches = micro_batches if isinstance(micro_batches, Sized) else [*micro_batches]
            count = len(micro_batches)
        optim.set_step(self.optimiser, settings.lr, settings.weight_decay)
        self.optimiser.zero_grad(set_to_none=True)
        self._statistics.remember()
        batch_mean = torch.zeros_like(self.loss.centre[0])
        total = entropy = batch_mean.new_zeros(())
        seen = 0
        for seen, groups in enumerate(micro_batches, start=1):
            with self._accumulating(seen < count):
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
                if seen == count:  # under way during the backward pass
                    means = distributed.PendingMean(torch.cat([batch_mean, total.view(1)]))
                self.scaler.scale(found.loss / count).backward()
        if seen != count or not count:
            self._statistics.put_back()
            raise ValueError(f"a step of {count} micro-batches was given {seen}")

        mean, loss = means.wait().split([len(batch_mean), 1])
        norms = self._gradient_norms()
        broken = self._watch(self._evidence(loss, mean, norms))
        if broken is not None:
            mean = torch.where(broken, self.loss.centre[0], mean)
        self.loss.move_centre(mean)
        self._update_student(settings.freeze_last_layer, norms)
        update_teacher(self.teacher, self.student, settings.momentum, broken)
        if not diagnose:
            return StepResult(loss[0])
        self._ask()
        return StepResult(loss[0], self._diagnose(loss[0].item(), entropy))

    # --- numbers that are none ---

    @property
    def _asks(self) -> bool:
        """Whether every step asks its device; only fused AdamW can stand still by itself."""
        adamw = isinstance(self.optimiser, torch.optim.AdamW)
        return self.asks_every_step or self.device.type == "cpu" or not adamw

    def _gradient_norms(self) -> Tensor | None:
        """`[P]`; None under a scaler, whose infinite gradients are ordinary: it skips the step."""
        grads = [p.grad for _, p in self._trained if p.grad is not None]
        if self.scaler.is_enabled() or not grads:
            return None
        return optim.gradient_norms(grads)

    def _evidence(self, loss: Tensor, mean: Tensor, norms: Tensor | None) -> _Evidence:
        grads = [n for n, p in self._trained if p.grad is not None] if norms is not None else []
        values = [loss, *([] if norms is None else [norms]), mean, *self._statistics.values()]
        return _Evidence(torch.cat(values), grads, len(mean), self._statistics.named)

    def _watch(self, evidence: _Evidence) -> Tensor | None:
        """See to it that a step with numbers that are not finite moves nothing, on any process.

        Returns:
            None where the device was asked and all is well; else the flag that keeps things still,
            set by the first broken step and kept until somebody asks.
        """
        broken = distributed.any_of(~evidence.finite())
        if self._asks:
            if broken.item():
                self._statistics.put_back()
                self._fail(evidence, standing=1)
            return None
        if self._first is None:
            self._first = evidence
        else:
            latched = torch.where(self._broken, self._first.values, evidence.values)
            self._first = replace(evidence, values=latched)
        self._broken = self._broken | broken
        self._standing = self._standing + self._broken
        self._statistics.put_back(where=self._broken)
        if self.scaler.is_enabled():  # which looks at gradients itself: show it one that stays
            grads = [
                p.grad
                for name, p in self._trained
                if p.grad is not None and not name.startswith("head.last_layer.")
            ]
            min(grads, key=torch.numel).masked_fill_(self._broken, math.nan)
        else:
            self.optimiser.found_inf = self._broken.float()  # type: ignore[attr-defined]
        return self._broken

    def _ask(self) -> None:
        """Ask the device whether everything so far was finite."""
        if self._first is not None and self._broken.item():
            self._fail(self._first, int(self._standing.item()))
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < SMALLEST_SCALE:
            sentence = f"the gradients are not finite, even at a loss scale of {scale:.1g}"
            raise NonFinite(sentence, spoilt=True)

    def check(self) -> None:
        """Ask the device whether everything is finite: every step so far, and all that is saved.

        Every process must ask.

        Raises:
            NonFinite: something is not; if it was in a step, all stands where it stood before it.
        """
        self._ask()
        bad = next(filter(None, distributed.gather(self._not_finite())), None)
        if bad is not None:
            raise NonFinite(bad, spoilt=True)

    def _not_finite(self) -> str | None:
        """The first of the tensors that make up the state that is not finite."""
        tensors: dict[str, Tensor]
        tensors = {f"{n} of the student": p for n, p in self.student.named_parameters()}
        tensors |= {f"{n} of the teacher": p for n, p in self.teacher.named_parameters()}
        tensors |= self._statistics.named
        tensors["the centre"] = self.loss.centre
        for name, p in self._trained:
            for kind, value in self.optimiser.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    tensors[f"the optimiser's {kind} of {name}"] = value
        largest = torch._foreach_norm([x.detach() for x in tensors.values()], math.inf)
        for name, value in zip(
            tensors, torch.stack([x.double() for x in largest]).tolist(), strict=True
        ):
            if not math.isfinite(value):
                return f"{name} became {value}"
        return None

    def _fail(self, evidence: _Evidence, standing: int) -> NoReturn:
        """Raise the same sentence on every process."""
        weights = self._not_finite()
        mine = evidence.sentence()
        found = distributed.gather((mine, weights, evidence.values[0].item()))
        sentence = next(sentence for sentence, _, _ in found if sentence)
        cause = next((weights for _, weights, _ in found if weights), None)
        if cause is not None:
            sentence += f" ({cause} before it)"
        raise NonFinite(sentence, found[0][2], standing, spoilt=cause is not None)

    def _forget(self) -> None:
        """Nothing was broken so far: another state was loaded."""
        self._first = None
        self._broken.zero_()
        self._standing.zero_()
        vars(self.optimiser).pop("found_inf", None)

    # --- the parts of a step ---

    def _update_student(self, freeze_last_layer: bool, norms: Tensor | None) -> None:
        if self.clip > 0:
            self.scaler.unscale_(self.optimiser)
            optim.clip_each((p for _, p in self._trained), self.clip, norms)
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
        self._forget()
