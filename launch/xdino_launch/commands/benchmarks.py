"""`xdino bench`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino import values
from xdino.errors import UsageError, nearest
from xdino_launch.commands.options import (
    Commands,
    Number,
    Numbers,
    Place,
    Whole,
    device_option,
    given,
    option,
    takes,
)

if TYPE_CHECKING:
    from xdino_launch.bench.timing import Protocol, Report


def threads_option(default: int) -> Callable[..., Any]:
    return click.option(
        "--threads", default=default, show_default=True, type=Whole(0, 1024), help="0: all."
    )


@click.group(cls=Commands)
def bench() -> None:
    """Time this code, and a checkout of the published code beside it: arms in turn, with an A/A."""


@dataclass(frozen=True)
class TimingOptions:
    """What every benchmark takes."""

    rounds: int = option("--rounds", default=9, show_default=True, type=Whole(1, 10_000))
    threads: int = given(threads_option(1))
    seconds: float | None = option(
        "--seconds", type=Number(0, 1e9), help="Begin no round after these."
    )
    out: str | None = option("--out", type=Place(file=True), help="Write a JSON file.")

    def protocol(self) -> "Protocol":
        from xdino_launch.bench.timing import Protocol

        return Protocol(self.rounds, self.threads, self.seconds)

    def tell(self, report: "Report") -> None:
        """A benchmark's tables on standard output, and everything in `out`."""
        from xdino_launch.bench.timing import CLAIM_ROUNDS, write
        from xdino_launch.console import stderr_console, stdout_console

        for table in report.tables():
            stdout_console().print(table)
        for name, fact in report.facts.items():
            click.echo(f"{name}: {fact}")
        if report.rounds < CLAIM_ROUNDS:
            stderr_console().print(f"fewer than {CLAIM_ROUNDS} rounds: a look, not a measurement")
        if self.out is not None:
            write(report, Path(self.out), sys.argv[1:])


@dataclass(frozen=True)
class TimingOnAllCores(TimingOptions):
    threads: int = given(threads_option(0))


def reference_option(name: str = "reference", of: str = "dino") -> Callable[..., Any]:
    return click.option(
        f"--{name}",
        type=Place(),
        metavar=f"{of.upper()}_DIR",
        help=f"A checkout of facebookresearch/{of}.",
    )


def _fits(what: str, needed: int, lower: str) -> None:
    """Raises UsageError where so many bytes are more than this machine's memory."""
    import torch

    from xdino.plan.feasibility import check_memory

    check_memory(what, needed, torch.device("cpu"), f"lower {lower}")


def _takes(arch: str, option: str, sizes: tuple[int, ...], batch: int, training: bool) -> None:
    """Raises UsageError where there is no such network, or it does not take images of a size."""
    from xdino.backbones import BackboneSpec
    from xdino.plan import feasibility

    spec = BackboneSpec(arch, input_size=max(sizes))
    network = feasibility.on_meta(spec.build)
    trials = [feasibility.Trial(option, size, min(batch, 2), training) for size in sizes]
    feasibility.check_sizes(network, arch, 3, trials, real=spec.build)


@bench.command("pipeline")
@takes(timing=TimingOptions)
@click.option(
    "--data", type=Place(), help="Folder of images; without it, tiles of two photographs."
)
@reference_option()
@click.option("--batch", default=16, show_default=True, type=Whole(1, 10**7))
@click.option("--images", default=64, show_default=True, type=Whole(1, 10**7), help="A round.")
def bench_pipeline(
    timing: TimingOptions, data: str | None, reference: str | None, batch: int, images: int
) -> None:
    """Milliseconds an image from JPEG to crops, on as many cores as threads."""
    from xdino_launch.bench.pipeline import pipeline

    timing.tell(pipeline(data, reference, batch, images, timing.protocol()))


@bench.command("step")
@takes(timing=TimingOptions)
@click.option("--arch", default="xcit_nano_12_p16", show_default=True)
@click.option("--batch", default=8, show_default=True, type=Whole(1, 10**7), help="Images.")
@click.option("--prototypes", default=65536, show_default=True, type=Whole(2, 10**7))
@click.option("--global-size", default=224, show_default=True, type=Whole(16, 2**13))
@click.option("--local-size", default=96, show_default=True, type=Whole(16, 2**13))
@click.option("--local-count", default=8, show_default=True, type=Whole(0, 10**7))
@click.option("--precision", default="fp32", show_default=True, help="fp32,bf16,fp16")
@device_option("cpu")
@click.option(
    "--kernels", default="auto", show_default=True, help="plain,fused,compiled: an arm each."
)
@click.option("--graphs/--no-graphs", default=True, help="Ours on CUDA by graphs.  [graphs]")
@click.option("--memory", is_flag=True, help="Peak memory instead of time, in child processes.")
@reference_option()
@reference_option("xcit", "xcit")
def bench_step(
    timing: TimingOptions,
    precision: str,
    kernels: str,
    memory: bool,
    reference: str | None,
    xcit: str | None,
    **shape: Any,
) -> None:
    """Seconds of an optimisation step on fixed crops, or the memory that it takes."""
    if (reference is None) != (xcit is None):
        raise UsageError("the published step needs both --reference DINO_DIR and --xcit XCIT_DIR")
    views = 2 * shape["global_size"] ** 2 + shape["local_count"] * shape["local_size"] ** 2
    _fits("the crops", 12 * shape["batch"] * views, "--batch, --global-size or --local-count")
    _fits("the prototypes", 5 * 4 * 256 * shape["prototypes"], "--prototypes")
    arch, batch, locals_ = shape["arch"], shape["batch"], shape["local_count"]
    _takes(arch, "--global-size", (shape["global_size"],), 2 * batch, True)
    if locals_:
        _takes(arch, "--local-size", (shape["local_size"],), locals_ * batch, True)
    from xdino_launch.bench.step import KERNELS, StepShape, step

    for mode in kernels.split(","):
        if mode not in KERNELS:
            raise UsageError(f"--kernels cannot be {values.shown(mode)}: {nearest(mode, KERNELS)}")
    report = step(
        StepShape(**shape),
        tuple(precision.split(",")),
        (reference, xcit) if reference and xcit else None,
        memory,
        timing.protocol(),
        tuple(kernels.split(",")),
    )
    timing.tell(report)


@bench.command("knn")
@takes(timing=TimingOnAllCores)
@click.option("--bank", default=100_000, show_default=True, type=Whole(1, 10**7))
@click.option("--queries", default=5_000, show_default=True, type=Whole(1, 10**7))
@click.option("--dim", default=384, show_default=True, type=Whole(1, 10**7))
@click.option("--classes", default=1_000, show_default=True, type=Whole(1, 10**7))
@reference_option()
def bench_knn(
    timing: TimingOptions, bank: int, queries: int, dim: int, classes: int, reference: str | None
) -> None:
    """Seconds of the k-NN evaluation at k = 10, 20, 100 and 200, and whether both agree."""
    _fits("the bank and the queries", 8 * (bank + queries + classes) * dim, "--bank or --dim")
    from xdino_launch.bench.knn import knn

    timing.tell(knn(bank, queries, dim, classes, reference, timing.protocol()))


@bench.command("linear")
@takes(timing=TimingOptions)
@click.option("--data", type=Place(), help="Labelled images; without it, noise.")
@click.option("--arch", default="xcit_nano_12_p16", show_default=True)
@click.option("--images", default=256, show_default=True, type=Whole(0, 10**7), help="0: none.")
@click.option("--size", default=224, show_default=True, type=Whole(16, 2**13), help="Pixels.")
@click.option(
    "--features", default=10_000, show_default=True, type=Whole(0, 10**7), help="Cached; 0: none."
)
@click.option("--dim", default=384, show_default=True, type=Whole(1, 10**7), help="Of cached.")
@click.option("--classes", default=1_000, show_default=True, type=Whole(2, 10**7))
@click.option("--batch", default=128, show_default=True, type=Whole(1, 10**7), help="Images.")
@click.option("--lrs", default=13, show_default=True, type=Whole(2, 10**7), help="Of the grid.")
@device_option("cpu")
def bench_linear(timing: TimingOptions, data: str | None, **shape: Any) -> None:
    """Seconds an epoch of one linear probe and of a grid, over images and over cached features."""
    features, dim, classes = shape["features"], shape["dim"], shape["classes"]
    heads = 3 * shape["lrs"] * dim * classes
    _fits("features and heads", 4 * (features * dim + heads), "--features, --dim or --classes")
    pixels = shape["batch"] * shape["size"] ** 2
    _fits("the images of a batch", 12 * pixels, "--batch or --size")
    if shape["images"]:
        _takes(shape["arch"], "--size", (shape["size"],), shape["batch"], False)
    from xdino_launch.bench.linear import LinearShape, linear

    timing.tell(linear(LinearShape(**shape), data, timing.protocol()))


@bench.command("scaling")
@takes(timing=TimingOptions)
@click.option(
    "--task",
    type=click.Choice(["detect", "segment"]),
    help="A whole detector or segmenter, with pyramid and heads.  [a backbone]",
)
@click.option("--arch", default="xcit_small_12_p16", show_default=True)
@click.option("--against", default="vit_small_patch16_224", show_default=True, help="Of timm.")
@click.option(
    "--sizes",
    type=Numbers(values.whole, least=16),
    help="Pixels: of squares 224,384,512,768,1024; with --task shorter sides of 800 : 1344, "
    "400,800,1600.",
)
@click.option("--batch", default=1, show_default=True, type=Whole(1, 10**7), help="Of a backbone.")
@click.option("--precision", default="fp32", show_default=True)
@click.option(
    "--memory", is_flag=True, help="With --task: peak memory instead of time, in child processes."
)
@device_option("cpu")
def bench_scaling(
    timing: TimingOptions,
    task: str | None,
    arch: str,
    against: str,
    sizes: tuple[int, ...] | None,
    batch: int,
    precision: str,
    memory: bool,
    device: str,
) -> None:
    """Forward time against image size: the exponent in tokens, and a transformer beside it."""
    if task is None and memory:
        raise UsageError("--memory goes with --task")
    if task is not None and batch != 1:
        raise UsageError("--task looks at one picture at a time: leave out --batch")
    if task is not None and memory and device not in ("cpu", "auto"):
        raise UsageError("--memory is of the CPU")
    sizes = sizes or ((400, 800, 1600) if task else (224, 384, 512, 768, 1024))
    _fits("the images of a batch", 12 * batch * max(sizes) ** 2, "--batch or --sizes")
    if task is not None:
        from xdino_launch.bench.dense_scaling import dense_scaling

        timing.tell(
            dense_scaling(task, arch, against, sizes, precision, device, memory, timing.protocol())
        )
        return
    for name in (arch, against):
        _takes(name, "--sizes", sizes, batch, False)
    from xdino_launch.bench.scaling import scaling

    timing.tell(scaling(arch, against, sizes, batch, precision, device, timing.protocol()))
