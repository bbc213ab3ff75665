"""What a configuration comes to: data opened, networks named, schedules laid out.

Everything that can be asked wrongly is found here, before a file is written.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xdino import acceleration, augment, checkpoint, data, feasibility, schedules
from xdino import config as configuration
from xdino.backbone import Backbone
from xdino.backbones import BackboneSpec, compile_backbone, of_timm, statistics
from xdino.config import Config, Crops, Head
from xdino.errors import UsageError, asked
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.runtime import distributed, rendezvous
from xdino.schedules import Schedules
from xdino.stepping import AUTOCAST
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino.values import shown

LARGEST_RATE = (
    1e30  # of what multiplies weights: float32 ends at 3e38, and Adam divides by 0.1 first
)


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to, given the data and the number of processes."""

    config: Config
    source: data.Source
    crops: augment.MultiCrop
    spec: BackboneSpec
    schedules: Schedules
    device: torch.device
    precision: str
    total_batch: int
    steps_per_epoch: int
    early_crops: augment.MultiCrop | None = None  # of the first `early_iterations`
    early_iterations: int = 0
    state_bytes: int = 0  # about the size of a checkpoint

    @property
    def iterations(self) -> int:
        return len(self.schedules)


def resolve_device(name: str) -> torch.device:
    """The device that `name` says: auto, cpu, cuda or cuda:N.

    "auto" is this process's CUDA device where there is one, else the CPU; "cuda" is this process's.

    Raises:
        UsageError: any other name, or a device that this machine does not have.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:(0|[1-9][0-9]{0,3}))?", name):
        raise UsageError(
            f"there is no device {shown(name)} here: choose auto, cpu or cuda (cuda:N for one of many)"
        )
    if not found:
        raise UsageError(
            f"the device is to be {name}, but torch finds no CUDA device here; use cpu or auto"
        )
    here = "cuda:0" if found == 1 else f"cuda:0 to cuda:{found - 1}"
    number = rendezvous.local_rank() if name == "cuda" else int(name.removeprefix("cuda:"))
    if name == "cuda" and found == 1 and "SLURM_LOCALID" in os.environ:
        number = 0  # SLURM may show each task its own GPU alone
    if number >= found and name == "cuda":
        raise UsageError(
            f"process {number} of this machine finds no CUDA device of its own, only {here}: start "
            f"{found} at most, one a device"
        )
    if number >= found:
        raise UsageError(f"there is no device {name} here: this machine has {here}")
    return torch.device("cuda", number)


def photometric_of(crops: Crops) -> dict[str, Any]:
    """The part of the crops' configuration that `augment.MultiCrop` takes by the same names."""
    known = {field.name for field in dataclasses.fields(augment.MultiCrop)} - {"mean", "std"}
    return {name: value for name, value in vars(crops).items() if name in known}


def make_plan(config: Config, world_size: int = 1) -> Plan:
    """Open the data, work everything out, and prove that the run can start; nothing is written.

    Raises:
        UsageError: whatever cannot be done as configured.
    """
    if not config.data.path:
        raise UsageError("data.path is not set: name the images with --data.path FOLDER")
    device = resolve_device(config.runtime.device)
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    with asked(f"cannot open data.path {shown(config.data.path)}"):
        source = data.open_source(
            config.data.path,
            split="train",
            channels=config.model.in_chans,
            max_pixels=config.data.max_pixels,
        )
    spec = _spec(config, source.channels)
    crops = _crops(config, spec)
    total_batch = config.train.batch_size * config.train.accumulate * world_size
    steps = data.steps_per_epoch(len(source), total_batch)
    laid_out = _schedules(config, steps, total_batch)
    early = config.curriculum
    plan = Plan(
        config,
        source,
        crops,
        spec,
        laid_out,
        device,
        precision,
        total_batch,
        steps,
        augment.at_sizes(crops, early.global_size, early.local_size) if early.share else None,
        round(early.share * len(laid_out)),
    )
    return dataclasses.replace(plan, state_bytes=_prove(plan, world_size))


def _spec(config: Config, channels: int) -> BackboneSpec:
    c, m = config.crops, config.model
    mean, std = statistics(channels)
    if c.mean is not None and c.std is not None:
        mean, std = c.mean, c.std
        if not len(mean) == len(std) == channels:
            raise UsageError(
                f"crops.mean and crops.std need one value a channel: {channels}, got {len(mean)} "
                f"and {len(std)}"
            )
    input_size = config.evaluate.input_size or c.global_size
    shape = {
        name: getattr(m, name)
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "eta", "tokens_norm")
        if getattr(m, name) is not None
    }
    return BackboneSpec(
        m.arch,
        in_chans=channels,
        shape=shape,
        input_size=input_size,
        resize=config.evaluate.resize or max(1, round(input_size * 256 / 224)),
        mean=mean,
        std=std,
    )


def _crops(config: Config, spec: BackboneSpec) -> augment.MultiCrop:
    c = config.crops
    return augment.multi_crop(
        c.global_size,
        c.global_scale,
        c.local_count,
        c.local_size,
        c.local_scale,
        c.global_blur,
        c.global_solarize,
        c.local_blur,
        **photometric_of(c),
        mean=spec.mean,
        std=spec.std,
    )


def _schedules(config: Config, steps: int, total_batch: int) -> Schedules:
    """Raises UsageError where they are longer than memory, or where float32 ends."""
    o, epochs = config.optim, config.train.epochs
    feasibility.check_memory(
        f"the schedules of {epochs * steps:,} iterations",
        64 * epochs * steps,
        torch.device("cpu"),
        "lower train.epochs",
    )
    shape_of_run = epochs, steps
    temperature_epochs = round(
        configuration.in_epochs(config.loss.warmup_teacher_temp_epochs, epochs)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        laid_out = Schedules(
            lr=schedules.cosine(
                o.lr * total_batch / 256,
                o.min_lr,
                *shape_of_run,
                warmup_epochs=configuration.in_epochs(o.warmup_epochs, epochs),
            ),
            weight_decay=schedules.cosine(o.weight_decay, o.weight_decay_end, *shape_of_run),
            momentum=schedules.cosine(
                config.teacher.momentum, config.teacher.momentum_end, *shape_of_run
            ),
            teacher_temp=schedules.teacher_temperature(
                config.loss.warmup_teacher_temp,
                config.loss.teacher_temp,
                *shape_of_run,
                temperature_epochs,
            ),
            frozen_iterations=o.freeze_last_layer * steps,
        )
        shrink = laid_out.lr * laid_out.weight_decay
    for values, key in (
        (laid_out.lr, "optim.lr or optim.min_lr"),
        (laid_out.weight_decay, "optim.weight_decay or optim.weight_decay_end"),
        (shrink, "optim.lr times optim.weight_decay"),
    ):
        if not np.all(np.abs(values) <= LARGEST_RATE):
            raise UsageError(
                f"{key} is too large: above {LARGEST_RATE:g}, weights overflow at once"
            )
    return laid_out


def _prove(plan: Plan, world_size: int) -> int:
    """Networks that take the crops, and fit: the bytes of a checkpoint.

    Raises:
        UsageError: they do not; the message names the key and the nearest size.
    """
    config, spec = plan.config, plan.spec
    backbone = feasibility.on_meta(lambda: spec.build(drop_path=config.model.drop_path))
    head = feasibility.on_meta(lambda: build_head(config.head, backbone.embed_dim))
    student = nn.ModuleList([backbone, head])
    state = feasibility.state_bytes(student, config.optim.name)
    feasibility.check_memory(
        "networks, gradients and optimiser",
        state + feasibility.trained_bytes(student),
        plan.device,
        "take a smaller model.arch, or fewer head.prototypes",
    )
    for section, crops in (("crops", plan.crops), ("curriculum", plan.early_crops)):
        pixels = sum(view.size**2 for view in crops.views) if crops else 0
        feasibility.check_memory(
            "the crops of a micro-batch",
            4 * config.train.batch_size * spec.in_chans * pixels,
            plan.device,
            f"lower train.batch_size, {section}.global_size or crops.local_count",
        )

    def rebuilt(size: int) -> nn.Module:
        return feasibility.on_meta(dataclasses.replace(spec, input_size=size).build)

    own = (spec.input_size, of_timm(spec.arch).input_size)
    trials = _trials(plan, world_size)
    feasibility.check_sizes(backbone, spec.arch, spec.in_chans, trials, rebuilt, own, spec.build)
    return state


def _trials(plan: Plan, world_size: int) -> list[feasibility.Trial]:
    """The forward passes of a run: each crop size in training, and the size of its evaluations."""
    config, size = plan.config, plan.spec.input_size
    judged = feasibility.Trial("evaluate.input_size", size, 1, training=False, builds=True)
    trials = [judged] if config.evaluate.input_size else []
    images = config.train.batch_size * world_size
    for section, crops in (("crops", plan.crops), ("curriculum", plan.early_crops)):
        for place, (size, views) in enumerate(crops.groups if crops else ()):
            key = f"{section}.{'local' if place else 'global'}_size"
            builds = key == "crops.global_size" and not config.evaluate.input_size
            trials.append(feasibility.Trial(key, size, min(images * views, 2), builds=builds))
    return trials


def check_disk(plan: Plan, run_dir: str | Path) -> None:
    """Raises UsageError where the disk has no room for two checkpoints of the run."""
    feasibility.check_disk(Path(run_dir), 2 * plan.state_bytes)


def checkpoint_activations(backbone: Backbone, arch: str) -> None:
    """Raises UsageError for a backbone that cannot."""
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UsageError(
            f"runtime.activation_checkpointing: {arch} cannot compute its activations again; "
            "leave it off"
        ) from None


def build_head(head: Head, width: int) -> DINOHead:
    return DINOHead(
        width,
        head.prototypes,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        nlayers=head.layers,
        norm_last_layer=head.norm_last_layer,
        use_bn=head.use_bn,
    )


def build_learner(plan: Plan, from_init: bool = True) -> Learner:
    """Student, teacher and the rest, with their ordinary initialisation or from `train.init`.

    `from_init`: False where a state is to be restored, which `train.init` has no part in.
    """
    config = plan.config
    torch.manual_seed(config.train.seed)
    backbone = plan.spec.build(drop_path=config.model.drop_path)
    if config.train.init and from_init:
        with asked(f"train.init {shown(config.train.init)}"):
            weights = checkpoint.read_weights(config.train.init)
        checkpoint.load_into(backbone, weights, plan.spec.arch)
    if config.runtime.activation_checkpointing:
        checkpoint_activations(backbone, plan.spec.arch)
    head = build_head(config.head, backbone.embed_dim)
    student = MultiCropNetwork(backbone, head)
    teacher = make_teacher(student, plan.spec.build())
    loss = DINOLoss(config.head.prototypes, config.loss.student_temp, config.loss.centre_momentum)
    learner = Learner(
        student,
        teacher,
        loss,
        config.optim.name,
        config.optim.clip_grad,
        plan.precision,
        plan.device,
    )
    learner.kernels = acceleration.choose(
        config.runtime.kernels,
        backbone,
        plan.crops,
        plan.device,
        AUTOCAST[plan.precision],
        config.runtime.compile,
    )
    if learner.kernels.compiled:
        for network in (student, teacher):
            compile_backbone(network.backbone)
    acceleration.use_kernels((student, teacher), learner.kernels.network)
    # Processes drop different paths; the first is as it would be alone.
    torch.manual_seed(config.train.seed + distributed.rank())
    return learner
