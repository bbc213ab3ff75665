"""`xdino export`."""

from pathlib import Path

import click

from xdino.errors import UsageError
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
@click.option(
    "--head/--no-head",
    "head",
    default=None,
    help="A classifier with its head, or its backbone alone.  [with it, where a file of ours has one]",
)
@on_one_process
def export(judged: WeightsOptions, out: Path, format: str | None, head: bool | None) -> None:
    """Write a backbone, or a classifier, for others to use.

    As safetensors under the published parameter names or timm's; as an ONNX graph (needs
    xdino[onnx]) that takes any batch, and for an XCiT any image size; or with --format hf as a
    folder that timm (local-dir:FOLDER), transformers (TimmWrapperModel) and xdino load. Of a
    fine-tuned run, and with --head of published XCiT and timm classifiers, class names and head go
    with it.
    """
    judged.there()
    if head and judged.role != "teacher":
        raise UsageError("--role is of a backbone's two networks, and a classifier has one")
    from xdino_launch.console import stderr_console
    from xdino_launch.export.backbone import export_backbone
    from xdino_launch.export.classifier import export_classifier
    from xdino_transfer.classification.files import holds_classifier

    console = stderr_console()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    weights, arch, role = judged.weights, judged.arch, judged.role
    if head or (head is None and role == "teacher" and holds_classifier(weights)):
        click.echo(str(export_classifier(weights, out, format, arch, say)))
        return
    click.echo(str(export_backbone(weights, out, format, arch, role, say)))
