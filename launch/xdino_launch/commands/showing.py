"""`xdino report`, `xdino demo` and `xdino replay`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from xdino.runtime import places
from xdino_launch.commands.options import SEED, Place, known_device


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


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--iteration", type=click.IntRange(1), help="Default: the last in nonfinite.json.")
@click.option("--device", callback=known_device, help="Where, if not where the run was.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def replay(run_dir: Path, iteration: int | None, device: str | None, as_json: bool) -> None:
    """Make a step of RUN again and say where its numbers stop being finite; RUN stays as it is."""
    places.check_files("run folder", run_dir)
    from xdino_launch.replay import replay as again

    found = again(run_dir, iteration, device)
    if as_json:
        click.echo(json.dumps(found.plain(), indent=2))
        return
    lines = [f"iteration {found.iteration}, from the state of iteration {found.from_iteration}"]
    if found.processes > 1:
        lines.append(
            f"made by one process on the images of all {found.processes}: equal to the run's step "
            "but for rounding and dropped paths"
        )
    lines.append(found.what or f"every number of it is finite here; the loss is {found.loss:.6g}")
    if found.module is not None:
        m = found.module
        lines.append(
            f"first output that is not finite: {m['name']} ({m['kind']}) of the {m['network']}, "
            f"whose inputs are {m['inputs']}"
        )
    elif found.what:
        lines.append("every module's output is finite")
    if found.gradient is not None:
        lines.append(f"first gradient that is not finite: {found.gradient}")
    bad = [pair for pair in found.pairs if not pair["finite"]]
    lines.append(f"pairs of views whose loss is not finite: {len(bad)} of {len(found.pairs)}")
    lines += [f"  teacher {p['teacher']}, student {p['student']}: {p['loss']}" for p in bad]
    lines.append("images (process, index, name):")
    lines += [f"  {image['rank']}  {image['index']}  {image['image']}" for image in found.images]
    click.echo("\n".join(lines))
