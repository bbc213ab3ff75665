"""What every learner shares: precision, accumulation, processes, one update, the watch over its numbers.

A step whose loss, gradients, running statistics or other evidence are not finite moves nothing: all of
them are looked at in one vector (`_Evidence`) between the backward pass and the first thing that moves.
The running statistics alone have moved by then, in the forward passes; they are put back. A CPU is
asked at once. A GPU is not asked, for that would let it run dry: from the broken step on everything
stands still by a flag on the device, and the learner hears of it when it asks for numbers anyway.

Letters: P parameters.
"""

import contextlib
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from xdino import optim
from xdino.errors import NonFinite, RunFailed, UsageError, nearest
from xdino.runtime import distributed

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Buffers that a forward pass moves: of every BatchNorm, and of others that are called alike.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
SMALLEST_SCALE = 2.0**-16  # of fp16 losses: gradients that are infinite below it are so without it


@dataclass(frozen=True)
class Work:
    """What a step does, to say how fast it is.

    tokens: patches of all views of all images, over all processes. operations: of products and
    convolutions, on one process, and `peak`, how many its device can do in a second; 0 if unknown.
    """

    tokens: float
    operations: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """The loss of a step, and what was asked to be diagnosed (names as in metrics.jsonl).

    `tensor` is the loss where it was computed; reading `loss` waits for the device.
    """

    tensor: Tensor
    diagnostics: dict[str, float] = field(default_factory=dict)
    work: Work | None = None

    @property
    def loss(self) -> float:
        return self.tensor.item()


class RunningStatistics:
    """The running statistics of networks, and what they were before a step."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.named: dict[str, Tensor] = {}  # those that can be infinite, in their order
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
    """The numbers of a step that must be finite, in one vector, and how many of them are whose.

    The loss comes first.
    """

    values: Tensor
    owners: Mapping[str, int]

    def finite(self) -> Tensor:
        return self.values.isfinite().all()

    def sentence(self) -> str | None:
        """Which number it was; None where all are finite."""
        loss = self.values[0].item()
        at = f", at a loss of {loss:.6g}" if math.isfinite(loss) else ""
        parts = self.values.split([*self.owners.values()])
        for owner, part in zip(self.owners, parts, strict=True):
            bad = part[~part.isfinite()]
            if len(bad):
                return f"{owner} became {bad[0].item()}{at}"
        return None


class Stepping:
    """The optimiser, gradient scaler and processes of a learner, and the watch over its numbers.

    A step is `begin`, then for each micro-batch a forward pass of `network` within `precision` and
    `backward`, both within `exchanging`, then `watch`, then `update`.

    Args:
        networks: by role ("student", ...), on `device`; their statistics and parameters are watched.
        trained: the role that is trained by gradient.
        optimiser: "adamw", "sgd" or "lars", or one over the trained network's own groups.
        clip: largest gradient norm of one parameter tensor; 0 for none.
        precision: "fp32", "bf16" or "fp16" (with a gradient scaler).
        kept: other tensors that a state holds, by what they are called; they stay where they are.
        together: `clip` is the norm of all gradients together.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        trained: str,
        optimiser: str | Optimizer,
        clip: float,
        precision: str,
        device: torch.device,
        kept: Mapping[str, Tensor] | None = None,
        together: bool = False,
    ) -> None:
        if precision not in AUTOCAST:
            raise UsageError(
                f'no precision is called "{precision}": {nearest(precision, AUTOCAST)}'
            )
        self.device, self.clip = device, clip
        self._clip = optim.clip_together if together else optim.clip_each
        self.autocast = AUTOCAST[precision]
        self.networks, self.kept = dict(networks), dict(kept or {})
        for each in self.networks.values():
            distributed.synchronise_batch_norm(each, device)
        network = self.networks[trained]
        self.optimiser: Optimizer = (
            optim.build(optimiser, network) if isinstance(optimiser, str) else optimiser
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.before_moving: Callable[[], None] = lambda: None  # of parameters, moments, averages
        self.asks_every_step = False  # a GPU too; each time it waits for the device
        self.trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        self.statistics = RunningStatistics(self.networks)
        self.network: nn.Module = _over_processes(network)  # what the forward pass goes through
        self._norms: Tensor | None = None  # of the last step's gradients
        self._first: _Evidence | None = None  # of the first broken step; the others until then
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._standing = torch.zeros((), dtype=torch.int64, device=device)

    # --- the parts of a step ---

    def begin(self, lr: float, weight_decay: float | None = None) -> None:
        """weight_decay: None = what the optimiser's groups have."""
        optim.set_step(self.optimiser, lr, weight_decay)
        self.optimiser.zero_grad(set_to_none=True)
        self.statistics.remember()

    def precision(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged between processes with the last micro-batch only."""
        if not last and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def abandon(self) -> None:
        """The step is not to be: the running statistics are as they were at `begin`."""
        self.statistics.put_back()

    def clipped(self) -> Tensor | None:
        """Clip the gradients now; their norms before it `[P]`. Under a scaler nothing is done: None."""
        norms = self._gradient_norms()
        if norms is not None and self.clip > 0:
            self._clip((p for _, p in self.trained), self.clip, norms)
        return norms

    def watch(
        self, loss: Tensor, others: Mapping[str, Tensor], clipped: Tensor | None = None
    ) -> "Watched":
        """See to it that a step with numbers that are not finite moves nothing, on any process.

        Args:
            loss: `[1]`. others: vectors that must be finite too, by what they are called.
            clipped: what `clipped` gave, where it was called.

        Raises:
            NonFinite: the device was asked, and something is not; nothing has moved on any process.
        """
        self.before_moving()
        norms = self._norms = self._gradient_norms() if clipped is None else clipped
        evidence = self._evidence(loss, norms, others)
        broken = distributed.any_of(~evidence.finite())
        if self._asks:
            if broken.item():
                self.statistics.put_back()
                self._fail(evidence, standing=1)
            return Watched(None, norms, clipped is not None)
        if self._first is None:
            self._first = evidence
        else:
            latched = torch.where(self._broken, self._first.values, evidence.values)
            self._first = replace(evidence, values=latched)
        self._broken = self._broken | broken
        self._standing = self._standing + self._broken
        self.statistics.put_back(where=self._broken)
        return Watched(self._broken, norms, clipped is not None)

    def update(self, watched: "Watched", still: nn.Module | None = None) -> None:
        """One step of the optimiser with gradients clipped; `still`: a part that stays as it is."""
        if watched.broken is not None:
            self._stand_still(watched.broken, still)
        if self.clip > 0 and not watched.clipped:
            self.scaler.unscale_(self.optimiser)
            self._clip((p for _, p in self.trained), self.clip, watched.norms)
        if still is not None:
            optim.drop_gradients(still)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def gradient_norm(self) -> float | None:
        """Of the last step's gradient before clipping; None under a scaler. Waits for the device."""
        norms = self._norms
        return None if norms is None else float(torch.linalg.vector_norm(norms.double()))

    # --- numbers that are none ---

    @property
    def _asks(self) -> bool:
        """Whether every step asks its device; only fused AdamW can stand still by itself."""
        adamw = isinstance(self.optimiser, torch.optim.AdamW)
        return self.asks_every_step or self.device.type == "cpu" or not adamw

    def _gradient_norms(self) -> Tensor | None:
        """`[P]`; None under a scaler, whose infinite gradients are ordinary: it skips the step."""
        grads = [p.grad for _, p in self.trained if p.grad is not None]
        if self.scaler.is_enabled() or not grads:
            return None
        return optim.gradient_norms(grads)

    def _evidence(
        self, loss: Tensor, norms: Tensor | None, others: Mapping[str, Tensor]
    ) -> _Evidence:
        named: dict[str, int] = {"the loss": 1}
        values = [loss]
        if norms is not None:
            named |= {f"the gradient of {n}": 1 for n, p in self.trained if p.grad is not None}
            values.append(norms)
        for owners in (others, self.statistics.named):
            named |= {name: x.numel() for name, x in owners.items()}
            values += [x.reshape(-1) for x in owners.values()]
        return _Evidence(torch.cat(values), named)

    def _stand_still(self, broken: Tensor, still: nn.Module | None) -> None:
        """The optimiser moves nothing where the flag `broken` is set on the device."""
        if not self.scaler.is_enabled():
            vars(self.optimiser)["found_inf"] = broken.float()  # fused AdamW looks there
            return
        # A scaler looks at the gradients itself: it is shown one that is there to stay.
        dropped = {id(p) for p in still.parameters()} if still is not None else set()
        grads = [p.grad for _, p in self.trained if p.grad is not None and id(p) not in dropped]
        min(grads, key=torch.numel).masked_fill_(broken, math.nan)

    def ask(self) -> None:
        """Ask the device whether every step so far was finite; raises NonFinite."""
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
        self.ask()
        bad = next(filter(None, distributed.gather(self._not_finite())), None)
        if bad is not None:
            raise NonFinite(bad, spoilt=True)

    def _not_finite(self) -> str | None:
        """The first of the tensors that make up the state that is not finite."""
        tensors: dict[str, Tensor] = {}
        for role, network in self.networks.items():
            tensors |= {f"{n} of the {role}": p for n, p in network.named_parameters()}
        tensors |= self.statistics.named | self.kept
        for name, p in self.trained:
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

    # --- state ---

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` gave; nothing was broken so far."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self._first = None
        self._broken.zero_()
        self._standing.zero_()
        vars(self.optimiser).pop("found_inf", None)


@dataclass(frozen=True)
class Watched:
    """What `Stepping.watch` saw.

    broken: None where the device was asked and all is well; else the flag that keeps things still,
    set by the first broken step and kept until somebody asks. norms: of the gradients `[P]`, which are
    `clipped` by them already or not.
    """

    broken: Tensor | None
    norms: Tensor | None
    clipped: bool


def _over_processes(network: nn.Module) -> nn.Module:
    """`network`, its gradients averaged over the processes where there are several.

    By torch's DDP, which sends a bucket of gradients as soon as the backward pass has filled it, while
    that goes on. Gradients are views of the buckets, so that no copy of them is kept: the same bits, and
    as many bytes less (tests/benchmarks/averaging.py). The graph is not called static: detectors' heads
    learn from other regions each step, micro-batches but the last exchange nothing, and no time was won.
    """
    if distributed.world_size() == 1:
        return network
    # Buffers need no broadcast: the BatchNorms see all processes, so they agree already.
    # torch renamed the option after 2.11.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    # Of 1 x 1 convolutions' strides, which mean the same; every process would say so.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    return DistributedDataParallel(network, **options)


def failure_of(error: Exception) -> str | None:
    """What the world did, or None for what is a fault of this program."""
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, OSError):
        return f"the disk or the network failed: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory does not suffice: lower train.batch_size and raise train.accumulate, "
            "or set runtime.activation_checkpointing true"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "the memory does not suffice: lower train.batch_size, runtime.prefetch or head.prototypes"
    return None
