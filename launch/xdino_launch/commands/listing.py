"""`xdino recipes` and `xdino runs`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from xdino_launch.commands.options import Place
from xdino_launch.commands.overrides import complete_recipe, schema_of


@click.command()
@click.argument("name", metavar="[NAME]", required=False, shell_complete=complete_recipe)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes of all that learns; with NAME, print that one as it is.

    `xdino recipes NAME > mine.yaml` is a start for a recipe of your own: `pretrain mine.yaml`.
    """
    from xdino import config

    if name is not None:
        file = config.file_of(name)
        kind = config.kind_of(file) or config.Config.kind
        config.load(name, None, schema_of(kind))  # no other file is printed
        click.echo(file.read_text(encoding="utf-8-sig"), nl=False)
        return
    heads = {found: config.head(found) for found in config.recipes(None)}
    if as_json:
        click.echo(json.dumps(heads, indent=2))
        return
    formatter = click.HelpFormatter(max_width=80)
    for found, head in heads.items():
        with formatter.section(found):
            formatter.write_text(head["about"])
            formatter.write_dl([(key, head[key]) for key in config.HEAD if key in head])
    click.echo(formatter.getvalue().strip())


@click.command()
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=Place(Path))
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def runs(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the runs in FOLDER (default: runs), how far each is, and its best scores.

    A FOLDER may be a run itself, or hold runs up to three folders deep.
    """
    from xdino_launch.runs import describe, find, table

    found = [describe(path) for path in find(folders or (Path("runs"),))]
    if as_json:
        click.echo(json.dumps([asdict(run) for run in found], indent=2))
        return
    click.echo(table(found))
