"""`xdino export`."""

from pathlib import Path

import click


@click.command()
@click.argument("weights")
@click.option("--out", required=True, type=click.Path(), help="FILE.safetensors")
@click.option("--format", "names", default="published", type=click.Choice(["published", "timm"]))
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
def export(weights: str, out: str, names: str, arch: str | None, role: str) -> None:
    """Write a backbone as safetensors, under the published parameter names or timm's."""
    from xdino_launch.evaluate import export_backbone

    click.echo(str(export_backbone(weights, Path(out), names, arch, role)))
