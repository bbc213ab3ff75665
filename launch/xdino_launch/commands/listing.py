"""`xdino recipes`."""

import json

import click

from xdino_launch.commands.overrides import complete_recipe


@click.command()
@click.argument("name", metavar="[NAME]", required=False, shell_complete=complete_recipe)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes that `pretrain` knows; with NAME, print that one as it is.

    `xdino recipes NAME > mine.yaml` is a start for a recipe of your own: `pretrain mine.yaml`.
    """
    from xdino import config

    if name is not None:
        file = config.file_of(name)
        config.load(name)  # no other file is printed
        click.echo(file.read_text(encoding="utf-8-sig"), nl=False)
        return
    heads = {found: config.head(found) for found in config.recipes()}
    if as_json:
        click.echo(json.dumps(heads, indent=2))
        return
    formatter = click.HelpFormatter(max_width=80)
    for found, head in heads.items():
        with formatter.section(found):
            formatter.write_text(head["about"])
            formatter.write_dl([(key, head[key]) for key in config.HEAD if key in head])
    click.echo(formatter.getvalue().strip())
