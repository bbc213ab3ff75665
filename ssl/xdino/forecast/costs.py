"""What a run computes, keeps and sends, counted and not measured: no machine is in it.

Student and teacher are run forward and backward on torch's "meta" device, which works out shapes and
computes nothing; every operation that it is asked for is counted, and every tensor for as long as it
lives. The last layer and the loss, which come in chunks of prototypes, have closed formulas. So do the
optimiser and the teacher's moving average.

Letters: V views, G = 2 of them global, B images of a micro-batch, K prototypes, d width of the
bottleneck, P parameters.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from xdino import augment, data
from xdino.augment import MultiCrop
from xdino.backbones import BackboneSpec
from xdino.config import QUALITY_VIEWS, Config
from xdino.loss.chunked import CPU_CHUNK
from xdino.plan.crops import crops_of
from xdino.plan.feasibility import on_meta, state_bytes, trained_bytes
from xdino.plan.networks import build_head, checkpoint_activations, spec_of
from xdino.student_teacher import MultiCropNetwork

GLOBAL_VIEWS = 2
QUALITY_IMAGES = 1_000  # of which quality looks at views, at most
FLOAT = 4  # bytes
_ADAMW_PASSES, _OTHER_PASSES, _EMA_PASSES, _CLIP_PASSES = 7, 5, 3, 3  # over the weights, a step
_UPDATE_LAUNCHES = 200  # of torch's foreach kernels, with the look at what is not finite


@dataclass(frozen=True)
class Workload:
    """A configuration with what its data decide, for `processes` processes on any machine.

    Args:
        images: of the data set; channels: 1 or 3.
        precision: "fp32", "bf16" or "fp16".
    """

    config: Config
    images: int
    processes: int
    precision: str
    spec: BackboneSpec
    crops: MultiCrop
    early_crops: MultiCrop | None

    @classmethod
    def of(
        cls, config: Config, images: int, channels: int, processes: int, precision: str
    ) -> "Workload":
        """Raises UsageError for what cannot be configured, or fewer images than a batch."""
        spec = spec_of(config, channels)
        crops, early = crops_of(config, spec), config.curriculum
        small = augment.at_sizes(crops, early.global_size, early.local_size)
        found = cls(
            config, images, processes, precision, spec, crops, small if early.share else None
        )
        found.steps_per_epoch  # noqa: B018 - refuses what is too small
        return found

    @property
    def total_batch(self) -> int:
        train = self.config.train
        return train.batch_size * train.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        an_epoch = self.config.train.images_per_epoch
        return data.steps_per_epoch(self.images, self.total_batch, an_epoch)

    @property
    def iterations(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def early_iterations(self) -> int:
        return round(self.config.curriculum.share * self.iterations)

    def with_batch(self, images: int) -> "Workload":
        """The same with micro-batches of so many images."""
        train = dataclasses.replace(self.config.train, batch_size=images)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train))


@dataclass(frozen=True)
class StepCost:
    """One optimisation step on one process, in float32.

    Args:
        flops: of products and convolutions; an addition and a multiplication are two.
        bytes: read and written by everything else, each operation by itself.
        launches: operations that move data.
        peak: bytes that live at once at most, beside weights, moments and teacher: activations and
            what gradients there are.
    """

    flops: float
    bytes: float
    launches: int
    peak: int

    def times(self, count: int) -> "StepCost":
        """So many micro-batches one after the other; no two are kept together."""
        return dataclasses.replace(
            self, flops=count * self.flops, bytes=count * self.bytes, launches=count * self.launches
        )

    def plus(self, bytes: float, launches: int) -> "StepCost":
        return dataclasses.replace(
            self, bytes=self.bytes + bytes, launches=self.launches + launches
        )


@dataclass(frozen=True)
class Kept:
    """Bytes that do not depend on the batch.

    Args:
        parameters, trained: numbers of the student, and those of them that learn.
        state: weights of student and teacher, and moments; in memory and in a checkpoint.
        gradients: in memory. backbone: of the exported weights.
        statistics: channels of the student's BatchNorms, which processes share.
    """

    parameters: int
    trained: int
    state: int
    gradients: int
    backbone: int
    statistics: int


def kept(work: Workload) -> Kept:
    """Weights and states of a run."""
    student, _ = _networks(work)
    parameters = list(student.parameters())
    norms = (m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return Kept(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        state=state_bytes(student, work.config.optim.name),
        gradients=trained_bytes(student),
        backbone=sum(p.numel() * p.element_size() for p in student.backbone.parameters()),
        statistics=sum(norm.num_features for norm in norms),
    )


def count_step(work: Workload, early: bool = False) -> StepCost:
    """A step of `work`; `early`: of the curriculum's small crops."""
    crops = work.early_crops if early and work.early_crops else work.crops
    student, teacher = _networks(work)
    B, train = work.config.train.batch_size, work.config.train
    networks = _count_networks(student, teacher, crops, B, work.spec.in_chans)
    head, views = work.config.head, len(crops.views)
    if student.head.last_layer is None:
        loss = embedding_loss_cost(views, B, head.bottleneck_dim)
    else:
        loss = loss_cost(views, B, head.prototypes, head.bottleneck_dim)
    micro = StepCost(
        flops=networks.flops + loss.flops,
        bytes=networks.bytes + loss.bytes + _photometric_bytes(crops, B),
        launches=networks.launches + loss.launches,
        peak=networks.peak + loss.peak,
    )
    P = FLOAT * sum(p.numel() for p in student.parameters())
    passes = _ADAMW_PASSES if work.config.optim.name == "adamw" else _OTHER_PASSES
    passes += _EMA_PASSES + _CLIP_PASSES
    return micro.times(train.accumulate).plus(passes * P, _UPDATE_LAUNCHES)


def evaluated_views(work: Workload) -> int:
    """Images that one evaluation while training passes through the backbone, about."""
    evaluate = work.config.evaluate
    images = min(work.images, evaluate.limit)
    views = 0
    if "quality" in evaluate.protocols:
        views += QUALITY_VIEWS * min(images, QUALITY_IMAGES)
    if evaluate.protocols == ("quality",):
        return views + images
    return views + images + images // 4  # a smaller val/


def forward_flops(work: Workload, size: int) -> float:
    """Of the backbone for one image of `size` pixels, as evaluations see it."""
    backbone = on_meta(work.spec.build).eval()
    with torch.no_grad(), Meter() as meter:
        backbone(torch.empty(2, work.spec.in_chans, size, size, device=_device(backbone)))
    return meter.flops / 2


def loss_cost(V: int, B: int, K: int, d: int) -> StepCost:
    """Last layer and loss in chunks (`loss.chunked`), forward and backward.

    Forward: logits of student and teacher, and the teacher's pull on the bottleneck; backward: both
    logits again, the gradients of the bottleneck and of the weights.
    """
    student, teacher = V * B, GLOBAL_VIEWS * B
    rows = (student + 2 * teacher) + (2 * student + teacher) + student
    elementwise = FLOAT * K * (8 * student + 16 * teacher)  # about: logits pass through some ten
    weights = FLOAT * K * d * 8  # read in both directions, by student and teacher; gradients
    chunk = FLOAT * min(K, CPU_CHUNK) * 4 * (student + teacher)
    chunks = -(-K // CPU_CHUNK)
    gradient = FLOAT * K * d  # comes first, when all activations are there
    return StepCost(2.0 * rows * K * d, elementwise + weights, 60 * chunks, chunk + gradient)


def embedding_loss_cost(V: int, B: int, d: int) -> StepCost:
    """About, of an objective without prototypes: each view's d x d moments, forward and backward."""
    rows = V * B
    return StepCost(
        6.0 * rows * d * d, FLOAT * 8 * (rows * d + V * d * d), 30 * V, FLOAT * V * d * d
    )


def memory_bytes(work: Workload, kept: Kept, step: StepCost) -> int:
    """Of the tensors of one process at the peak of a step."""
    found = kept.state + max(step.peak, kept.gradients)
    # Those of the micro-batches before; of several processes the buckets that stay, which are gradients.
    if work.config.train.accumulate > 1 or work.processes > 1:
        found += kept.gradients
    return found


def network_bytes(work: Workload, kept: Kept) -> int:
    """What one process sends in a step: gradients and the loss's mean in a ring, and statistics.

    A ring sends 2 (n - 1) / n of what it averages; BatchNorm gathers three numbers a channel forward
    and averages two backward, for each forward pass of a resolution, student's and teacher's.
    """
    n, train = work.processes, work.config.train
    if n == 1:
        return 0
    around = 2 * (n - 1) / n
    passes = (len(work.crops.groups) + 1) * train.accumulate
    statistics = FLOAT * kept.statistics * passes * (3 * (n - 1) / n + 2 * around)
    dino = work.config.loss.objective == "dino"
    prototypes = FLOAT * (work.config.head.prototypes + 1 if dino else 1)
    return round(around * (FLOAT * kept.trained + prototypes) + statistics)


def disk_bytes(work: Workload, kept: Kept) -> dict[str, int]:
    """What a run leaves on disk, by what it is."""
    runtime, epochs = work.config.runtime, work.config.train.epochs
    newest = min(saves(work), runtime.keep_last)
    found = {f"newest states ({newest})": newest * kept.state}
    if runtime.keep_every:
        held = epochs // runtime.keep_every
        found[f"states kept every {runtime.keep_every} epochs ({held})"] = held * kept.state
    return found | {"weights, first and last": 2 * kept.backbone}


def saves(work: Workload) -> int:
    """How many states a run writes."""
    every, steps = work.config.runtime.checkpoint_every, work.steps_per_epoch
    between = sum(1 for i in range(every, work.iterations + 1, every) if i % steps)
    return work.config.train.epochs + between


# Networks


def _networks(work: Workload) -> tuple[MultiCropNetwork, MultiCropNetwork]:
    """Student and teacher without memory."""
    config = work.config
    backbone = on_meta(lambda: work.spec.build(drop_path=config.model.drop_path))
    if config.runtime.activation_checkpointing:
        checkpoint_activations(backbone, work.spec.arch)
    head = on_meta(lambda: build_head(config.head, backbone.embed_dim, config.loss))
    teacher = MultiCropNetwork(
        on_meta(work.spec.build),
        on_meta(lambda: build_head(config.head, backbone.embed_dim, config.loss)),
    )
    return MultiCropNetwork(backbone, head), teacher.requires_grad_(False)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _count_networks(
    student: MultiCropNetwork, teacher: MultiCropNetwork, crops: MultiCrop, B: int, channels: int
) -> StepCost:
    """Both forward passes and the student's backward pass, up to the bottleneck."""
    device = _device(student)
    views = [
        torch.empty(count, B, channels, size, size, device=device) for size, count in crops.groups
    ]
    with torch.random.fork_rng(devices=[]), Meter() as meter:
        meter.follow(views)
        with torch.no_grad():
            judged = teacher([views[0][:GLOBAL_VIEWS]], embed=True)
        found = student(views, embed=True)
        found.bottleneck.sum().backward()
        del found, judged
    return StepCost(meter.flops, meter.bytes, meter.launches, meter.peak)


def _photometric_bytes(crops: MultiCrop, B: int) -> float:
    """Flip, colours, blur and normalisation: some ten passes over float32 pixels."""
    return 20.0 * FLOAT * B * crops.channels * sum(view.size**2 for view in crops.views)


class Meter(TorchDispatchMode):
    """Counts what passes through torch: products, bytes, and the memory of what lives.

    Of a convolution's backward pass torch's own counter forgets the groups, which makes depthwise
    ones as dear as full ones; here each of its two gradients costs what the forward pass does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.bytes = 0.0
        self.launches = 0
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Count what these hold for as long as they live."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = size
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        self.follow(written)
        own = {x.untyped_storage()._cdata for x in read}
        if func._schema.is_mutable or any(x.untyped_storage()._cdata not in own for x in written):
            self.launches += 1
            flops = _flops(func, args, kwargs or {}, out)
            self.flops += flops
            if not flops:  # products are bound by arithmetic
                self.bytes += sum(x.numel() * x.element_size() for x in (*read, *written))
        return out


HALF = 0.6  # of the bytes in fp32, where numbers are half: not all of them are


def activation_bytes(backward: Callable[[int], None], batch_size: int, precision: str) -> int:
    """About the bytes that live at once in a step's forward and backward pass, counted for two images.

    0 where that cannot be known without values: the network asks its tensors for them, or has an
    operation that torch's "meta" device does not know. Such a step is not refused for its memory.

    Args:
        backward: both passes over so many images on the "meta" device.
    """
    images = 2
    try:
        with torch.random.fork_rng(devices=[]), Meter() as meter:
            backward(images)
    except (RuntimeError, ValueError, NotImplementedError):
        return 0
    share = 1.0 if precision == "fp32" else HALF
    return round(share * meter.peak * batch_size / images)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func._overloadpacket
    if packet not in flop_registry:
        return 0.0
    if packet is torch.ops.aten.convolution_backward:
        gradient, _, weight, *_, mask = args
        return 2.0 * gradient.numel() * weight[0].numel() * (mask[0] + mask[1])
    return float(flop_registry[packet](*args, **kwargs, out_val=out))
