"""`xdino finetune`."""

import os
import sys
from pathlib import Path

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import from_iteration_option
from xdino_launch.commands.overrides import (
    KEYED,
    KeyedToFineTuning,
    complete_recipe,
    parse_overrides,
)
from xdino_launch.commands.pretraining import begun, begun_by, start_from, words

KIND = "finetune"


@click.command(cls=KeyedToFineTuning, context_settings=KEYED)
@click.argument("config", metavar="[CONFIG]", required=False, shell_complete=complete_recipe)
@click.option(
    "--run",
    "--run-dir",
    "run_dir",
    type=click.Path(),
    help="The run's folder. Under torchrun write --run-dir: it takes --run for an option of its own.",
)
@click.option(
    "--init",
    help="Weights to start from: a run, a file of ours, a published or timm one. Without: from scratch.",
)
@from_iteration_option()
@click.option("--gpus", type=click.IntRange(1), help="Start a process for each of N GPUs here.")
@click.option("--processes", type=click.IntRange(1), help="Start N processes on this CPU.")
@click.option(
    "--print-config",
    is_flag=True,
    help="Print the resolved configuration, each key with what it means, and stop.",
)
@click.pass_context
def finetune(
    ctx: click.Context,
    config: str | None,
    run_dir: str | None,
    init: str | None,
    from_iteration: int | None,
    gpus: int | None,
    processes: int | None,
    print_config: bool,
) -> None:
    """Train a classifier on labelled images, from weights or from scratch; continue the run in --run.

    CONFIG is a recipe's name or a YAML file: finetune finetune_small --data.path FOLDER --init
    runs/mine --run runs/mine-classes. Of a run that was begun, `finetune --run RUN` is enough.
    """
    from xdino.runtime.stopping import StopSignal

    with StopSignal(last=ctx.obj is True) as stop:  # before the imports, which take seconds
        if config is not None and config.startswith("--"):  # a key: there is no recipe
            ctx.args.insert(0, config)
            config = None
        overrides = parse_overrides(ctx.args, KIND)
        if config is not None and run_dir is None and not print_config:
            raise UsageError("Missing option '--run': the folder of a new run, or one to continue")
        if config is None:
            config = begun(run_dir, KIND)
            if gpus is processes is None:
                gpus, processes = begun_by(Path(str(run_dir)), KIND)
        start_from({"init": init}, overrides)
        if gpus is not None or processes is not None:
            overrides.setdefault("runtime.device", "cpu" if gpus is None else "cuda")
        from xdino import config as configuration
        from xdino_transfer.finetuning.recipe import FineTuning

        resolved = configuration.load(config, overrides, FineTuning)
        if print_config:
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
                from xdino_launch.local import run_finetuning
            path = run_finetuning(resolved, run_dir, sys.argv[1:], stop, from_iteration)
            if os.environ.get("RANK", "0") == "0":
                click.echo(str(path))
            return
    told = words({"--from-iteration": from_iteration}, overrides)
    sys.exit(launcher.launch(count, [KIND, config, "--run-dir", run_dir, *told]))
