"""What a learner asks of its objective: a loss of two networks' embeddings, and what it remembers.

One object holds everything that one method does otherwise than another. A step calls, in this order:
`measure` for each micro-batch, then `update` once, with the statistics' mean over micro-batches and
processes, and `diagnose` where numbers are wanted.

Where a term sets images against each other (Sinkhorn-Knopp, KoLeo, the coding rate, SIGReg), these are
the images of one micro-batch on all processes: two processes do what one does with twice the batch, and
`train.accumulate` shows a term no more images than a micro-batch has.

Letters: G global views, V views in all (the global ones first), B images, d width of the bottleneck,
D width of the backbone, S numbers of the statistics.
"""

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xdino.head import WeightNormLinear


@dataclass(frozen=True)
class Views:
    """What both networks made of a micro-batch.

    student: `[V, B, d]`, the head's bottleneck, the teacher's views first. teacher: `[G, B, d]`.
    tokens: what the student's backbone gave to its head, `[V, B, D]`. The layers are those onto the
    prototypes; None where the objective has none.
    """

    student: Tensor
    teacher: Tensor
    tokens: Tensor
    teacher_temp: float
    student_layer: WeightNormLinear | None = None
    teacher_layer: WeightNormLinear | None = None


@dataclass(frozen=True)
class Measured:
    """loss: scalar with gradient. statistics: `[S]`, of which `update` gets the mean. told: scalars
    for `diagnose`, without gradient."""

    loss: Tensor
    statistics: Tensor
    told: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, abc.ABC):
    """The interface, and what suits an objective that remembers nothing.

    `of_prototypes`: the heads end in a layer onto prototypes. `unit`: the bottleneck is normalised.
    `watched`: what the statistics are, for the sentence where they are not finite. `recordable`:
    `measure` decides nothing in Python from step to step but by the teacher's temperature.
    """

    of_prototypes = True
    unit = True
    recordable = True
    watched = "the statistics of the embeddings"
    _blank: Tensor

    def __init__(self, statistics: int = 0) -> None:
        super().__init__()
        self.register_buffer("_blank", torch.zeros(statistics), persistent=False)

    def blank(self) -> Tensor:
        """Statistics of no images: zeros `[S]`, on the device and in the precision of the rest."""
        return self._blank.clone()

    @abc.abstractmethod
    def measure(self, views: Views) -> Measured:
        """The loss of one micro-batch. Moves nothing."""

    @abc.abstractmethod
    def pairs(self, views: Views) -> Tensor:
        """What each teacher view and each student view cost: `[G, V]`, for who looks at one step."""

    def update(self, statistics: Tensor, broken: Tensor | None = None) -> None:
        """End a step. `broken`: a flag on the device; where it is set nothing may move."""

    def diagnose(self, loss: float, told: Mapping[str, float]) -> dict[str, float]:
        """Columns of metrics.jsonl, from the step's loss and its `told`; after `update`."""
        return dict(told)

    def kept(self) -> dict[str, Tensor]:
        """Tensors of the state that must be finite, by what they are called."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, beside the networks: tensors and plain types."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave. Raises KeyError where it lacks something."""

    def notices(self) -> Iterator[str]:
        """Sentences that a person should read before the first step."""
        yield from ()


def in_full(x: Tensor) -> Tensor:
    """Half precision to float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
