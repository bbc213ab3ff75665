"""What a recipe for `xdino detect` comes to, given the data, the weights and the number of processes.

Letters: K classes, B images, H x W pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xdino.backbones import BackboneSpec
from xdino.data.source import limit_pixels
from xdino.errors import UsageError, asked
from xdino.runtime.batch_layout import BatchLayout
from xdino.schedules import Array
from xdino.values import shown
from xdino_transfer import rates
from xdino_transfer.dense_training import plan as planning
from xdino_transfer.dense_training import starting
from xdino_transfer.dense_training.detecting.loader import DetectionLoader
from xdino_transfer.dense_training.detecting.recipe import Detection
from xdino_transfer.dense_training.detecting.source import AnnotatedSource
from xdino_transfer.dense_training.plan import DensePlan
from xdino_transfer.dense_training.recipe import in_iterations
from xdino_transfer.detection import detector, outlines
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.layouts.annotations import Annotations
from xdino_transfer.detection.layouts.opening import open_annotated, open_files
from xdino_transfer.detection.matching import Sampler
from xdino_transfer.detection.roi import RegionHeads, RegionSettings
from xdino_transfer.detection.rpn import Kept, RPNSettings
from xdino_transfer.detection.views import MULTIPLE, Views
from xdino_transfer.resizing import fitted

DATA = "a folder of annotated images"  # what data.path is to name


@dataclasses.dataclass(frozen=True)
class DetectionPlan(DensePlan):
    """Of a detector: train with its objects, val as it is told in its files."""

    config: Detection
    train: AnnotatedSource
    val: Annotations
    views: Views


def make_plan(
    config: Detection,
    world_size: int = 1,
    precision: str | None = None,
    spec: Mapping[str, Any] | None = None,
    first: BatchLayout | None = None,
) -> DetectionPlan:
    """Open the data, work everything out, and prove that the run can start; nothing is written.

    Args:
        precision: what "auto" was found to be. spec: of a run that is continued, whose first
            weights may be gone. first: how its first start shared a step out.

    Raises:
        UsageError: whatever cannot be done as configured.
        RunFailed: weights to start from that are damaged.
    """
    outlines.pycocotools_mask()  # before hours of training, not in the first step
    start = planning.start_of(config, world_size, precision, spec, DATA)
    annotated, val = opened(config)
    train = AnnotatedSource(annotated, planning.read_as(config, start))
    limit_pixels(train, config.data.max_pixels)
    config, own = planning.shown_as(config, train, start.known)
    val = dataclasses.replace(val, channels=train.channels)
    if not (~val.crowd).any():
        raise UsageError(f"{val.where} has no object to be found, so that nothing can be scored")
    if not annotated.outlines.any():
        train.remarks.append(
            f"{annotated.where}: no object has an outline: masks are learned, and scored, as boxes"
        )
    views = views_of(config, own)
    steps = loader_of(config, train, views, 0, world_size, first=first).steps_per_epoch
    plan = DetectionPlan(
        config=config,
        train=train,
        val=val,
        classes=train.annotations.classes,
        spec=own,
        views=views,
        rates=rates_of(config, steps, start.total_batch),
        device=start.device,
        precision=start.precision,
        total_batch=start.total_batch,
        steps_per_epoch=steps,
        weights=start.weights,
    )
    return _proven(plan)


def opened(config: Detection) -> tuple[Annotations, Annotations]:
    """Train and val. Raises UsageError, also where more images are missing than may be."""
    data = config.data
    share = data.max_bad_share
    if all(data.files):
        train_json, train_images, val_json, val_images = map(str, data.files)
        return open_files((train_json, train_images), (val_json, val_images), share)
    with asked(f"cannot open data.path {shown(data.path)}"):
        return open_annotated(data.path, share)


def views_of(config: Detection, spec: BackboneSpec) -> Views:
    v = config.view
    return Views(
        spec.mean,
        spec.std,
        sides=v.sides,
        longer=v.longer,
        before_crop=v.before_crop,
        crop=v.crop,
        crop_chance=v.crop_chance,
        flip=v.flip,
        test_side=v.test_side,
    )


def loader_of(
    config: Detection,
    train: AnnotatedSource,
    views: Views,
    rank: int,
    world_size: int,
    **options: Any,
) -> DetectionLoader:
    """The batches of one process; `options` as of `DetectionLoader`."""
    return DetectionLoader(
        train,
        views,
        config.train.batch_size,
        config.train.seed,
        accumulate=config.train.accumulate,
        rank=rank,
        world_size=world_size,
        max_bad_share=config.data.max_bad_share,
        **options,
    )


def rates_of(config: Detection, steps_per_epoch: int, total_batch: int) -> Array:
    """The learning rate of every step: a warm-up, a level, and two falls."""
    o = config.optim
    iterations = config.train.length(steps_per_epoch)
    warmup = in_iterations(o.warmup, iterations)
    if warmup > iterations:
        raise UsageError(
            f"optim.warmup is {warmup:,} iterations, longer than the run of {iterations:,}: shorten "
            'it or give a share such as "10%"'
        )
    at = [_iterations(drop, iterations, steps_per_epoch) for drop in o.drops]
    peak = planning.peak_lr(config, total_batch)
    return rates.steps(iterations, 1, peak, at, warmup, o.warmup_ratio, o.drop_factor)


def _iterations(drop: float | str, iterations: int, steps_per_epoch: int) -> int:
    """Epochs, or a share of the run such as "75%"."""
    if isinstance(drop, str):
        return in_iterations(drop, iterations)
    return round(drop * steps_per_epoch)


# --- which network ------------------------------------------------------------------------------


def build_detector(plan: DetectionPlan) -> tuple[Detector, list[str]]:
    """The network in training mode on the CPU, and sentences on what is new of it."""
    config = plan.config
    levels = starting.pyramid(config, plan.spec, plan.weights)
    h = config.heads
    network = detector.build(
        levels,
        len(plan.classes),
        detector.Shape(h.width, h.hidden, h.mask_width),
        RPNSettings(
            sampler=Sampler(h.anchors, 0.5),
            train=Kept(h.candidates, h.proposals),
            test=Kept(min(h.candidates, 1000), h.proposals),  # published: 1,000 of 2,000 then
        ),
        RegionSettings(sampler=Sampler(h.regions, 0.25)),
    )
    return network.train(), starting.take_head(network, plan.weights, plan.classes)


def _proven(plan: DetectionPlan) -> DetectionPlan:
    """The plan with its bytes, of the largest images that it draws."""
    v, config = plan.config.view, plan.config
    H, W = (-(-side // MULTIPLE) * MULTIPLE for side in fitted(3, 4, v.longer, max(v.sides)))
    bare = dataclasses.replace(plan, weights=None)

    def loss(network: Any, device: str, images: int) -> Tensor:
        shape = (images, plan.spec.in_chans, H, W)
        return _passed(network, torch.empty(shape, device=device), config.heads.regions)

    images = config.train.batch_size
    return planning.proven(
        plan,
        lambda: build_detector(bare)[0],
        loss,
        f"steps of {images} image{'s' if images > 1 else ''} of up to {W} x {H} pixels",
        "lower train.batch_size and raise train.accumulate, set runtime.activation_checkpointing "
        "true, or lower view.sides and view.longer",
    )


def _passed(network: Detector, images: Tensor, regions: int) -> Tensor:
    """A number that hangs on all that a step computes, but for which boxes it finds."""
    features = network.neck(network.backbone(images))
    logits, deltas = network.rpn(features)
    heads, width = network.roi, network.neck.width
    count = len(images) * regions
    boxes = images.new_empty(count, width, RegionHeads.BOX_SIDE, RegionHeads.BOX_SIDE)
    masks = images.new_empty(count // 4 or 1, width, RegionHeads.MASK_SIDE, RegionHeads.MASK_SIDE)
    found = heads.box_predictor(heads.box_head(boxes))
    drawn = heads.mask_predictor(heads.mask_head(masks))
    parts = [*logits, *deltas, *found, drawn, *features]
    return torch.stack([part.sum() for part in parts]).sum()
