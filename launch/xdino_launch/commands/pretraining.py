"""`xdino pretrain` and `xdino submit`."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino.errors import UsageError, asked
from xdino_launch.commands.options import Number, Whole, from_iteration_option
from xdino_launch.commands.overrides import (
    KEYED,
    Keyed,
    complete_recipe,
    parse_overrides,
    schema_of,
)

if TYPE_CHECKING:
    from xdino.config import Config
    from xdino.runtime.stopping import StopSignal

AUTO = "auto"  # instead of a recipe
MINUTES = Number(0.1, 60 * 24 * 366)
SHARED = ("knn", "linear", "score")  # commands whose work several tasks share
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
@click.option(
    "--continue-from",
    metavar="FILE",
    help="A full checkpoint of the published trainer, to go on with in a new run: both networks, "
    "heads, centre, optimiser, epoch.",
)
@click.option(
    "--extend",
    type=Whole(),
    metavar="N",
    help="N further epochs behind a finished run's; while these are unfinished, continues them.",
)
@from_iteration_option()
@click.option("--gpus", type=click.IntRange(1), help="Start a process for each of N GPUs here.")
@click.option("--processes", type=click.IntRange(1), help="Start N processes on this CPU.")
@click.option(
    "--print-config",
    is_flag=True,
    help="Print the resolved configuration, each key with what it means, and stop.",
)
@click.option("--minutes", type=MINUTES, help="With CONFIG auto: how long all of it may take.")
@click.option("--epochs", type=Whole(1), help="With CONFIG auto: instead of minutes.")
@click.option(
    "--profile", type=Whole(1, 1_000), metavar="N", help="A trace of N steps: RUN/profile.json.gz."
)
@click.pass_context
def pretrain(
    ctx: click.Context,
    config: str | None,
    run_dir: str | None,
    init: str | None,
    continue_from: str | None,
    extend: int | None,
    from_iteration: int | None,
    gpus: int | None,
    processes: int | None,
    print_config: bool,
    minutes: float | None,
    epochs: int | None,
    profile: int | None,
) -> None:
    """Pretrain by a recipe's name or a YAML file; continue the run that --run holds.

    Of a run that was begun, `pretrain --run RUN` is enough. `xdino recipes` lists the recipes. CONFIG
    auto makes one from a look at the images, at the machine and at some timed steps, for --minutes or
    --epochs, and tells the reasons: pretrain auto --data.path FOLDER --minutes 30 --run RUN.
    --gpus N starts N processes. Several machines: torchrun ... --run-dir DIR, or submit.
    """
    began = time.monotonic()
    from xdino.runtime.stopping import StopSignal

    with StopSignal(last=ctx.obj is True) as stop:  # before the imports, which take seconds
        if config is not None and config.startswith("--"):  # a key: there is no recipe
            ctx.args.insert(0, config)
            config = None
        overrides = parse_overrides(ctx.args)
        if config is not None and run_dir is None and not print_config:
            raise UsageError("Missing option '--run': the folder of a new run, or one to continue")
        if config is None:
            config = begun(run_dir)
            if gpus is processes is None:
                gpus, processes = begun_by(Path(str(run_dir)))
        start_from({"init": init, "continue_from": continue_from}, overrides)
        if gpus is not None or processes is not None:
            overrides.setdefault("runtime.device", "cpu" if gpus is None else "cuda")
        length = {"--minutes": minutes, "--epochs": epochs}
        if config == AUTO:
            _not_with_auto(extend, profile, from_iteration)
            show, train = _by_choices(overrides, run_dir, length, stop, began)
        else:
            more = {"extend": extend, "from_iteration": from_iteration, "profile": profile or 0}
            show, train = _by_recipe(config, overrides, run_dir, {**length}, more, stop)
        if print_config:
            click.echo(show(), nl=False)
            return
        assert run_dir is not None
        with stop.abandoning("before it began"):
            from xdino_launch import processes as launcher
        count = launcher.count(gpus, processes)
        if count == 1:
            path = train()
            return click.echo(str(path)) if os.environ.get("RANK", "0") == "0" else None
    told = {**length, "--extend": extend, "--from-iteration": from_iteration, "--profile": profile}
    command = ["pretrain", config, "--run-dir", run_dir, *words(told, overrides)]
    sys.exit(launcher.launch(count, command))


def _not_with_auto(extend: int | None, profile: int | None, back: int | None) -> None:
    """Raises UsageError over options that go with a recipe only."""
    if back is not None:
        raise UsageError(
            f"auto begins a run: pretrain --run RUN --from-iteration {back} goes back in one"
        )
    if extend is not None:
        raise UsageError(f"auto begins a run: pretrain --run RUN --extend {extend} extends one")
    if profile is not None:
        raise UsageError("--profile is for a recipe, or for a run that was begun")


def words(options: Mapping[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """Options that are set, and keys, as a command line has them."""
    given = {option: str(value) for option, value in options.items() if value is not None}
    given |= {f"--{key}": value for key, value in overrides.items()}
    return [word for pair in given.items() for word in pair]


def start_from(given: Mapping[str, str | None], overrides: dict[str, str]) -> None:
    """--init and --continue-from are the keys of those names."""
    from xdino.values import shown

    for option, value in given.items():
        key = f"train.{option}"
        if value is not None and overrides.setdefault(key, value) != value:
            short, other = option.replace("_", "-"), shown(overrides[key])
            raise UsageError(f"--{short} is {shown(value)}, but --{key} is {other}: give one")


def begun(run_dir: str | None, kind: str = "pretrain") -> str:
    """The configuration of the run in a folder; `kind`: of which recipes there are others.

    Raises:
        UsageError: there is none.
    """
    from xdino import config

    if run_dir is None:
        raise UsageError(f"name a recipe: {', '.join(config.recipes(kind))}, or a YAML file")
    file = Path(run_dir) / "config.yaml"
    with asked(f"--run {run_dir}"):
        if file.is_file():
            whose = config.kind_of(file)
            if whose not in (None, kind):
                command = shlex.join(["xdino", str(whose), "--run", run_dir])
                raise UsageError(f"{run_dir} holds a run of xdino {whose}: {command}")
            return str(file)
    raise UsageError(
        f"{run_dir} holds no run to continue: name a recipe first, one of "
        f"{', '.join(config.recipes(kind))}, or a YAML file"
    )


def begun_by(run: Path, kind: str = "pretrain") -> tuple[int | None, int | None]:
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
    whole = config.load(str(run / "config.yaml"), None, schema_of(kind))
    on_cpu = whole.runtime.device == "cpu"
    return (None, count) if on_cpu else (count, None)


#: What prints the configuration, and what pretrains by it.
Ways = tuple[Callable[[], str], Callable[[], Path]]


def _by_recipe(
    config: str,
    overrides: Mapping[str, str],
    run_dir: str | None,
    length: Mapping[str, float | None],
    more: Mapping[str, Any],
    stop: "StopSignal",
) -> Ways:
    from xdino import config as configuration
    from xdino.runtime import places

    for option, value in length.items():
        if value is not None and option == "--epochs":
            raise UsageError(
                f'"{option}" is not an option of pretrain: did you mean "--train.epochs"?'
            )
        if value is not None:
            raise UsageError(f"{option} is for pretrain auto; {config} says its own length")
    resolved = configuration.load(config, overrides)

    def show() -> str:
        remarks = configuration.comments(config)
        kept = {key: remark for key, remark in remarks.items() if key not in overrides}
        return configuration.commented(resolved, kept)

    def train() -> Path:
        assert run_dir is not None
        places.check_data(resolved.data.path, resolved.evaluate.data)
        if resolved.train.init and not Path(run_dir, "config.yaml").exists():
            places.check_weights(resolved.train.init)
        with stop.abandoning("before it began"):
            from xdino_launch.local import run_pretraining
        return run_pretraining(resolved, run_dir, command=sys.argv[1:], stop=stop, **more)

    return show, train


def _by_choices(
    given: Mapping[str, str],
    run_dir: str | None,
    length: Mapping[str, Any],
    stop: "StopSignal",
    began: float,
) -> Ways:
    with stop.abandoning("before it began"):
        from xdino_launch import automatic
    wanted = automatic.Asked(length["--minutes"], length["--epochs"], given)

    def train() -> Path:
        assert run_dir is not None
        return automatic.pretrain_auto(wanted, run_dir, sys.argv[1:], stop, began)

    return lambda: automatic.recipe_text(wanted, run_dir, stop), train


@click.command(cls=Keyed, context_settings=KEYED)
@click.argument("config", shell_complete=complete_recipe)
@click.option("--run", "run_dir", required=True, type=click.Path(), help="The run's folder.")
@click.option("--nodes", default=1, show_default=True, type=Whole(1, 10_000))
@click.option("--gpus-per-node", type=Whole(0, 1024), help="[8; 1 for a command]")
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
    "--signal-delay",
    type=Whole(1, 1_000_000),
    help="Seconds before the end at which the run saves. [120, less for short times]",
)
@click.option(
    "--max-requeues",
    type=Whole(0, 1_000_000),
    help="Queue it again so often at most. [no bound; 0 for a command]",
)
@click.option(
    "--seeds", metavar="0-4", help="One run for each, in RUN/seed0, RUN/seed1, ...: a job array."
)
@click.option(
    "--setup",
    multiple=True,
    metavar="LINE",
    help="A line of shell for the job to begin with, 'module load cuda'; again for more.",
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
    seeds: str | None,
    slurm: tuple[str, ...],
    cluster: str,
    **asked: Any,
) -> None:
    """Train by a recipe on a SLURM cluster; goes on by itself when its time is up.

    Prints the job's number. Script, configuration and logs are in RUN-slurm/. Where there is no SLURM
    it refuses; --cluster local starts one process here instead.

    Another command goes behind two dashes, one task unless it shares its work (knn, linear, score):
    xdino submit --run RUN --hours 2 -- knn RUN --data DATA
    """
    from xdino_launch import slurm as queue

    extra = {key.replace("_", "-"): v for key, _, v in (pair.partition("=") for pair in slurm)}
    if not all(extra.values()):
        raise UsageError(f"--slurm takes KEY=VALUE, got {' '.join(slurm)}")
    other = _another_command(ctx, config)
    if asked["gpus_per_node"] is None:
        asked["gpus_per_node"] = 1 if other else 8
    goes_on = other is not None and any("--run" in each.opts for each in other.params)
    learns = isinstance(other, Keyed)
    if learns:
        _check_learning(str(config), ctx.args)
    if other and asked["max_requeues"] is None and not goes_on:
        asked["max_requeues"] = 0  # it begins anew each time
    resources = queue.Resources(minutes=queue.whole_minutes(hours), extra=extra, **asked)
    several = queue.parse_seeds(seeds) if seeds is not None else ()
    if other:
        if several or cluster == "local":
            raise UsageError(f"--seeds and --cluster local are for pretraining, not for {config}")
        if resources.tasks > 1 and not learns and config not in SHARED:
            raise UsageError(f"{config} is one process: --nodes 1 and --gpus-per-node 0 or 1")
        job = queue.submit_command([config, *ctx.args], run_dir, resources)
    else:
        from xdino import config as configuration

        kind = configuration.kind_of(configuration.file_of(config)) or "pretrain"
        overrides = parse_overrides(ctx.args, kind)
        resolved: Any = configuration.load(config, overrides, schema_of(kind))
        if cluster == "local" and kind != "pretrain":
            raise UsageError(f"--cluster local is for pretraining: xdino {kind} runs it here")
        if cluster == "local":
            return _here(resolved, run_dir, several)
        job = queue.submit(resolved, run_dir, resources, several)
    click.echo(job)
    sys.stdout.flush()  # the number comes first, wherever both go
    told = queue.how_to_go_on(job, run_dir, extra.get("clusters"), array=bool(several))
    click.echo(told, err=True)


def _another_command(ctx: click.Context, name: str) -> click.Command | None:
    """The command that `name` is, with the words behind it, instead of a recipe; None if it is none.

    Raises:
        click.UsageError: the command would refuse its words.
    """
    group = ctx.find_root().command
    if not isinstance(group, click.Group) or name not in group.commands or Path(name).is_file():
        return None
    if name in (ctx.info_name, "pretrain"):
        raise UsageError(f"{name} RECIPE is submitted as `xdino submit RECIPE --run RUN`")
    group.commands[name].make_context(name, list(ctx.args), parent=ctx.parent)
    return group.commands[name]


def _check_learning(kind: str, words: Sequence[str]) -> None:
    """Raises UsageError where `xdino KIND WORDS` could not begin, whatever the images are."""
    from xdino import config as configuration

    command: Any = click.get_current_context().find_root().command
    context = command.commands[kind].make_context(kind, list(words))
    recipe, run_dir, rest = context.params["config"], context.params["run_dir"], context.args
    if run_dir is None:
        raise UsageError(f"{kind} needs a --run of its own, behind the dashes")
    if recipe is None or recipe.startswith("--"):
        rest = [*([] if recipe is None else [recipe]), *rest]
        recipe = begun(run_dir, kind)
    configuration.load(recipe, parse_overrides(rest, kind), schema_of(kind))


def _here(resolved: "Config", run_dir: str, seeds: Sequence[int]) -> None:
    from xdino_launch.local import run_pretraining

    if seeds:
        raise UsageError("--seeds is a job array; without a cluster, start a run for each seed")
    click.echo("no cluster: one process on this machine, in the foreground", err=True)
    click.echo(str(run_pretraining(resolved, run_dir, command=sys.argv[1:])))
