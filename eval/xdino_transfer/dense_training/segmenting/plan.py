"""What a recipe of `xdino segment` comes to, given the data, the weights and the number of processes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdino.backbones import BackboneSpec
from xdino.data import steps_per_epoch
from xdino.errors import UsageError, asked
from xdino.schedules import Array
from xdino.values import shown
from xdino.xcit import XCiT
from xdino_transfer import rates
from xdino_transfer.dense_training import plan as planning
from xdino_transfer.dense_training import starting
from xdino_transfer.dense_training.plan import DensePlan
from xdino_transfer.dense_training.recipe import in_iterations
from xdino_transfer.dense_training.segmenting.pictures import (
    MaskedPictures,
    UsableMaps,
    check_masks,
)
from xdino_transfer.dense_training.segmenting.recipe import Segmentation
from xdino_transfer.dense_training.starting import Weights
from xdino_transfer.segmentation import segmenter
from xdino_transfer.segmentation.losses import VOID
from xdino_transfer.segmentation.maps import open_maps
from xdino_transfer.segmentation.segmenter import Segmenter
from xdino_transfer.segmentation.views import TestViews, TrainViews

FOLDER = "pictures with masks"


@dataclass(frozen=True)
class Plan(DensePlan):
    config: Segmentation
    train: MaskedPictures
    val: UsableMaps
    views: TrainViews

    @property
    def test_views(self) -> TestViews:
        view = self.views
        return TestViews(view.mean, view.std, view.longer, view.shorter)


def make_plan(
    config: Segmentation,
    world_size: int = 1,
    precision: str | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Plan:
    """Open the data, work everything out, and prove that the run can start; nothing is written.

    Args:
        precision, spec: as of `dense_training.plan.start_of`.

    Raises:
        UsageError: whatever cannot be done as configured.
        RunFailed: weights to start from that are damaged.
    """
    start = planning.start_of(config, world_size, precision, spec, FOLDER)
    d = config.data
    with asked(f"cannot open data.path {shown(d.path)}"):
        splits = open_maps(d.path, d.zero_is_void, d.max_bad_share)
    train, val = (UsableMaps(**{**vars(maps), "max_pixels": d.max_pixels}) for maps in splits)
    source = MaskedPictures(train, planning.read_as(config, start))
    config, spec_ = planning.shown_as(config, source, start.known)
    val = dataclasses.replace(val, channels=source.channels)
    for maps in (source.maps, val):
        maps.notices.extend(check_masks(maps, d.max_bad_share))
        source.remarks += maps.notices
    steps = steps_per_epoch(len(source), start.total_batch)
    plan = Plan(
        config,
        source,
        val,
        train.classes,
        spec_,
        views_of(config, spec_),
        rates_of(config, config.train.length(steps), start.total_batch),
        start.device,
        start.precision,
        start.total_batch,
        steps,
        weights=start.weights,
    )
    side = config.view.crop
    return planning.proven(
        plan,
        lambda: build(config, spec_, train.classes, None),
        lambda network, device, images: _loss(network, device, images, spec_.in_chans, side),
        f"steps of {config.train.batch_size} crops of {side} pixels",
        "lower view.crop, or train.batch_size and raise train.accumulate, or set "
        "runtime.activation_checkpointing true",
    )


def views_of(config: Segmentation, spec: BackboneSpec) -> TrainViews:
    v = config.view
    rgb = None if spec.bands is None else spec.bands.rgb
    return TrainViews(
        spec.mean,
        spec.std,
        v.crop,
        v.longer,
        v.shorter,
        v.scale,
        v.most_of_one,
        v.flip,
        v.colour,
        rgb,
    )


def rates_of(config: Segmentation, iterations: int, total_batch: int) -> Array:
    """The learning rate of every step."""
    o = config.optim
    warmup = in_iterations(o.warmup, iterations)
    if warmup > iterations:
        raise UsageError(
            f"optim.warmup is {o.warmup:g} iterations, longer than the run of {iterations:,}: shorten "
            'it or give a share such as "10%"'
        )
    peak = planning.peak_lr(config, total_batch)
    return rates.poly(iterations, peak, o.power, warmup, min_lr=o.min_lr)


def build(
    config: Segmentation, spec: BackboneSpec, classes: tuple[str, ...], weights: Weights | None
) -> Segmenter:
    """A segmenter in training mode on the CPU; its head is new.

    Raises:
        UsageError: a head or a backbone that cannot be had.
    """
    m = config.model
    if m.stands == "linear_map":
        backbone = starting.whole_backbone(config, spec, weights)
        _fits(backbone, config.view.crop)
        network = segmenter.build(backbone, m.stands, len(classes))
    else:
        levels = starting.pyramid(config, spec, weights)
        network = segmenter.build(levels, m.stands, len(classes), m.channels)
    for head in (network.decode_head, network.auxiliary_head):
        if head is not None:
            head.dropout.p = m.dropout
    return network.train()


def _fits(backbone: nn.Module, crop: int) -> None:
    """Raises UsageError where crops are no whole number of a vision transformer's patches."""
    patch = getattr(backbone, "patch_size", None)
    if not isinstance(backbone, XCiT) and patch and crop % patch:
        below = crop // patch * patch
        raise UsageError(
            f"view.crop {crop} is no multiple of the patch, {patch}: take {below or patch} or "
            f"{below + patch}"
        )


def _loss(network: nn.Module, device: str, images: int, channels: int, side: int) -> Tensor:
    """What a step of empty crops computes."""
    pixels = torch.zeros(images, channels, side, side, device=device)
    labels = torch.full((images, side, side), VOID, dtype=torch.uint8, device=device)
    assert isinstance(network, Segmenter)
    return segmenter.total(network.losses(pixels, labels))
