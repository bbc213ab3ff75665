"""`xdino pretrain` and `xdino submit`."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import Number, Whole

HOURS = Number(1 / 60, 24 * 365)  # SLURM counts minutes, and 0 of them is no limit


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """["--optim.lr", "1e-3", "--train.epochs=10"] -> {"optim.lr": "1e-3", "train.epochs": "10"}."""
    from xdino import config
    from xdino.values import shown

    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or "." not in key:
            leaves = {known.split(".")[1]: known for known in config.dotted_keys()}
            name = leaves.get(key.replace("-", "_"))
            hint = "name the recipe first; overrides are --section.key value"
            if name:
                hint = f'did you mean "--{name}"?'
            raise UsageError(f'"{option}" is not an option of pretrain: {hint}')
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        key = config.spelt(key)
        if key in overrides:
            raise UsageError(
                f"--{key} is given twice, with {shown(overrides[key])} and {shown(value)}"
            )
        overrides[key] = value
    return overrides


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Every key of the configuration is an option: --optim.lr 1e-3 --data.path FOLDER ...",
)
@click.argument("config")
@click.option(
    "--run",
    "--run-dir",
    "run_dir",
    required=True,
    type=click.Path(),
    help="The run's folder. Under torchrun write --run-dir: it takes --run for an option of its own.",
)
@click.option("--init", help="Weights to start from (a new run; continuing needs nothing).")
@click.option("--gpus", type=click.IntRange(1), help="Start a process for each of N GPUs here.")
@click.option("--processes", type=click.IntRange(1), help="Start N processes on this CPU.")
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
@click.pass_context
def pretrain(
    ctx: click.Context,
    config: str,
    run_dir: str,
    init: str | None,
    gpus: int | None,
    processes: int | None,
    print_config: bool,
) -> None:
    """Pretrain by a recipe's name or a YAML file; continue the run that RUN holds.

    --gpus N starts N processes by torch's own launcher. Several machines: torchrun ... -m
    xdino_launch pretrain CONFIG --run-dir DIR, or submit.
    """
    from xdino.runtime.stopping import StopSignal

    with StopSignal(last=ctx.obj is True) as stop:  # before the imports, which take seconds
        from xdino import config as configuration
        from xdino.values import shown

        overrides = parse_overrides(ctx.args)
        if init is not None and overrides.setdefault("train.init", init) != init:
            given = shown(overrides["train.init"])
            raise UsageError(f"--init is {shown(init)}, but --train.init is {given}: give one")
        if gpus is not None or processes is not None:
            overrides.setdefault("runtime.device", "cpu" if gpus is None else "cuda")
        resolved = configuration.load(config, overrides)
        if print_config:
            click.echo(configuration.to_yaml(resolved), nl=False)
            return
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


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("config")
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

    Script, configuration and logs are in RUN-slurm/. Where there is no SLURM it refuses; --cluster
    local starts one process here instead.
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

        click.echo("no cluster: one process on this machine, in the foreground", err=True)
        click.echo(str(run_pretraining(resolved, run_dir, command=sys.argv[1:])))
        return
    job = queue.submit(resolved, run_dir, resources)
    click.echo(job)
    sys.stdout.flush()  # the number comes first, wherever both go
    click.echo(queue.how_to_go_on(job, run_dir, cluster=extra.get("clusters")), err=True)
