"""`xdino export`."""

from pathlib import Path

import click

from xdino_launch.commands.options import Place, WeightsOptions, on_one_process, takes


@click.command()
@takes(judged=WeightsOptions)
@click.option(
    "--out", required=True, type=Place(Path), help="FILE.safetensors, FILE.onnx, or a folder."
)
@click.option(
    "--format",
    "format",
    type=click.Choice(["published", "timm", "onnx", "hf"]),
    help="[what --out ends in: published in .safetensors, onnx in .onnx]",
)
@on_one_process
def export(judged: WeightsOptions, out: Path, format: str | None) -> None:
    """Write a backbone for others to use.

    As safetensors under the published parameter names or timm's; as an ONNX graph (needs
    xdino[onnx]) that takes any batch, and for an XCiT any image size; or with --format hf as a
    folder that timm (local-dir:FOLDER), transformers (TimmWrapperModel) and xdino load.
    """
    judged.there()
    from xdino_launch.console import stderr_console
    from xdino_launch.export.backbone import export_backbone

    console = stderr_console()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    weights, arch, role = judged.weights, judged.arch, judged.role
    click.echo(str(export_backbone(weights, out, format, arch, role, say)))
