"""`xdino export`."""

from pathlib import Path

import click

from xdino_launch.commands.options import Place, WeightsOptions, on_one_process, takes


@click.command()
@takes(judged=WeightsOptions)
@click.option(
    "--out", required=True, type=Place(Path, file=True), help="FILE.safetensors, or FILE.onnx"
)
@click.option(
    "--format",
    "format",
    default="published",
    show_default=True,
    type=click.Choice(["published", "timm", "onnx"]),
)
@on_one_process
def export(judged: WeightsOptions, out: Path, format: str) -> None:
    """Write a backbone for others to use.

    As safetensors under the published parameter names or timm's, or as an ONNX graph (needs
    xdino[onnx]) that takes any batch, and for an XCiT any image size.
    """
    judged.there()
    from xdino_launch.console import stderr_console
    from xdino_launch.export.backbone import export_backbone

    console = stderr_console()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    weights, arch, role = judged.weights, judged.arch, judged.role
    click.echo(str(export_backbone(weights, out, format, arch, role, say)))
