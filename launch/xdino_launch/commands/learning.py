"""`xdino finetune`, `xdino segment` and `xdino detect`: what learns with labels.

Their options, and how a run begins.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import from_iteration_option
from xdino_launch.commands.overrides import (
    KEYED,
    KeyedToDetection,
    KeyedToFineTuning,
    KeyedToSegmentation,
    complete_recipe,
    parse_overrides,
    schema_of,
)
from xdino_launch.commands.pretraining import begun, begun_by, start_from, words

if TYPE_CHECKING:
    from xdino.runtime.stopping import StopSignal

Command = TypeVar("Command", bound=Callable[..., Any])
#: A configuration, the run's folder, what was typed, who listens to signals, the iteration to go
#: back to -> what it wrote.
Runner = Callable[[Any, str, list[str], "StopSignal", int | None], Path]

_OPTIONS = (
    click.argument("config", metavar="[CONFIG]", required=False, shell_complete=complete_recipe),
    click.option(
        "--run",
        "--run-dir",
        "run_dir",
        type=click.Path(),
        help="The run's folder. Under torchrun write --run-dir: it takes --run for an option of its own.",
    ),
    click.option(
        "--init",
        help="Weights to start from: a run, a file of ours, a published or timm one. Without: from "
        "scratch.",
    ),
    from_iteration_option(),
    click.option("--gpus", type=click.IntRange(1), help="Start a process for each of N GPUs here."),
    click.option("--processes", type=click.IntRange(1), help="Start N processes on this CPU."),
    click.option(
        "--print-config",
        is_flag=True,
        help="Print the resolved configuration, each key with what it means, and stop.",
    ),
)


def options(command: Command) -> Command:
    """The options of a command that learns with labels, see `Asked`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    config: str | None
    run_dir: str | None
    init: str | None
    from_iteration: int | None
    gpus: int | None
    processes: int | None
    print_config: bool


def learn(kind: str, ctx: click.Context, asked: Asked, runner: Callable[[], Runner]) -> None:
    """Begin or continue a run of this kind here, or in as many processes as asked for.

    Args:
        runner: imports what takes seconds, and gives what runs.
    """
    from xdino.runtime.stopping import StopSignal

    config, run_dir, gpus, processes = asked.config, asked.run_dir, asked.gpus, asked.processes
    with StopSignal(last=ctx.obj is True) as stop:  # before the imports, which take seconds
        if config is not None and config.startswith("--"):  # a key: there is no recipe
            ctx.args.insert(0, config)
            config = None
        overrides = parse_overrides(ctx.args, kind)
        if config is not None and run_dir is None and not asked.print_config:
            raise UsageError("Missing option '--run': the folder of a new run, or one to continue")
        if config is None:
            config = begun(run_dir, kind)
            if gpus is processes is None:
                gpus, processes = begun_by(Path(str(run_dir)), kind)
        start_from({"init": asked.init}, overrides)
        if gpus is not None or processes is not None:
            overrides.setdefault("runtime.device", "cpu" if gpus is None else "cuda")
        from xdino import config as configuration

        resolved: Any = configuration.load(config, overrides, schema_of(kind))
        if asked.print_config:
            remarks = configuration.comments(config)
            kept = {key: remark for key, remark in remarks.items() if key not in overrides}
            click.echo(configuration.commented(resolved, kept), nl=False)
            return
        assert run_dir is not None
        from xdino.runtime import places

        places.check_data(resolved.data.path)
        if resolved.train.init and not Path(run_dir, "config.yaml").exists():
            places.check_weights(resolved.train.init)
        with stop.abandoning("before it began"):
            from xdino_launch import processes as launcher
        count = launcher.count(gpus, processes)
        if count == 1:
            with stop.abandoning("before it began"):
                run = runner()
            path = run(resolved, run_dir, sys.argv[1:], stop, asked.from_iteration)
            if os.environ.get("RANK", "0") == "0":
                click.echo(str(path))
            return
    told = words({"--from-iteration": asked.from_iteration}, overrides)
    sys.exit(launcher.launch(count, [kind, config, "--run-dir", run_dir, *told]))


@click.command(cls=KeyedToFineTuning, context_settings=KEYED)
@options
@click.pass_context
def finetune(ctx: click.Context, **asked: Any) -> None:
    """Train a classifier on labelled images, from weights or from scratch; continue the run in --run.

    CONFIG is a recipe's name or a YAML file: finetune finetune_small --data.path FOLDER --init
    runs/mine --run runs/mine-classes. Of a run that was begun, `finetune --run RUN` is enough.
    """

    def runner() -> Runner:
        from xdino_launch.local import run_finetuning

        return run_finetuning

    learn("finetune", ctx, Asked(**asked), runner)


@click.command(cls=KeyedToSegmentation, context_settings=KEYED)
@options
@click.pass_context
def segment(ctx: click.Context, **asked: Any) -> None:
    """Learn a class for every pixel from pictures with masks; continue the run in --run.

    CONFIG is a recipe's name or a YAML file: segment segment_small --data.path FOLDER --init
    runs/mine --run runs/mine-masks. With --model.frozen true a linear map on the frozen features
    learns. Of a run that was begun, `segment --run RUN` is enough.
    """

    def runner() -> Runner:
        from xdino_launch.local import run_segmentation

        return run_segmentation

    learn("segment", ctx, Asked(**asked), runner)


@click.command(cls=KeyedToDetection, context_settings=KEYED)
@options
@click.pass_context
def detect(ctx: click.Context, **asked: Any) -> None:
    """Learn boxes and masks of objects from annotated images; continue the run in --run.

    CONFIG is a recipe's name or a YAML file: detect detect_small --data.path FOLDER --init
    runs/mine --run runs/mine-objects. FOLDER is of COCO's or Pascal VOC's layout, or has
    _annotations.coco.json beside its images. Of a run that was begun, `detect --run RUN` is enough.
    """

    def runner() -> Runner:
        from xdino_launch.local import run_detection

        return run_detection

    learn("detect", ctx, Asked(**asked), runner)
