"""One step of a segmenter or a detector: losses by name, their sum, one update of AdamW.

Letters: P processes.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from xdino.runtime import distributed
from xdino.runtime.device import device_of
from xdino.stepping import Stepping, StepResult

Batch = TypeVar("Batch")
Losses = Callable[[Any, Any], dict[str, Tensor]]
"""A network and a batch on its device -> a number each, by name. Those whose names begin with "accuracy"
are told and not minimised; the others are summed."""
TOLD = "accuracy"
BACKBONE = "backbone."
LEVELS = ("backbone.fpn",)  # below `backbone.` in the published names, but new with each task


class _Losses(nn.Module):
    """What the forward pass of several processes goes through: batch -> losses by name."""

    def __init__(self, network: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.network, self._losses = network, losses

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self._losses(self.network, batch)


def parameter_groups(
    network: nn.Module, weight_decay: float, backbone_factor: float = 1.0
) -> list[dict[str, object]]:
    """Groups of what is trained, one for each learning rate and weight decay.

    As published (`rates.only_norms`, of which this is the same with one factor more), what has "norm"
    in its name is not decayed, and everything else is: BatchNorms, biases, LayerScale, temperatures.

    Args:
        backbone_factor: of the learning rate of stem and blocks.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        below = name.startswith(BACKBONE) and not name.startswith(LEVELS)
        key = backbone_factor if below else 1.0, 0.0 if "norm" in name else weight_decay
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def adamw(groups: list[dict[str, object]]) -> Optimizer:
    """The rate comes with each step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


class DenseLearner(Generic[Batch]):
    """A network, its optimiser, and how it is told what is wrong with it; the rest is `Stepping`.

    Args:
        network: in training mode, on its device.
        losses: see `Losses`; called under autocast.
        optimiser: over `parameter_groups`.
        clip: largest norm of all gradients together; 0 for none, as published.
        precision: "fp32", "bf16" or "fp16" (with a gradient scaler).

    Raises:
        UsageError: a precision that is none.
    """

    def __init__(
        self,
        network: nn.Module,
        losses: Losses,
        optimiser: Optimizer,
        clip: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        self.network, self.device = network, device_of(network)
        whole = _Losses(network, losses)
        self.stepping = Stepping(
            {"network": whole}, "network", optimiser, clip, precision, self.device, together=True
        )

    def begin(self, lr: float, count: int = 1) -> None:
        """Begin a step of `count` micro-batches, of which the optimiser takes the mean gradient."""
        self.stepping.begin(lr)
        self._count, self._seen = count, 0
        self._names: list[str] = []
        self._sums = torch.zeros((), device=self.device)

    def add(self, batch: Batch) -> None:
        """Forward and backward passes of a micro-batch."""
        self._seen += 1
        with self.stepping.exchanging(last=self._seen == self._count):
            with self.stepping.precision():
                parts = self.stepping.network(batch)
                loss = torch.stack(
                    [part.float() for name, part in parts.items() if not name.startswith(TOLD)]
                ).sum()
            self._names = [*parts]
            values = torch.stack([loss, *parts.values()]).detach().float()
            self._sums = self._sums + values / self._count
            self.stepping.backward(loss / self._count)

    def finish(self, ask: bool = False) -> StepResult:
        """Look at the numbers, then move the network.

        ask: a GPU, too, whether all of them are finite, and the parts of the loss.

        Raises:
            NonFinite: the loss, a gradient or a running statistic is none; nothing moved.
        """
        if self._seen != self._count:
            self.stepping.abandon()
            raise ValueError(f"a step of {self._count} micro-batches was given {self._seen}")
        values = distributed.mean(self._sums)
        watched = self.stepping.watch(values[:1], {})
        self.stepping.update(watched)
        told: dict[str, float] = {}
        if ask:
            self.stepping.ask()
            told = {
                name if name.startswith(TOLD) else f"loss_{name}": value
                for name, value in zip(self._names, values[1:].tolist(), strict=True)
            }
        return StepResult(values[0], told)

    def check(self) -> None:
        """Raises NonFinite where a step or anything that is saved is not; every process must ask."""
        self.stepping.check()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, but for its random numbers."""
        return {"network": self.network.state_dict(), **self.stepping.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, strictly."""
        self.network.load_state_dict(state["network"])
        self.stepping.load_state_dict(state)
