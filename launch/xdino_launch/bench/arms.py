"""What `xdino bench` times: the input pipeline, the training step, k-NN, and the growth with pixels.

Each benchmark lays out its arms, ours and (where a checkout is given) the published code's, on the
same input, and returns a `Report`; `timing` says how arms become ratios. Times are wall-clock
times. The command line prints a report and writes it as JSON.

Letters: B images, V views, N tokens, C channels, D width.
"""

import math
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from xdino import acceleration, augment, data, xcit
from xdino.backbones import BackboneSpec
from xdino.data.sources import FileSource
from xdino.errors import RunFailed, UsageError
from xdino.head import DINOHead
from xdino.learner import AUTOCAST, Learner
from xdino.loss import DINOLoss
from xdino.plan import checkpoint_activations
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino.train import to_device
from xdino_eval import knn as nearest_neighbours
from xdino_launch.bench import reference as published
from xdino_launch.bench.timing import (
    Arm,
    Ratio,
    Report,
    again,
    cores,
    divided,
    measure,
    on_cores,
    timed,
)
from xdino_launch.console import counter, stderr_console


@dataclass(frozen=True)
class Protocol:
    """How often and with what: rounds, threads (0: all cores), seconds after which to stop."""

    rounds: int = 9
    threads: int = 1
    seconds: float | None = None

    @property
    def used_threads(self) -> int:
        return self.threads or cores()

    def measure(self, arms: list[Arm], warm_up: bool = True) -> dict[str, list[float]]:
        tell = counter(stderr_console(), "rounds")
        return measure(arms, self.rounds, warm_up, self.seconds, tell)


# The input pipeline


def pipeline(
    folder: str | None, reference: str | None, batch: int, images: int, protocol: Protocol
) -> Report:
    """Milliseconds an image from JPEG files to crops: 2 x 224 and 8 x 96, published parameters.

    Args:
        folder: images; None for tiles of two photographs, written as JPEG to a temporary folder.
        reference: a checkout of facebookresearch/dino, or None.
        batch: images of a batch. images: of an arm's round, rounded to whole batches.
    """
    dino = published.load_dino(reference) if reference else None
    with ExitStack() as stack:
        where = folder or stack.enter_context(_photographs())
        source = data.open_source(where, split="train", channels=3)
        if not isinstance(source, FileSource):
            raise UsageError(f"{folder} holds no image files; bench pipeline reads files")
        stack.enter_context(on_cores(protocol.used_threads, pinned=True))
        batches = max(1, images // batch)
        loader = data.CropLoader(
            source, augment.multi_crop(), batch, seed=0, workers=protocol.used_threads
        )
        ours, complete = _our_pipelines(loader, batches)
        arms = [ours, complete, again(ours)]
        ratios = [Ratio("ours, all / ours, uint8 crops", complete.name, ours.name)]
        if dino is not None:
            paths = [source.path(i) for i in range(len(source))]
            theirs = published.PublishedPipeline(dino, paths, batch, protocol.used_threads)
            stack.callback(theirs.close)
            reference_arms = _their_pipelines(theirs, loader, batches)
            arms += reference_arms
            ratios += [
                Ratio(f"{over.name} / {under.name}", over.name, under.name)
                for over in reference_arms
                for under in (ours, complete)
            ]
        values = protocol.measure(arms)
        settings = {
            "images": len(source),
            "data": folder or "tiles of scikit-learn's two photographs",
            **_typical(source),
            "batch": batch,
            "images an arm and round": batches * batch,
            "threads": protocol.used_threads,
            "cores": f"pinned to {protocol.used_threads}, worker processes included",
            "crops": "2 x 224, 8 x 96",
        }
        return Report("pipeline", settings, "ms an image", values, divided(values, ratios))


def _our_pipelines(loader: data.CropLoader, batches: int) -> list[Arm]:
    """Crops left as uint8 for the device, and everything done on the CPU."""
    unit = batches * loader.batch_size / 1e3  # seconds -> milliseconds an image

    def crops(number: int) -> None:
        for _ in loader.iterate(number * batches, (number + 1) * batches):
            pass

    def everything(number: int) -> None:
        for batch in loader.iterate(number * batches, (number + 1) * batches):
            to_device(batch, loader.crops, torch.device("cpu"))

    return [Arm("ours, uint8 crops", timed(crops, unit)), Arm("ours, all", timed(everything, unit))]


def _their_pipelines(
    theirs: published.PublishedPipeline, loader: data.CropLoader, batches: int
) -> list[Arm]:
    """The published augmentation in its loader and without, on the images of our same batches."""
    unit, B = batches * loader.batch_size / 1e3, loader.batch_size

    def indices(number: int) -> list[int]:
        found: list[int] = []
        for iteration in range(number * batches, (number + 1) * batches):
            epoch, step = divmod(iteration, loader.steps_per_epoch)
            order = data.epoch_order(len(loader.source), loader.seed, epoch)
            found += order[step * B : (step + 1) * B].tolist()
        return found

    return [
        Arm("published loader", timed(lambda number: theirs.load(indices(number)), unit)),
        Arm("published, no loader", timed(lambda number: theirs.augment(indices(number)), unit)),
    ]


@contextmanager
def _photographs(count: int = 64, width: int = 512, height: int = 400) -> Iterator[str]:
    """A folder of `count` JPEG tiles (0.2 megapixels, quality 90) of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # two of [427, 640, 3]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            photograph = photographs[i % len(photographs)]
            top = generator.integers(photograph.shape[0] - height + 1)
            left = generator.integers(photograph.shape[1] - width + 1)
            tile = photograph[top : top + height, left : left + width]
            Image.fromarray(tile).save(Path(folder) / f"{i:03}.jpg", quality=90)
        yield folder


def _typical(source: FileSource) -> dict[str, float]:
    """Median size of (at most 32 of) the files, in kB and in megapixels."""
    some = range(0, len(source), max(1, len(source) // 32))
    pixels = [math.prod(source.read(i).shape[:2]) / 1e6 for i in some]
    kilobytes = [Path(source.path(i)).stat().st_size / 1e3 for i in some]
    return {
        "median kB": round(statistics.median(kilobytes), 1),
        "median megapixels": round(statistics.median(pixels), 3),
    }


# The optimisation step


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
    kernels: str = "auto"  # as runtime.kernels: auto, plain, fused

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


def our_step(shape: StepShape, precision: str) -> Callable[[], float]:
    """A step of this code's learner on fixed crops; returns the loss."""
    torch.manual_seed(0)
    spec = BackboneSpec(shape.arch, input_size=shape.global_size)
    backbone = spec.build(drop_path=shape.drop_path)
    if shape.checkpointing:
        checkpoint_activations(backbone, shape.arch)
    head = DINOHead(backbone.embed_dim, shape.prototypes)
    student = MultiCropNetwork(backbone, head)
    teacher = make_teacher(student, spec.build())
    loss = DINOLoss(shape.prototypes)
    learner = Learner(student, teacher, loss, precision=precision, device=shape.device)
    chosen = acceleration.choose(
        shape.kernels, backbone, augment.multi_crop(), learner.device, learner.autocast
    )
    if chosen.why is not None:
        stderr_console().print(chosen.why)
    acceleration.use_kernels((student, teacher), chosen.network)
    crops = shape.crops()
    settings = StepSettings(
        lr=shape.lr, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, freeze_last_layer=False
    )
    return lambda: learner.step([crops], settings).loss


def their_step(
    shape: StepShape, precision: str, reference: str, xcit_folder: str
) -> Callable[[], float]:
    """A step of the published code on the same crops. Needs `published.group_of_one`."""
    torch.manual_seed(0)
    dino, their_xcit = published.load_dino(reference), published.load_xcit(xcit_folder)
    return published.published_step(
        dino,
        their_xcit,
        shape.arch,
        shape.prototypes,
        shape.crops(),
        shape.drop_path,
        shape.lr,
        precision,
        torch.device(shape.device),
    )


KINDS = "published", "ours"
CHECKPOINTED = "ours with activation checkpointing"


def step(
    shape: StepShape,
    precisions: tuple[str, ...],
    references: tuple[str, str] | None,
    memory: bool,
    protocol: Protocol,
    kernels: tuple[str, ...] = ("auto",),
) -> Report:
    """Seconds a step (or `memory`: MB at its peak), ours and the published code's.

    Args:
        kernels: which of our own paths, an arm each: "auto", "plain", "fused".
        references: checkouts of facebookresearch/dino and facebookresearch/xcit, or None.
    """
    unknown = [name for name in precisions if name not in AUTOCAST]
    if unknown:
        raise UsageError(f"--precision takes {', '.join(AUTOCAST)}, got {unknown[0]}")
    shapes = {  # of our arms by name
        f"ours ({mode})" if len(kernels) > 1 else "ours": replace(shape, kernels=mode)
        for mode in kernels
    }
    kinds: list[tuple[str, tuple[str, str] | None]] = [(name, None) for name in shapes]
    kinds += [("published", references)] if references else []
    if references:
        published.load_dino(references[0])
        published.build_xcit(published.load_xcit(references[1]), shape.arch)  # known, before work
    device = torch.device(shape.device)

    def value(
        precision: str,
        kind: str,
        checkouts: tuple[str, str] | None,
        mine: StepShape | None = None,
    ) -> Callable[[int], float]:
        mine = mine or shapes.get(kind, shape)
        if memory:
            return lambda number: _peak_megabytes(mine, precision, checkouts, protocol)
        if checkouts is None:
            work = our_step(mine, precision)
        else:
            work = their_step(mine, precision, *checkouts)
        return timed(lambda number: work(), device=device)

    with on_cores(protocol.used_threads), ExitStack() as stack:
        if references and not memory:
            stack.enter_context(published.group_of_one(device))
        arms = [
            Arm(f"{kind}, {precision}", value(precision, kind, checkouts))
            for precision in precisions
            for kind, checkouts in kinds
        ]
        if memory:
            thrifty = replace(shape, checkpointing=True)
            arms += [
                Arm(f"{CHECKPOINTED}, {p}", value(p, "ours", None, thrifty)) for p in precisions
            ]
        arms.insert(len(kinds), again(arms[0]))
        values = protocol.measure(arms, warm_up=not memory)
    settings = {**asdict(shape), "precisions": precisions, "threads": protocol.used_threads}
    settings["kernels"] = kernels
    ratios = divided(values, _step_ratios(precisions, memory, tuple(shapes)))
    unit = "MB above the process's own" if memory else "s a step"
    return Report("step memory" if memory else "step", settings, unit, values, ratios)


def _step_ratios(
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


def _peak_megabytes(
    shape: StepShape, precision: str, checkouts: tuple[str, str] | None, protocol: Protocol
) -> float:
    """Peak of two steps in a process of their own, above what it held before building them."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(_peak_here, shape, precision, checkouts, protocol.used_threads)
        try:
            return found.result()
        except BrokenProcessPool:
            raise RunFailed(
                "the process whose memory was measured died, perhaps of too little memory; "
                "lower --batch"
            ) from None


def _peak_here(
    shape: StepShape, precision: str, checkouts: tuple[str, str] | None, threads: int
) -> float:
    """MB; the second step is the first with all of the optimiser's state."""
    device = torch.device(shape.device)
    with on_cores(threads), ExitStack() as stack:
        if checkouts:
            published.load_dino(checkouts[0])
            published.load_xcit(checkouts[1])
            stack.enter_context(published.group_of_one(device))
        before = 0.0 if device.type == "cuda" else _status("VmRSS")
        work = their_step(shape, precision, *checkouts) if checkouts else our_step(shape, precision)
        for _ in range(2):
            work()
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 1e6
        return _status("VmHWM") - before


def _status(name: str) -> float:
    """MB that the kernel reports for this process (VmRSS: now, VmHWM: the most so far)."""
    file = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", file.read_text()) if file.exists() else None
    if found is None:
        raise UsageError("--memory needs Linux's /proc, which this machine does not have")
    return int(found[1]) * 1024 / 1e6


# k-NN


def knn(
    bank: int,
    queries: int,
    dim: int,
    classes: int,
    reference: str | None,
    protocol: Protocol,
) -> Report:
    """Seconds for k = 10, 20, 100 and 200 together, on noisy unit vectors around class centres."""
    if min(bank, queries, dim, classes) < 1:
        raise UsageError("--bank, --queries, --dim and --classes must be at least 1")
    if reference and queries < 100:
        raise UsageError(f"the published k-NN needs 100 queries or more, got --queries {queries}")
    if reference and bank < max(nearest_neighbours.KS):
        raise UsageError(f"the published k-NN needs a --bank of 200 or more, got {bank}")
    dino = published.load_dino(reference) if reference else None
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)

    def split(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (count,), generator=generator)
        # Noise at which neighbours are often wrong (top-1 is 73 % at k = 10 by default), so that
        # the order of votes matters.
        noise = 3.0 * torch.randn(count, dim, generator=generator)
        return nearest_neighbours.normalise(centres[labels] + noise), labels

    train, val = split(bank), split(queries)
    scores: dict[str, dict[int, tuple[float, float]]] = {}

    def ours(number: int) -> None:
        scores["ours"] = nearest_neighbours.classify(*train, *val)

    def theirs(number: int) -> None:
        assert dino is not None
        scores["published"] = {
            k: dino.knn.knn_classifier(*train, *val, k, 0.07, num_classes=classes)
            for k in nearest_neighbours.KS
        }

    arms = [Arm("ours", timed(ours))]
    if dino is not None:
        arms.append(Arm("published", timed(theirs)))
    arms.append(again(arms[0]))
    faiss_threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(protocol.used_threads)
        with on_cores(protocol.used_threads):
            values = protocol.measure(arms)
    finally:
        faiss.omp_set_num_threads(faiss_threads)
    facts: dict[str, Any] = {
        f"top-1, top-5 in per cent, {name}": {f"k = {k}": list(top) for k, top in found.items()}
        for name, found in scores.items()
    }
    if dino is not None:
        facts["equal to the digit"] = scores["ours"] == scores["published"]
    settings = {
        "bank": bank,
        "queries": queries,
        "dim": dim,
        "classes": classes,
        "k": nearest_neighbours.KS,
        "threads": protocol.used_threads,
    }
    ratios = divided(values, [Ratio("published / ours", "published", "ours")])
    return Report("knn", settings, "s", values, ratios, facts=facts)


# Growth with the number of pixels


def scaling(
    arch: str,
    against: str,
    sizes: tuple[int, ...],
    batch: int,
    precision: str,
    device: str,
    protocol: Protocol,
) -> Report:
    """Seconds of a forward pass at each of `sizes` (pixels): an XCiT against a timm transformer.

    The exponent is the slope of log time over log tokens, fitted in every round.
    """
    if min(sizes) < 16 or len(set(sizes)) < 2:
        raise UsageError("--sizes takes two or more different sizes of at least 16 pixels")
    if precision not in AUTOCAST:
        raise UsageError(f"--precision takes {', '.join(AUTOCAST)}, got {precision}")
    ours = xcit.build(arch).eval().to(device)
    if not timm.is_model(against):
        raise UsageError(f'timm has no network called "{against}"')
    try:
        theirs = timm.create_model(against, num_classes=0, dynamic_img_size=True).eval().to(device)
    except TypeError:
        raise UsageError(f"{against} does not take images of any size") from None
    autocast = AUTOCAST[precision]

    def forward(network: nn.Module, size: int) -> Callable[[int], float]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator).to(device)

        @torch.inference_mode()
        def work(number: int) -> None:
            with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
                network(images)

        return timed(work, device=torch.device(device))

    arms = [
        Arm(f"{name}, {size} px", forward(network, size))
        for size in sizes
        for name, network in ((arch, ours), (against, theirs))
    ]
    arms.append(again(arms[0]))
    with on_cores(protocol.used_threads):
        values = protocol.measure(arms)
    tokens = [math.prod(ours.grid(size, size)) for size in sizes]
    figures = {
        f"exponent in tokens, {sizes[0]} to {sizes[-1]} px: {name}": [
            float(np.polyfit(np.log(tokens), np.log(times), 1)[0])
            for times in zip(*(values[f"{name}, {size} px"] for size in sizes), strict=True)
        ]
        for name in (arch, against)
    }
    ratios = divided(
        values,
        [
            Ratio(f"{against} / {arch}, {s} px", f"{against}, {s} px", f"{arch}, {s} px")
            for s in sizes
        ],
    )
    settings = {
        "arch": arch,
        "against": against,
        "sizes": sizes,
        "batch": batch,
        "precision": precision,
        "device": device,
        "threads": protocol.used_threads,
    }
    return Report("scaling", settings, "s a forward pass", values, ratios, figures)
