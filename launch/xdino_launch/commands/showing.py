"""`xdino report` and `xdino demo`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from xdino.runtime import places
from xdino_launch.commands.options import SEED, Place


@click.command()
@click.argument("run_dir", metavar="RUN", type=Place(Path))
@click.argument("other", metavar="[RUN2]", required=False, type=Place(Path))
@click.option("--out", type=Place(Path, file=True), help="File; default: report.html in RUN.")
@click.option(
    "--beside",
    "compared",
    multiple=True,
    type=Place(Path),
    metavar="RUN3",
    help="A fine-tuned run whose scores stand beside RUN's: did pretraining pay? Several times.",
)
def report(run_dir: Path, other: Path | None, out: Path | None, compared: tuple[Path, ...]) -> None:
    """Write a run, or two side by side, as one HTML file that needs nothing else."""
    places.check_files("run folder", run_dir, other, *compared)
    from xdino_launch.report.page import write_report

    runs = [run_dir, other] if other else [run_dir]
    click.echo(str(write_report(runs, out, compared=compared)))


@click.command()
@click.option("--run", "run_dir", default="runs/demo", show_default=True, type=Place())
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def demo(run_dir: str, seed: int, as_json: bool) -> None:
    """Pretrain a small XCiT on shipped images, score it, draw its attention (minutes, no GPU)."""
    from xdino_launch.demo import run_demo

    rows = run_demo(Path(run_dir), seed)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
