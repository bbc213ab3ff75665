"""What a recipe comes to, given the data, the weights and the number of processes.

Letters: K classes.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from xdino import checkpoint
from xdino.backbones import BackboneSpec, of_timm, statistics
from xdino.config import in_epochs
from xdino.config.bands import Bands, channels_of
from xdino.data import Source
from xdino.errors import RunFailed, UsageError, asked, nearest, reason
from xdino.forecast.costs import activation_bytes
from xdino.plan import feasibility
from xdino.plan.measured import measured
from xdino.plan.networks import checkpoint_activations
from xdino.runtime.batch_layout import BatchLayout
from xdino.runtime.device import check_compile, resolve_device, resolve_precision
from xdino.schedules import Array
from xdino.values import shown
from xdino_transfer.classification import optim, schedules
from xdino_transfer.classification.classifier import Classifier, at_size
from xdino_transfer.classification.erasing import Erasing
from xdino_transfer.classification.files import read_classifier, spec_in, start_from
from xdino_transfer.classification.losses import check_classes
from xdino_transfer.classification.mixup import Mixup
from xdino_transfer.classification.randaugment import RandAugment
from xdino_transfer.classification.views import TrainingView
from xdino_transfer.datasets import few, few_of_each, open_labelled
from xdino_transfer.finetuning.loader import LabelledLoader
from xdino_transfer.finetuning.recipe import ARCH, FineTuning

TIMM = "timm:"  # before the name of a teacher whose weights timm downloads


@dataclass(frozen=True)
class Plan:
    """spec: of the network at the size that it is trained at. rates: float64 [iterations].

    step_bytes: about what a step of one process needs in memory; state_bytes: a checkpoint.
    """

    config: FineTuning
    train: Source
    val: Source
    spec: BackboneSpec
    view: TrainingView
    mixup: Mixup
    rates: Array
    device: torch.device
    precision: str
    total_batch: int
    steps_per_epoch: int
    step_bytes: int = 0
    state_bytes: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        assert self.train.classes is not None
        return self.train.classes

    @property
    def iterations(self) -> int:
        return len(self.rates)


def make_plan(
    config: FineTuning,
    world_size: int = 1,
    precision: str | None = None,
    spec: Mapping[str, Any] | None = None,
    first: BatchLayout | None = None,
) -> Plan:
    """Open the data, work everything out, and prove that the run can start; nothing is written.

    Args:
        precision: what "auto" was found to be. spec: of a run that is continued, whose first
            weights may be gone. first: how its first start shared a step out.

    Raises:
        UsageError: whatever cannot be done as configured.
        RunFailed: weights to start from that are damaged.
    """
    if not config.data.path:
        raise UsageError("data.path is not set: name labelled images with --data.path FOLDER")
    device = resolve_device(config.runtime.device)
    check_compile(config.runtime.compile, device)
    precision = precision or resolve_precision(config.train.precision, device)
    known = BackboneSpec.from_dict(dict(spec)) if spec else _spec_of_weights(config)
    channels = config.channels
    if channels is None and known is not None:
        channels = channels_of(known.in_chans, known.bands)
    with asked(f"cannot open data.path {shown(config.data.path)}"):
        train, val = open_labelled(
            config.data.path, channels, config.data.category, config.data.max_pixels
        )
    if config.data.images_a_class is not None:
        train = few_of_each(train, config.data.images_a_class, config.data.subset_seed)
    else:
        train = few(train, config.data.fraction, config.data.subset_seed)
    if known is None:
        config = measured(config, train, "view")
    elif isinstance(train.channels, Bands) and train.channels == known.in_chans:
        known = dataclasses.replace(known, bands=train.channels)
    known = _shown_as(config, known or _spec_from_scratch(config, train.channels))
    view = view_of(config, known)
    total = config.train.batch_size * config.train.accumulate * world_size
    steps = loader_of(config, train, view, 0, world_size, first=first).steps_per_epoch
    plan = Plan(
        config,
        train,
        val,
        known,
        view,
        mixup_of(config),
        rates_of(config, steps, total),
        device,
        precision,
        total,
        steps,
    )
    return _proven(plan)


def view_of(config: FineTuning, spec: BackboneSpec) -> TrainingView:
    """How training images are shown to the network of `spec`."""
    v = config.view
    augment = None
    if v.randaugment is not None:
        colours = None if spec.bands is None else spec.bands.rgb
        augment = RandAugment.parse(v.randaugment, spec.mean, colours)
    erasing = Erasing(v.erasing) if v.erasing else None
    return TrainingView(
        spec.input_size,
        spec.mean,
        spec.std,
        scale=v.scale,
        flip=v.flip,
        randaugment=augment,
        erasing=erasing,
    )


def mixup_of(config: FineTuning) -> Mixup:
    m = config.mixup
    return Mixup(m.mixup, m.cutmix, m.probability, m.switch, m.smoothing)


def loader_of(
    config: FineTuning,
    train: Source,
    view: TrainingView,
    rank: int,
    world_size: int,
    **options: Any,
) -> LabelledLoader:
    """The batches of one process; `options` as of `LabelledLoader`."""
    return LabelledLoader(
        train,
        view,
        config.train.batch_size,
        config.train.seed,
        repeats=config.view.repeats,
        accumulate=config.train.accumulate,
        rank=rank,
        world_size=world_size,
        max_bad_share=config.data.max_bad_share,
        **options,
    )


def rates_of(config: FineTuning, steps_per_epoch: int, total_batch: int) -> Array:
    """The learning rate of every step."""
    o, epochs = config.optim, config.train.epochs
    peak = schedules.scaled(o.lr, total_batch)
    warmup = in_epochs(o.warmup_epochs, epochs)
    if o.schedule == "smooth":
        return schedules.smooth(epochs, steps_per_epoch, peak, warmup, o.min_lr)
    if o.schedule == "constant":
        return schedules.by_epoch(schedules.published(epochs, peak, 0, peak, peak), steps_per_epoch)
    rates = schedules.published(epochs, peak, round(warmup), o.warmup_lr, o.min_lr)
    return schedules.by_epoch(rates, steps_per_epoch)


# --- which network ------------------------------------------------------------------------------


def _spec_of_weights(config: FineTuning) -> BackboneSpec | None:
    if config.train.init is None:
        return None
    with asked(f"train.init {shown(config.train.init)}"):
        return spec_in(config.train.init, config.model.arch)


def _spec_from_scratch(config: FineTuning, channels: int) -> BackboneSpec:
    m = config.model
    shape = {
        name: getattr(m, name)
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "eta", "tokens_norm")
        if getattr(m, name) is not None
    }
    spec = of_timm(m.arch or ARCH)
    mean, std = (spec.mean, spec.std) if channels == 3 else statistics(channels)
    side = spec.input_size
    bands = channels if isinstance(channels, Bands) else None
    return BackboneSpec(m.arch or ARCH, int(channels), shape, side, side, mean, std, bands)


def _shown_as(config: FineTuning, spec: BackboneSpec) -> BackboneSpec:
    """The spec with the size and the statistics that the recipe gives."""
    v = config.view
    if v.mean is not None and v.std is not None:
        if not len(v.mean) == len(v.std) == spec.in_chans:
            raise UsageError(
                f"view.mean and view.std need one value a channel: {spec.in_chans}, got "
                f"{len(v.mean)} and {len(v.std)}"
            )
        spec = dataclasses.replace(spec, mean=v.mean, std=v.std)
    side = v.size or spec.input_size
    resize = side if config.evaluate.full_crop else int(256 / 224 * side)
    return dataclasses.replace(spec, input_size=side, resize=resize)


def build_classifier(plan: Plan, from_init: bool) -> tuple[Classifier, list[str]]:
    """The network in training mode on the CPU, and sentences on what was dropped of its weights.

    from_init: False where a state is to be restored, which `train.init` has no part in.
    """
    config, spec = plan.config, plan.spec
    torch.manual_seed(config.train.seed)
    m, notices = config.model, list[str]()
    if config.train.init and from_init:
        with asked(f"train.init {shown(config.train.init)}"):
            classifier, notices = start_from(
                config.train.init, plan.classes, m.arch, m.drop_path, m.head_scale
            )
        at_size(classifier, spec.input_size, spec.resize)
        classifier.spec = spec
    else:
        classifier = Classifier(spec.build(m.drop_path), spec, plan.classes, m.head_scale)
    classifier.backbone.spec = spec  # type: ignore[assignment]  # a Backbone's
    optim.freeze(classifier, m.frozen)
    if config.runtime.activation_checkpointing:
        checkpoint_activations(classifier.backbone, spec.arch)
    return classifier.train(), notices


def build_teacher(plan: Plan) -> tuple[nn.Module | None, list[str]]:
    """Who is asked by distillation, in evaluation mode, and sentences on what to know of it.

    Raises:
        UsageError: of other classes, or it does not take such images.
    """
    d, spec = plan.config.distillation, plan.spec
    if d.kind == "none" or d.teacher is None:
        return None, []
    teacher: nn.Module
    notices = []
    if d.teacher.startswith(TIMM):
        name = d.teacher.removeprefix(TIMM)
        if not timm.is_model(name):
            raise UsageError(
                f"distillation.teacher: timm has no network called {shown(name)}: "
                f"{nearest(name, timm.list_models())}"
            )
        try:
            teacher = timm.create_model(name, pretrained=True)
        except Exception as error:  # noqa: BLE001 -- whatever a download fails with
            raise RunFailed(
                f"timm cannot get the weights of {name} ({reason(error)}): download them elsewhere "
                "and name the file as distillation.teacher"
            ) from None
    else:
        with asked(f"distillation.teacher {shown(d.teacher)}"):
            found = read_classifier(d.teacher, d.arch)
        teacher = found.classifier
        if found.classes is not None and set(found.classes) == set(plan.classes):
            _refuse_order(found.classes, plan.classes)
        if (found.mean, found.std) != (spec.mean, spec.std):
            notices.append(
                f"the teacher was trained with mean {found.mean} and std {found.std}, and is shown "
                f"images normalised by {spec.mean} and {spec.std}: view.mean and view.std set them"
            )
    check_classes(len(plan.classes), int(getattr(teacher, "num_classes", len(plan.classes))))
    _try_teacher(teacher.eval(), spec, len(plan.classes))
    return teacher, notices


def _refuse_order(theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    if theirs != ours:
        raise UsageError("the teacher has the same classes in another order than the data")


def _try_teacher(teacher: nn.Module, spec: BackboneSpec, classes: int) -> None:
    images = torch.zeros(2, spec.in_chans, spec.input_size, spec.input_size)
    try:
        with torch.no_grad():
            given = tuple(teacher(images).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UsageError(
            f"the teacher does not take images of {spec.in_chans} channels and {spec.input_size} "
            f"pixels ({reason(error)})"
        ) from None
    if given != (2, classes):
        raise UsageError(f"the teacher gives {list(given)} for 2 images of {classes:,} classes")


# --- whether it fits ----------------------------------------------------------------------------


def _proven(plan: Plan) -> Plan:
    """The plan with its bytes. Raises UsageError where its network takes no such images, or no room."""
    config, spec = plan.config, plan.spec

    def build() -> Classifier:
        return Classifier(spec.build(config.model.drop_path), spec, plan.classes)

    network = feasibility.on_meta(build)
    trial = feasibility.Trial("view.size", spec.input_size, builds=True)
    feasibility.check_sizes(
        network.backbone, spec.arch, spec.in_chans, [trial], own=[spec.input_size], real=spec.build
    )
    optim.freeze(network, config.model.frozen)
    state = feasibility.state_bytes(network, config.optim.name)
    if not config.train.ema:
        state -= sum(p.numel() * p.element_size() for p in network.parameters())
    step = state + feasibility.trained_bytes(network) + _activations(network, plan)
    plan = dataclasses.replace(plan, step_bytes=step, state_bytes=state)
    feasibility.check_memory(
        f"steps of {config.train.batch_size} images of {spec.input_size} pixels",
        step,
        plan.device,
        "lower train.batch_size and raise train.accumulate, or set "
        "runtime.activation_checkpointing true",
    )
    return plan


def _activations(network: Classifier, plan: Plan) -> int:
    """Bytes that live at once in a step's forward and backward pass, see `activation_bytes`."""
    parameter = next(network.parameters())
    if not parameter.is_meta:
        return 0
    spec = plan.spec
    if plan.config.runtime.activation_checkpointing:
        checkpoint_activations(network.backbone, spec.arch)
    side = spec.input_size

    def backward(images: int) -> None:
        shown_to = torch.empty(images, spec.in_chans, side, side, device="meta")
        network(shown_to).sum().backward()

    return activation_bytes(backward, plan.config.train.batch_size, plan.precision)


def init_facts(config: FineTuning) -> dict[str, Any]:
    """What the run started from, with its hash, for environment.json and results."""
    if config.train.init is None:
        return {"init": None, "init_sha256": None}
    path = Path(config.train.init).expanduser()
    model = path / checkpoint.EXPORTED_FILE
    file = checkpoint.weights_path(model if model.is_file() else path)
    return {"init": str(file), "init_sha256": checkpoint.sha256(file)}
