"""The sections of a recipe that `xdino segment` and `xdino detect` share, and the home of their defaults.

A recipe of either kind is made of subclasses of these, which add what is its own and give the published
values. See `xdino.config.schema`, which pretraining's keys come from.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from xdino.config import RunConfig, schema
from xdino.config.schema import STRICT, Count, NotNegative, Positive
from xdino.nonfinite import valid_policy

ARCH = "xcit_small_12_p16"  # from scratch, where no other is named
BATCH = 16  # images of the published total batch, which `optim.lr` is meant for


def _duration(value: object) -> object:
    """Numbers of iterations stay numbers; "10%" is a share of the run."""
    fits = re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*%", value) if isinstance(value, str) else True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or (number and (value < 0 or value != int(value))):  # type: ignore[operator, call-overload]
        raise ValueError('give a number of iterations, or a share of the run such as "10%"')
    return value


#: Of a run: a number of iterations, or a share of them such as "10%".
Steps = Annotated[float | str, BeforeValidator(_duration)]


def in_iterations(duration: float | str, iterations: int) -> int:
    """A duration in iterations, whichever way it was written.

    >>> in_iterations("10%", 80000), in_iterations(1500, 80000)
    (8000, 1500)
    """
    if isinstance(duration, str) and duration.rstrip().endswith("%"):
        return round(float(duration.rstrip(" %")) / 100 * iterations)
    return int(duration)


@dataclass(frozen=True, config=STRICT)
class Model(schema.Model):
    """The network: the four levels of an XCiT's pyramid, and a head on them.

    null means: as the weights that it starts from have it, else as the name says.
    """

    arch: str | None = None  # type: ignore[assignment]
    """Its name, xcit_small_12_p16 and the like; null: that of the weights, and xcit_small_12_p16 from
    scratch."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None  # type: ignore[assignment]
    """Probability that a block is left out; null: by the network's size, as published."""
    norm: Literal["sync", "frozen"] = "sync"
    """BatchNorms of the backbone: over the images of all processes, as published, or by the running
    statistics that the weights came with, for batches of one or two images."""
    frozen: bool = False
    """Whether stem and blocks rest, and only what stands on them learns."""


@dataclass(frozen=True, config=STRICT)
class Data(schema.Data):
    """Annotated images: what is learned from, and what scores it."""

    path: str = ""
    """The folder that holds them."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of images that may be missing or unreadable, or have unusable annotations: they are skipped;
    beyond it the run does not begin, or stops."""

    @property
    def named(self) -> bool:
        """Whether a recipe says what to learn from."""
        return bool(self.path)


@dataclass(frozen=True, config=STRICT)
class Optim:
    """AdamW, betas 0.9 and 0.999. Weight decay spares what has "norm" in its name, and only that."""

    lr: NotNegative = 1e-4
    """Learning rate for a total batch of 16: it scales with the batch."""
    warmup: Steps = 500.0
    """Iterations of linear warm-up, or a share of the run such as 10%."""
    weight_decay: NotNegative = 0.05
    """Factor of weight decay; BatchNorms, biases and LayerScale are decayed, as published."""
    clip_grad: NotNegative = 0.0
    """Largest norm of all gradients together; 0 for no limit."""
    backbone_factor: NotNegative = 1.0
    """Factor of the learning rate of stem and blocks; 1 as published."""


@dataclass(frozen=True, config=STRICT)
class Train:
    """How long, and on how many images: a total batch is batch_size x accumulate x processes."""

    epochs: Positive | None = None
    """Number of epochs; null where train.iterations says how long."""
    iterations: Positive | None = None
    """Number of iterations; null where train.epochs says how long."""
    batch_size: Positive = 2
    """Images a process and micro-batch."""
    accumulate: Positive = 1
    """Micro-batches an optimisation step: more where memory is short. BatchNorms see one at a time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of the network, as in pretraining."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Number that all random numbers follow from."""
    init: str | None = None
    """Weights to start from, a file or run; also as --init; null: from scratch. Continuing a run needs
    none."""
    nonfinite: Annotated[str, AfterValidator(valid_policy)] = "stop"
    """What becomes of a step whose numbers are not finite: stop, "skip N" (at most N in a row) or
    "rollback FACTOR" (to the last saved state, the learning rate times the factor)."""

    @property
    def extended(self) -> tuple[int, ...]:
        """Epochs behind those: such a run is not extended."""
        return ()

    @property
    def continue_from(self) -> None:
        """Another trainer's checkpoint goes on in pretraining only."""

    def length(self, steps_per_epoch: int) -> int:
        """The run's iterations."""
        if self.iterations is not None:
            return self.iterations
        assert self.epochs is not None
        return self.epochs * steps_per_epoch


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """Scores on the val images while training, and at the end; whole pictures, one at a time."""

    every: Count = 1
    """Epochs between scores, with one before the first step; 0: at the end only."""


FREE = frozenset(
    (
        "train.init",
        "train.nonfinite",
        "data.path",
        "data.max_bad_share",
        "evaluate.every",
    )
)


class DenseConfig(RunConfig):
    """What the schemas of both kinds are: subclasses have the sections above, and `runtime`."""

    model: Any
    view: Any
    optim: Any

    def contradictions(self) -> Iterable[str]:
        train = self.train
        if train.epochs is None and train.iterations is None:
            yield "neither train.epochs nor train.iterations says how long the run is: give one"
        if train.epochs is not None and train.iterations is not None:
            yield (
                f"train.epochs {train.epochs} and train.iterations {train.iterations} both say how "
                "long the run is: set the other one null, as in --train.iterations null"
            )
        if self.runtime.kernels == "fused":
            yield "runtime.kernels fused is for pretraining: leave it out"
        if self.runtime.compile:
            yield "runtime.compile is for pretraining and fine-tuning: leave it at false"


# Stochastic depth of the published detection and segmentation configurations, by the end of
# "xcit_SIZE_"; sizes without one are ours, by those nearest to them.
_DROP_PATH = {
    "nano_12": 0.0,
    "tiny_12": 0.0,
    "tiny_24": 0.05,
    "small_12": 0.05,
    "small_24": 0.1,
    "medium_24": 0.15,
    "large_24": 0.2,
}


def drop_path_of(arch: str) -> float:
    """The published probability for a network: T12 0, S12 0.05, S24 0.1, M24 0.15.

    Nano, tiny 24 and large were not published; theirs are ours.
    """
    return next((p for size, p in _DROP_PATH.items() if arch.startswith(f"xcit_{size}")), 0.0)
