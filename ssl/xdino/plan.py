"""What a configuration comes to: data opened, networks named, schedules laid out.

Everything that can be asked wrongly is found here, before a file is written.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdino import acceleration, augment, checkpoint, data, distributed, schedules
from xdino import config as configuration
from xdino.backbones import BackboneSpec, compile_backbone, statistics
from xdino.config import Config, Crops
from xdino.errors import UsageError
from xdino.head import DINOHead
from xdino.learner import AUTOCAST, Learner
from xdino.loss import DINOLoss
from xdino.schedules import Schedules
from xdino.student_teacher import MultiCropNetwork, make_teacher


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

    @property
    def iterations(self) -> int:
        return len(self.schedules)


def resolve_device(name: str) -> torch.device:
    """ "auto" is this process's CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            "runtime.device is cuda, but torch finds no CUDA device here; use cpu or auto"
        )
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f'runtime.device cannot be "{name}": choose auto, cpu or cuda') from None


def photometric_of(crops: Crops) -> dict[str, Any]:
    """The part of the crops' configuration that `augment.MultiCrop` takes by the same names."""
    known = {field.name for field in dataclasses.fields(augment.MultiCrop)} - {"mean", "std"}
    return {name: value for name, value in vars(crops).items() if name in known}


def make_plan(config: Config, world_size: int = 1) -> Plan:
    """Open the data and work everything out, before anything is written.

    Raises:
        UsageError: whatever cannot be done as configured.
    """
    if not config.data.path:
        raise UsageError("data.path is not set: name the images with --data.path FOLDER")
    device = resolve_device(config.runtime.device)
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    source = data.open_source(
        config.data.path,
        split="train",
        channels=config.model.in_chans,
        max_pixels=config.data.max_pixels,
    )
    mean, std = statistics(source.channels)
    c, m, o = config.crops, config.model, config.optim
    if c.mean is not None and c.std is not None:
        mean, std = c.mean, c.std
    input_size = config.evaluate.input_size or c.global_size
    shape = {
        name: getattr(m, name)
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "eta", "tokens_norm")
        if getattr(m, name) is not None
    }
    spec = BackboneSpec(
        m.arch,
        in_chans=source.channels,
        shape=shape,
        input_size=input_size,
        resize=config.evaluate.resize or round(input_size * 256 / 224),
        mean=mean,
        std=std,
    )
    crops = augment.multi_crop(
        c.global_size,
        c.global_scale,
        c.local_count,
        c.local_size,
        c.local_scale,
        c.global_blur,
        c.global_solarize,
        c.local_blur,
        **photometric_of(c),
        mean=mean,
        std=std,
    )
    total_batch = config.train.batch_size * config.train.accumulate * world_size
    steps = data.steps_per_epoch(len(source), total_batch)
    epochs = config.train.epochs
    shape_of_run = epochs, steps
    temperature_epochs = round(
        configuration.in_epochs(config.loss.warmup_teacher_temp_epochs, epochs)
    )
    plan = Schedules(
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
    early = config.curriculum
    return Plan(
        config,
        source,
        crops,
        spec,
        plan,
        device,
        precision,
        total_batch,
        steps,
        augment.at_sizes(crops, early.global_size, early.local_size) if early.share else None,
        round(early.share * len(plan)),
    )


def checkpoint_activations(backbone: nn.Module, arch: str) -> None:
    """Raises UsageError for a backbone that cannot."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UsageError(
            f"runtime.activation_checkpointing: {arch} cannot compute its activations again; "
            "leave it off"
        ) from None


def build_learner(plan: Plan, from_init: bool = True) -> Learner:
    """Student, teacher and the rest, with their ordinary initialisation or from `train.init`.

    `from_init`: False where a state is to be restored, which `train.init` has no part in.
    """
    config = plan.config
    torch.manual_seed(config.train.seed)
    backbone = plan.spec.build(drop_path=config.model.drop_path)
    if config.train.init and from_init:
        weights = checkpoint.read_weights(config.train.init)
        checkpoint.load_into(backbone, weights, plan.spec.arch)
    if config.runtime.activation_checkpointing:
        checkpoint_activations(backbone, plan.spec.arch)
    h = config.head
    head = DINOHead(
        backbone.embed_dim,  # type: ignore[arg-type]
        h.prototypes,
        hidden_dim=h.hidden_dim,
        bottleneck_dim=h.bottleneck_dim,
        nlayers=h.layers,
        norm_last_layer=h.norm_last_layer,
        use_bn=h.use_bn,
    )
    student = MultiCropNetwork(backbone, head)
    teacher = make_teacher(student, plan.spec.build())
    loss = DINOLoss(h.prototypes, config.loss.student_temp, config.loss.centre_momentum)
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
