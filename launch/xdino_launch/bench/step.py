"""What `xdino bench step` measures: an optimisation step on fixed crops, its time or its memory.

Letters: B images, V views, C channels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from xdino import acceleration, augment
from xdino.acceleration.graphs import WARM
from xdino.backbones import BackboneSpec, compile_backbone
from xdino.errors import UsageError
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.plan import checkpoint_activations
from xdino.schedules import StepSettings
from xdino.stepping import AUTOCAST
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino_launch.bench import reference as published
from xdino_launch.bench.memory import in_a_process, status
from xdino_launch.bench.timing import Arm, Protocol, Ratio, Report, again, divided, on_cores, timed
from xdino_launch.console import stderr_console

CHECKPOINTED = "ours with activation checkpointing"
COMPILED = "compiled"  # the plain path under torch.compile
KERNELS = (*acceleration.MODES, COMPILED)
Checkouts = tuple[str, str]  # of facebookresearch/dino and facebookresearch/xcit


@dataclass(frozen=True)
class StepShape:
    """One optimisation step. Sizes in pixels; two global views."""

    arch: str = "xcit_nano_12_p16"
    batch: int = 8
    prototypes: int = 65536
    global_size: int = 224
    local_size: int = 96
    local_count: int = 8
    drop_path: float = 0.1
    device: str = "cpu"
    checkpointing: bool = False  # of our activations
    kernels: str = "auto"  # of KERNELS
    graphs: bool = True  # on CUDA, passes as graphs; not where activations are computed again

    @property
    def lr(self) -> float:
        return 5e-4 * self.batch / 256

    def crops(self) -> list[Tensor]:
        """The same noise every time, by resolution: each [V_r, B, C, h, w]."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(2, self.global_size), (self.local_count, self.local_size)]
        return [
            torch.randn(views, self.batch, 3, size, size, generator=generator).to(self.device)
            for views, size in sizes
            if views
        ]


@dataclass(frozen=True)
class Work:
    """The step of an arm: of this code or, with `checkouts`, of the published."""

    shape: StepShape
    precision: str
    checkouts: Checkouts | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.shape.device)

    def build(self) -> Callable[[], float]:
        """A step on the same crops, whichever code's; returns the loss.

        The published needs `published.group_of_one`.
        """
        torch.manual_seed(0)
        if self.checkouts is None:
            return self._ours()
        shape, dino = self.shape, published.load_dino(self.checkouts[0])
        xcit = published.load_xcit(self.checkouts[1])
        networks = published.published_networks(
            dino, xcit, shape.arch, shape.prototypes, shape.drop_path, self.device
        )
        return published.published_step(
            dino, networks, shape.prototypes, shape.crops(), shape.lr, self.precision
        )

    def _ours(self) -> Callable[[], float]:
        shape = self.shape
        spec = BackboneSpec(shape.arch, input_size=shape.global_size)
        backbone = spec.build(drop_path=shape.drop_path)
        if shape.checkpointing:
            checkpoint_activations(backbone, shape.arch)
        head = DINOHead(backbone.embed_dim, shape.prototypes)
        student = MultiCropNetwork(backbone, head)
        teacher = make_teacher(student, spec.build())
        loss = DINOLoss(shape.prototypes)
        compiled = shape.kernels == COMPILED
        graphs = shape.graphs and self.device.type == "cuda"
        graphs = graphs and not compiled and not shape.checkpointing
        learner = Learner(
            student, teacher, loss, precision=self.precision, device=shape.device, graphs=graphs
        )
        mode = "plain" if compiled else shape.kernels
        chosen = acceleration.choose(
            mode,
            backbone,
            augment.multi_crop(),
            learner.device,
            learner.stepping.autocast,
            images=shape.batch,
            graphs=graphs,
        )
        if compiled:
            for network in (student, teacher):
                compile_backbone(network.backbone)
        if chosen.why is not None:
            stderr_console().print(chosen.why)
        acceleration.use_kernels((student, teacher), chosen.network)
        crops = shape.crops()
        settings = StepSettings(
            lr=shape.lr,
            weight_decay=0.04,
            momentum=0.996,
            teacher_temp=0.04,
            freeze_last_layer=False,
        )
        if graphs:  # recorded now, not while it is timed
            for _ in range(WARM + 1):
                learner.step([crops], settings)
        return lambda: learner.step([crops], settings).loss

    def seconds(self) -> Callable[[int], float]:
        """What an arm of time measures."""
        work = self.build()
        return timed(lambda number: work(), device=self.device)

    def peak_megabytes(self, threads: int) -> float:
        """What an arm of memory measures: the peak of two steps in a process of their own, above
        what it held before building them."""
        return in_a_process(_peak_here, self, threads, lower="--batch")


def _peak_here(work: Work, threads: int) -> float:
    """MB; the second step is the first with all of the optimiser's state."""
    with on_cores(threads), ExitStack() as stack:
        if work.checkouts:
            published.load_dino(work.checkouts[0])
            published.load_xcit(work.checkouts[1])
            stack.enter_context(published.group_of_one(work.device))
        before = 0.0 if work.device.type == "cuda" else status("VmRSS")
        step = work.build()
        for _ in range(2):
            step()
        if work.device.type == "cuda":
            return torch.cuda.max_memory_allocated(work.device) / 1e6
        return status("VmHWM") - before


def step(
    shape: StepShape,
    precisions: tuple[str, ...],
    checkouts: Checkouts | None,
    memory: bool,
    protocol: Protocol,
    kernels: tuple[str, ...] = ("auto",),
) -> Report:
    """Seconds a step (or `memory`: MB at its peak), ours and the published code's.

    Args:
        kernels: which of our own paths (`KERNELS`), an arm each.
    """
    unknown = [name for name in precisions if name not in AUTOCAST]
    if unknown:
        raise UsageError(f"--precision takes {', '.join(AUTOCAST)}, got {unknown[0]}")
    if checkouts:
        published.load_dino(checkouts[0])
        published.build_xcit(published.load_xcit(checkouts[1]), shape.arch)  # known, before work
    ours = {
        f"ours ({mode})" if len(kernels) > 1 else "ours": replace(shape, kernels=mode)
        for mode in kernels
    }
    works: dict[str, Work] = {}
    for precision in precisions:
        works |= {f"{name}, {precision}": Work(mine, precision) for name, mine in ours.items()}
        if checkouts:
            works[f"published, {precision}"] = Work(shape, precision, checkouts)
    if memory:
        thrifty = replace(shape, checkpointing=True)
        works |= {f"{CHECKPOINTED}, {name}": Work(thrifty, name) for name in precisions}
    with ExitStack() as stack:
        if checkouts and not memory:
            stack.enter_context(published.group_of_one(torch.device(shape.device)))
        arms = [Arm(name, _measure(work, memory, protocol)) for name, work in works.items()]
        arms.insert(len(ours) + bool(checkouts), again(arms[0]))
        values = protocol.measure(arms, warm_up=not memory)
    settings = {**asdict(shape), "precisions": precisions, "threads": protocol.used_threads}
    settings["kernels"] = kernels
    ratios = divided(values, step_ratios(precisions, memory, tuple(ours)))
    unit = "MB above the process's own" if memory else "s a step"
    return Report("step memory" if memory else "step", settings, unit, values, ratios)


def _measure(work: Work, memory: bool, protocol: Protocol) -> Callable[[int], float]:
    if memory:
        return lambda number: work.peak_megabytes(protocol.used_threads)
    return work.seconds()


def step_ratios(
    precisions: tuple[str, ...], memory: bool, arms: tuple[str, ...] = ("ours",)
) -> Iterator[Ratio]:
    """Times as published / ours (larger is better), memory as ours / published (smaller is).

    `arms`: the names of ours; the first is also what the others are compared with.
    """
    first = precisions[0]
    for precision in precisions:
        for ours in arms:
            pairs = [(f"published, {precision}", f"{ours}, {precision}")]
            if precision != first:
                pairs += [
                    (f"{kind}, {first}", f"{ours}, {precision}") for kind in ("published", ours)
                ]
            if ours != arms[0]:
                pairs.append((f"{arms[0]}, {precision}", f"{ours}, {precision}"))
            if memory:
                pairs += [
                    (f"{kind}, {precision}", f"{CHECKPOINTED}, {precision}")
                    for kind in ("published", ours)
                ]
            for over, under in pairs:
                over, under = (under, over) if memory else (over, under)
                yield Ratio(f"{over} / {under}", over, under)
