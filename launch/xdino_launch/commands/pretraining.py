"""`xdino pretrain` and `xdino submit`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from xdino.errors import UsageError, asked
from xdino_launch.commands.options import Number, Whole
from xdino_launch.commands.overrides import KEYED, Keyed, complete_recipe, parse_overrides

HOURS = Number(1 / 60, 24 * 365)  # SLURM counts minutes, and 0 of them is no limit


@click.command(cls=Keyed, context_settings=KEYED)
@click.argument("config", metavar="[CONFIG]", required=False, shell_complete=complete_recipe)
@click.option(
    "--run",
    "--run-dir",
    "run_dir",
    type=click.Path(),
    help="The run's folder. Under torchrun write --run-dir: it takes --run for an option of its own.",
)
@click.option("--init", help="Weights to start from (a new run; continuing needs nothing).")
@click.option("--gpus", type=click.IntRange(1), help="Start a process for each of N GPUs here.")
@click.option("--processes", type=click.IntRange(1), help="Start N processes on this CPU.")
@click.option(
    "--print-config",
    is_flag=True,
    help="Print the resolved configuration, each key with what it means, and stop.",
)
@click.pass_context
def pretrain(
    ctx: click.Context,
    config: str | None,
    run_dir: str | None,
    init: str | None,
    gpus: int | None,
    processes: int | None,
    print_config: bool,
) -> None:
    """Pretrain by a recipe's name or a YAML file; continue the run that --run holds.

    Of a run that was begun, `pretrain --run RUN` is enough. `xdino recipes` lists the recipes.
    --gpus N starts N processes by torch's own launcher. Several machines: torchrun ... -m
    xdino_launch pretrain CONFIG --run-dir DIR, or submit.
    """
    from xdino.runtime.stopping import StopSignal

    with StopSignal(last=ctx.obj is True) as stop:  # before the imports, which take seconds
        from xdino import config as configuration
        from xdino.runtime import places
        from xdino.values import shown

        if config is not None and config.startswith("--"):  # a key: there is no recipe
            ctx.args.insert(0, config)
            config = None
        overrides = parse_overrides(ctx.args)
        if config is not None and run_dir is None and not print_config:
            raise UsageError("Missing option '--run': the folder of a new run, or one to continue")
        if config is None:
            config = _begun(run_dir)
            if gpus is None and processes is None:
                gpus, processes = _begun_by(Path(str(run_dir)))
        if init is not None and overrides.setdefault("train.init", init) != init:
            given = shown(overrides["train.init"])
            raise UsageError(f"--init is {shown(init)}, but --train.init is {given}: give one")
        if gpus is not None or processes is not None:
            overrides.setdefault("runtime.device", "cpu" if gpus is None else "cuda")
        resolved = configuration.load(config, overrides)
        if print_config:
            remarks = configuration.comments(config)
            kept = {key: remark for key, remark in remarks.items() if key not in overrides}
            click.echo(configuration.commented(resolved, kept), nl=False)
            return
        assert run_dir is not None
        places.check_data(resolved.data.path, resolved.evaluate.data)
        if resolved.train.init and not Path(run_dir, "config.yaml").exists():
            places.check_weights(resolved.train.init)
        with stop.abandoning("before it began"):
            from xdino_launch import processes as launcher
            from xdino_launch.local import run_pretraining
        count = launcher.count(gpus, processes)
        if count == 1:
            path = run_pretraining(resolved, run_dir, command=sys.argv[1:], stop=stop)
            if os.environ.get("RANK", "0") == "0":
                click.echo(str(path))
            return
    options = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    code = launcher.launch(count, ["pretrain", config, "--run-dir", run_dir, *options])
    sys.exit(code)


def _begun(run_dir: str | None) -> str:
    """The configuration of the run in a folder.

    Raises:
        UsageError: there is none.
    """
    from xdino import config

    if run_dir is None:
        raise UsageError(f"name a recipe: {', '.join(config.recipes())}, or a YAML file")
    file = Path(run_dir) / "config.yaml"
    with asked(f"--run {run_dir}"):
        if file.is_file():
            return str(file)
    raise UsageError(
        f"{run_dir} holds no run to continue: name a recipe first, one of "
        f"{', '.join(config.recipes())}, or a YAML file"
    )


def _begun_by(run: Path) -> tuple[int | None, int | None]:
    """--gpus and --processes as the run in a folder had them; none where they need not be given."""
    from xdino import config
    from xdino_launch.processes import LAUNCHED

    if any(os.environ.get(name, "1") != "1" for name in LAUNCHED):
        return None, None
    try:
        starts = json.loads((run / "environment.json").read_text(encoding="utf-8"))["starts"]
        count = int(starts[-1]["processes"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None, None
    if count < 2:
        return None, None
    on_cpu = config.load(str(run / "config.yaml")).runtime.device == "cpu"
    return (None, count) if on_cpu else (count, None)


@click.command(cls=Keyed, context_settings=KEYED)
@click.argument("config", shell_complete=complete_recipe)
@click.option("--run", "run_dir", required=True, type=click.Path(), help="The run's folder.")
@click.option("--nodes", default=1, show_default=True, type=Whole(1, 10_000))
@click.option("--gpus-per-node", default=8, show_default=True, type=Whole(0, 1024))
@click.option(
    "--tasks-per-node", type=Whole(1, 10_000), help="Processes, where there are no GPUs. [1]"
)
@click.option(
    "--cpus-per-gpu",
    "--cpus-per-task",
    "cpus_per_task",
    default=10,
    show_default=True,
    type=Whole(1, 10_000),
)
@click.option(
    "--hours",
    default=24.0,
    show_default=True,
    type=HOURS,
    help="Of one start; the job is queued again until the run is done.",
)
@click.option(
    "--warning",
    type=Whole(1, 1_000_000),
    help="Seconds before the end at which the run saves. [120, less for short times]",
)
@click.option(
    "--max-requeues",
    type=Whole(0, 1_000_000),
    help="Queue it again so often at most. [no bound]",
)
@click.option("--partition", help="SLURM partition.")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="More SLURM parameters.")
@click.option(
    "--cluster",
    type=click.Choice(["slurm", "local"]),
    default="slurm",
    show_default=True,
    help="local: here and now, as one process, to try it.",
)
@click.pass_context
def submit(
    ctx: click.Context,
    config: str,
    run_dir: str,
    hours: float,
    slurm: tuple[str, ...],
    cluster: str,
    **asked: Any,
) -> None:
    """Pretrain on a SLURM cluster; goes on by itself when its time is up. Prints the job's number.

    Script, configuration and logs are in RUN-slurm/.
    """
    from xdino import config as configuration

    resolved = configuration.load(config, parse_overrides(ctx.args))
    extra = {key.replace("_", "-"): v for key, _, v in (pair.partition("=") for pair in slurm)}
    if not all(extra.values()):
        raise UsageError(f"--slurm takes KEY=VALUE, got {' '.join(slurm)}")
    from xdino_launch import slurm as queue

    resources = queue.Resources(minutes=queue.whole_minutes(hours), extra=extra, **asked)
    if cluster == "local":
        from xdino_launch.local import run_pretraining

        click.echo(str(run_pretraining(resolved, run_dir, command=sys.argv[1:])))
        return
    click.echo(queue.submit(resolved, run_dir, resources))
