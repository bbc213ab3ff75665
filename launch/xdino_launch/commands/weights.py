"""`xdino export`."""

from pathlib import Path

import click

from xdino_launch.commands.options import Place, on_one_process


@click.command()
@click.argument("weights", type=Place())
@click.option("--out", required=True, type=Place(file=True), help="FILE.safetensors, or FILE.onnx")
@click.option(
    "--format",
    "format",
    default="published",
    show_default=True,
    type=click.Choice(["published", "timm", "onnx"]),
)
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
@on_one_process
def export(weights: str, out: str, format: str, arch: str | None, role: str) -> None:
    """Write a backbone for others to use.

    As safetensors under the published parameter names or timm's, or as an ONNX graph (needs
    xdino[onnx]) that takes any batch, and for an XCiT any image size.
    """
    from xdino_launch.console import stderr_console
    from xdino_launch.export.backbone import export_backbone

    console = stderr_console()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    click.echo(str(export_backbone(weights, Path(out), format, arch, role, say)))
