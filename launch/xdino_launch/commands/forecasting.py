"""`xdino look` and `xdino plan`: what lies there, and what a run will take, before it starts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import Number, Place, Whole
from xdino_launch.commands.pretraining import parse_overrides

if TYPE_CHECKING:
    from xdino.config import Config
    from xdino.data import Source
    from xdino.forecast.machines import Machine
    from xdino.forecast.outlook import Trial

MINUTES = Number(0.1, 60 * 24 * 366)
IMAGENET = 1_281_167  # images to train on


@click.command()
@click.argument("data", type=Place())
@click.option(
    "--minutes", default=60.0, show_default=True, type=MINUTES, help="That a run may take."
)
@click.option("--out", type=Place(Path, file=True), help="Write the recipe here. [standard output]")
@click.option("--all", "everything", is_flag=True, help="Decode every image, not a sample.")
@click.option("--survey-only", is_flag=True, help="The images alone: nothing is tried.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def look(
    data: str,
    minutes: float,
    out: Path | None,
    everything: bool,
    survey_only: bool,
    as_json: bool,
) -> None:
    """Look at DATA: what it holds, what this machine can train on it, and a recipe for that.

    Counts are exact; sizes, colours and damage are looked at in a sample, unless --all. Then a few
    steps of up to three networks are trained, timed and forgotten.
    """
    if out is not None and out.exists():
        raise UsageError(f"{out} is there already: name another file, or remove it")
    from xdino.forecast.machines import cores_here, machine_of
    from xdino.forecast.survey import survey
    from xdino_launch.console import stderr_console
    from xdino_launch.forecasting import tables

    found = survey(data, everything)
    report: dict[str, Any] = {"survey": asdict(found)}
    if not as_json:
        click.echo(tables.facts(tables.survey_lines(found)))
    if not survey_only:
        machine, _ = machine_of("auto")
        if not as_json:
            click.echo("\n" + tables.facts([("here", tables.machine_line(machine, cores_here()))]))
        note = stderr_console().print
        from xdino_launch.forecasting import candidates as trying

        made = trying.candidates(found, data, minutes, machine, note)
        chosen = trying.preferred(made)
        name = str(out) if out is not None else "recipe.yaml"
        recipe = trying.recipe_text(found, chosen, name)
        if out is not None:
            from xdino.runtime.atomic import write_text

            write_text(out, recipe)
        report |= {
            "minutes": minutes,
            "candidates": [asdict(each) for each in made],
            "chosen": made.index(chosen),
            "recipe": recipe,
        }
        if not as_json:
            click.echo("\n" + tables.candidate_table(made, chosen, minutes))
            click.echo("\n" + tables.chosen_lines(chosen, minutes, name))
            click.echo(f"\n{recipe}" if out is None else f"\nrecipe      {out}", nl=out is not None)
    if as_json:
        click.echo(json.dumps(report, indent=2))


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("config")
@click.option("--gpus", type=Whole(1, 100_000), help="In all. [1]")
@click.option("--nodes", default=1, show_default=True, type=Whole(1, 10_000), help="Machines.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="A GPU's name such as h100 or a100; cpu; auto: what this machine has.",
)
@click.option("--images", type=Whole(1, 2**40), help="Where the data are not here: how many.")
@click.option("--no-steps", is_flag=True, help="Count only; train no steps on this machine.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@click.pass_context
def plan(
    ctx: click.Context,
    config: str,
    gpus: int | None,
    nodes: int,
    device: str,
    images: int | None,
    no_steps: bool,
    as_json: bool,
) -> None:
    """Hours, memory, disk, network and loader cores of a run by CONFIG, and what is assumed.

    Operations and bytes are counted. On this machine some steps are trained and timed besides; of
    another device its figures are taken. Every key of the configuration is an option, as of pretrain.
    """
    from xdino import config as configuration
    from xdino.forecast.costs import Workload
    from xdino.forecast.loading import time_loading
    from xdino.forecast.machines import machine_of
    from xdino.forecast.outlook import outlook
    from xdino_launch.forecasting import tables

    resolved = configuration.load(config, parse_overrides(ctx.args))
    wanted = device if device != "auto" else resolved.runtime.device.partition(":")[0]
    machine, here = machine_of(wanted)
    processes = _processes(machine, gpus, nodes)
    source, count, channels, said = _images(resolved, config, images)
    precision = machine.precision(resolved.train.precision)
    work = Workload.of(resolved, count, channels, processes, precision)
    trial = None
    if here and source is not None and not no_steps and processes == 1:
        trial = _tried(work, machine)
    loading = time_loading(source, work.crops)
    seen = outlook(work, machine, nodes, trial, loading)
    sentences = [*said, *seen.assumptions]
    if as_json:
        more = {"images_per_second": seen.images_per_second, "disk_bytes": seen.disk_bytes}
        click.echo(json.dumps({**asdict(seen), **more, "assumptions": sentences}, indent=2))
        return
    click.echo(tables.facts(tables.outlook_lines(seen, resolved.model.arch)))
    if tight := tables.too_large(seen, work):
        click.echo("\n" + tight)
    click.echo("\nassumed:\n" + tables.assumptions(sentences))


def _processes(machine: "Machine", gpus: int | None, nodes: int) -> int:
    """Raises UsageError where GPUs and machines do not go together."""
    if machine.is_cpu and (gpus not in (None, 1) or nodes > 1):
        raise UsageError(
            "--gpus and --nodes count GPUs and their machines, and the device is the CPU: name "
            "the GPUs, --device h100"
        )
    count = gpus or nodes
    if count % nodes:
        raise UsageError(f"{count} GPUs cannot be shared out over {nodes} machines evenly")
    return count


def _images(
    config: "Config", name: str, images: int | None
) -> "tuple[Source | None, int, int, list[str]]":
    """The data where they are here, how many images, their channels, and what was taken for granted.

    Raises:
        UsageError: nobody says how many.
    """
    from xdino import data

    path, channels = config.data.path, config.channels
    assumed = channels or len(config.crops.mean or (0, 0, 0))
    if path and images is None:
        source = data.open_source(path, "train", channels, max_pixels=config.data.max_pixels)
        return source, len(source), source.channels, []
    if images is not None:
        return None, images, assumed, [f"{images:,} images, as --images says"]
    if name.startswith("imagenet"):
        said = f"{IMAGENET:,} images, ImageNet-1k's, for data.path is not set"
        return None, IMAGENET, assumed, [said]
    raise UsageError(
        "data.path is not set: name the images with --data.path FOLDER, or their number with "
        "--images N"
    )


def _tried(work: Any, machine: "Machine") -> "Trial":
    from xdino_launch.console import stderr_console
    from xdino_launch.forecasting.trials import try_out

    stderr_console().print("a few steps are trained here, to be timed ...")
    return try_out(work, machine)
