"""The networks of a configuration: the backbone it names, its head, and the learner of both."""

import contextlib

import torch
from torch import nn

from xdino import acceleration, checkpoint
from xdino.backbones import BackboneSpec, compile_backbone, statistics
from xdino.config import Config, Head, Loss
from xdino.config.bands import Bands
from xdino.errors import UsageError, asked
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import (
    DINOLoss,
    Objective,
    SIGRegLoss,
    SimDINOLoss,
    SinkhornLoss,
    WithKoLeo,
)
from xdino.plan.plan import Plan
from xdino.runtime import distributed
from xdino.stepping import AUTOCAST
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino.values import shown


def spec_of(config: Config, channels: int) -> BackboneSpec:
    """The network that `model` names, with the statistics and image sizes of its data."""
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
        in_chans=int(channels),
        shape=shape,
        input_size=input_size,
        resize=config.evaluate.resize or max(1, round(input_size * 256 / 224)),
        mean=mean,
        std=std,
        bands=channels if isinstance(channels, Bands) else None,
    )


def objective_of(loss: Loss, head: Head) -> Objective:
    """What `loss` names, for heads of `head`."""
    objective: Objective
    if loss.objective == "simdino":
        width = head.bottleneck_dim
        objective = SimDINOLoss(width, loss.coding_rate_eps, loss.coding_rate_weight)
    elif loss.objective == "sigreg":
        objective = SIGRegLoss(head.bottleneck_dim, loss.sigreg_weight, loss.sigreg_slices)
    elif loss.targets == "sinkhorn":
        objective = SinkhornLoss(loss.student_temp, loss.sinkhorn_iterations)
    else:
        objective = DINOLoss(head.prototypes, loss.student_temp, loss.centre_momentum)
    return WithKoLeo(objective, loss.koleo) if loss.koleo else objective


def build_head(head: Head, width: int, loss: Loss | None = None) -> DINOHead:
    """`loss`: whose objective may need no prototypes; None for DINO's, which does."""
    kind = "dino" if loss is None else loss.objective
    return DINOHead(
        width,
        head.prototypes if kind == "dino" else None,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        nlayers=head.layers,
        norm_last_layer=head.norm_last_layer,
        use_bn=head.use_bn,
        unit=kind != "sigreg",
    )


def checkpoint_activations(backbone: nn.Module, arch: str) -> None:
    """Raises UsageError for a backbone that cannot."""
    enable = getattr(backbone, "set_grad_checkpointing", None)
    if enable is not None:
        with contextlib.suppress(AttributeError, AssertionError):
            enable(True)
            return
    raise UsageError(
        f"runtime.activation_checkpointing: {arch} cannot compute its activations again; leave it off"
    )


def _records_graphs(config: Config, device: torch.device) -> bool:
    """Whether passes are to run as CUDA graphs, as far as the configuration says.

    Not over processes, whose exchange of gradients belongs between the kernels of a pass, and not where
    something else has its own way of running them.
    """
    rivals = config.runtime.compile or config.runtime.activation_checkpointing
    alone = distributed.world_size() == 1
    return config.runtime.cuda_graphs and device.type == "cuda" and alone and not rivals


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
    head = build_head(config.head, backbone.embed_dim, config.loss)
    student = MultiCropNetwork(backbone, head)
    teacher = make_teacher(student, plan.spec.build())
    objective = objective_of(config.loss, config.head)
    learner = Learner(
        student,
        teacher,
        objective,
        config.optim.name,
        config.optim.clip_grad,
        plan.precision,
        plan.device,
        graphs=_records_graphs(config, plan.device) and objective.recordable,
    )
    learner.kernels = acceleration.choose(
        config.runtime.kernels,
        backbone,
        plan.crops,
        plan.device,
        AUTOCAST[plan.precision],
        config.runtime.compile,
        config.train.batch_size,
        learner.passes is not None,
    )
    if learner.kernels.compiled:
        for network in (student, teacher):
            compile_backbone(network.backbone)
    acceleration.use_kernels((student, teacher), learner.kernels.network)
    return learner
