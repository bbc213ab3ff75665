"""`xdino pretrain` and `xdino submit`."""

import sys
from collections.abc import Sequence
from pathlib import Path
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
@click.option("--run", "run_dir", required=True, type=click.Path(), help="The run's folder.")
@click.option("--init", help="Weights to start from (a new run; continuing needs nothing).")
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
@click.pass_context
def pretrain(
    ctx: click.Context, config: str, run_dir: str, init: str | None, print_config: bool
) -> None:
    """Pretrain by a recipe's name or a YAML file; continue the run that RUN holds.

    Under a launcher the processes find each other: torchrun --nproc-per-node 8 -m xdino_launch
    pretrain CONFIG --run DIR.
    """
    from xdino import config as configuration

    overrides = parse_overrides(ctx.args)
    if init is not None:
        overrides["train.init"] = init
    resolved = configuration.load(config, overrides)
    if print_config:
        click.echo(configuration.to_yaml(resolved), nl=False)
        return
    from xdino_launch.local import run_pretraining

    path = run_pretraining(resolved, run_dir, command=sys.argv[1:])
    click.echo(str(path))


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("config")
@click.option("--run", "run_dir", required=True, type=click.Path(), help="The run's folder.")
@click.option("--nodes", default=1, show_default=True, type=Whole(1, 10_000))
@click.option("--gpus-per-node", default=8, show_default=True, type=Whole(0, 1024))
@click.option("--cpus-per-gpu", default=10, show_default=True, type=Whole(1, 10_000))
@click.option("--hours", default=24.0, show_default=True, type=HOURS)
@click.option("--partition", help="SLURM partition.")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="More SLURM parameters.")
@click.option("--cluster", type=click.Choice(["slurm", "local"]), help="local: here, to try it.")
@click.pass_context
def submit(
    ctx: click.Context, config: str, run_dir: str, slurm: tuple[str, ...], **how: Any
) -> None:
    """Pretrain on a SLURM cluster; goes on by itself when its time is up."""
    overrides = parse_overrides(ctx.args)
    extra = dict(pair.partition("=")[::2] for pair in slurm)
    if not all(extra.values()):
        raise UsageError(f"--slurm takes KEY=VALUE, got {' '.join(slurm)}")
    from xdino_launch import slurm as cluster

    job = cluster.PretrainingJob(config, overrides, str(Path(run_dir).resolve()))
    click.echo(cluster.submit(job, **how, extra=extra).job_id)
