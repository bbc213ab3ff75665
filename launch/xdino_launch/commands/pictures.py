"""`xdino attention`."""

import click

from xdino.errors import UsageError


@click.command()
@click.argument("weights")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder for the pictures.")
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--size", type=click.IntRange(1), help="Shorter side in pixels.")
@click.option("--mass", default=0.6, show_default=True, type=float, help="Share held by the mask.")
def attention(
    weights: str, images: tuple[str, ...], out: str, arch: str | None, size: int | None, mass: float
) -> None:
    """Draw an XCiT's class attention on images: heads, mean, overlay, mask."""
    if not 0 < mass <= 1:
        raise UsageError(f"--mass must be above 0 and at most 1, got {mass}")
    from xdino_launch.evaluate import draw_attention

    for path in draw_attention(weights, images, out, arch, size, mass):
        click.echo(str(path))
