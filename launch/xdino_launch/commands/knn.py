"""`xdino knn`."""

from typing import Any

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import (
    evaluation_options,
    finish,
    numbers,
    subject_options,
)


@click.command()
@evaluation_options
@click.option("--k", "ks", default="10,20,100,200", show_default=True, help="Neighbours.")
@click.option("--temperature", default=0.07, show_default=True, type=float)
def knn(ks: str, temperature: float, **options: Any) -> None:
    """Weighted k-NN of the frozen features: train/ votes on val/."""
    parsed = numbers(ks, "k", int)
    if not parsed or min(parsed) < 1:
        raise UsageError(f"--k takes numbers of neighbours from 1 up, got {ks}")
    if temperature <= 0:
        raise UsageError(f"--temperature must be above 0, got {temperature}")
    from xdino_eval import knn as rooms
    from xdino_launch.evaluate import Subject

    subject = Subject.open(**subject_options(options))
    train, val = subject.features()
    rows = subject.sign(rooms.evaluate(train, val, parsed, temperature))
    finish(rows, options["weights"], options["out"], options["as_json"])
