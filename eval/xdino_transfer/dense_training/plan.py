"""What a dense recipe comes to: its length, its bytes, and whether there is room for them.

Letters: B images of a micro-batch, H x W pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xdino.backbones import BackboneSpec
from xdino.config.bands import Bands, channels_of
from xdino.data import Source
from xdino.errors import UsageError
from xdino.forecast.costs import activation_bytes
from xdino.plan import feasibility
from xdino.plan.measured import check_bands, measured
from xdino.runtime.device import resolve_device, resolve_precision
from xdino.schedules import Array
from xdino_transfer.dense_training import starting
from xdino_transfer.dense_training.recipe import BATCH, DenseConfig
from xdino_transfer.dense_training.starting import Weights


@dataclass(frozen=True)
class DensePlan:
    """train: what is learned from, by `Source`'s interface. val: what scores it, as its kind reads it.

    views: how images are shown in training. rates: float64 [iterations], of every step.
    step_bytes: about what a step of one process needs in memory, 0 where nobody can tell;
    state_bytes: a checkpoint. weights: what the run begins with, where it was read for the plan.
    """

    config: Any
    train: Source
    val: Any
    classes: tuple[str, ...]
    spec: BackboneSpec
    views: Any
    rates: Array
    device: torch.device
    precision: str
    total_batch: int
    steps_per_epoch: int
    step_bytes: int = 0
    state_bytes: int = 0
    weights: Weights | None = None

    @property
    def iterations(self) -> int:
        return len(self.rates)


P = TypeVar("P", bound=DensePlan)


@dataclass(frozen=True)
class Start:
    """What a plan knows before it opens any data. known: of a network that there is already."""

    known: BackboneSpec | None
    weights: Weights | None
    device: torch.device
    precision: str
    total_batch: int


def start_of(
    config: DenseConfig,
    world_size: int,
    precision: str | None,
    spec: Mapping[str, Any] | None,
    what: str,
) -> Start:
    """
    Args:
        precision: what "auto" was found to be. spec: of a run that is continued, whose first
            weights may be gone. what: "a folder of ...", for a sentence.

    Raises:
        UsageError: no data named; no such device; weights that cannot be begun with.
        RunFailed: weights that are damaged.
    """
    if not config.data.named:
        raise UsageError(f"data.path is not set: name {what} with --data.path FOLDER")
    device = resolve_device(config.runtime.device)
    precision = precision or resolve_precision(config.train.precision, device)
    weights, known, train = None, None, config.train
    if spec is not None:
        known = BackboneSpec.from_dict(dict(spec))
    elif train.init is not None:
        weights = starting.read(train.init, config.model.arch)
        known = starting.spec_of_weights(config, weights)
    if config.model.norm == "frozen" and train.init is None:
        raise UsageError(
            "model.norm frozen keeps the statistics that weights come with, and from scratch there "
            "are none: name weights with --init, or leave it at sync"
        )
    total = train.batch_size * train.accumulate * world_size
    return Start(known, weights, device, precision, total)


def read_as(config: DenseConfig, start: Start) -> int | None:
    """What images are asked for, as `open_source` takes it; None: what there is."""
    asked, known = config.channels, start.known
    return channels_of(known.in_chans, known.bands) if asked is None and known else asked


C = TypeVar("C", bound=DenseConfig)


def shown_as(config: C, source: Source, known: BackboneSpec | None) -> tuple[C, BackboneSpec]:
    """The recipe with what the images' bands come to, and the network that is shown them.

    Its statistics are the recipe's, else the network's own, else measured (bands) or ImageNet's.

    Raises:
        UsageError: images of other channels than the network's; none of a sample can be read.
    """
    channels, settled = source.channels, config
    if known is None:
        settled = measured(config, source, "view")
        spec = starting.spec_from_scratch(settled, channels)
    elif int(channels) != known.in_chans:
        raise UsageError(
            f"the images of {source.name} have {int(channels)} bands, and the network takes "
            f"{known.in_chans}: start from other weights, or from scratch"
        )
    else:
        check_bands(source)
        spec = known
        if isinstance(channels, Bands):
            spec = dataclasses.replace(known, bands=channels)
    v = settled.view
    if v.mean is None or v.std is None:
        return settled, spec
    if not len(v.mean) == len(v.std) == spec.in_chans:
        raise UsageError(
            f"view.mean and view.std need one value a channel: {spec.in_chans}, got "
            f"{len(v.mean)} and {len(v.std)}"
        )
    return settled, dataclasses.replace(spec, mean=v.mean, std=v.std)


def peak_lr(config: DenseConfig, total_batch: int) -> float:
    """The published learning rate is for a total batch of 16; it scales with the batch, as ours does."""
    return float(config.optim.lr) * total_batch / BATCH


def proven(
    plan: P,
    build: Callable[[], nn.Module],
    losses: Callable[[nn.Module, str, int], Tensor] | None,
    what: str,
    mend: str,
) -> P:
    """The plan with its bytes.

    Args:
        build: the network, also without memory (on torch's "meta" device).
        losses: the loss of a network for so many images on a device, to count what lives at once;
            None where it cannot be had without values.
        what: "steps of 2 images of 512 pixels", for a sentence. mend: what to lower.

    Raises:
        UsageError: there is no room in memory, or as `build`.
    """
    with torch.random.fork_rng(devices=[]):
        network = feasibility.on_meta(build).train()
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = feasibility.trained_bytes(network)
    state = weights + 2 * trained  # and the two moments of AdamW
    step = state + trained
    if losses is not None and next(network.parameters()).is_meta:

        def backward(images: int) -> None:
            losses(network, "meta", images).backward()

        step += activation_bytes(backward, plan.config.train.batch_size, plan.precision)
    plan = dataclasses.replace(plan, step_bytes=step, state_bytes=state)
    feasibility.check_memory(what, step, plan.device, mend)
    return plan


def with_weights(plan: P, weights: Weights | None) -> P:
    return dataclasses.replace(plan, weights=weights)
