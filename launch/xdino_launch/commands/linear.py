"""`xdino linear`."""

import os
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from xdino.errors import UsageError
from xdino.runtime import places
from xdino_launch.commands.options import (
    ABOVE_0,
    SEED,
    Numbers,
    OutputOptions,
    Place,
    SubjectOptions,
    Whole,
    numbers,
    on_all_processes,
    takes,
)


@click.command()
@takes(judged=SubjectOptions, output=OutputOptions)
@click.option(
    "--protocol",
    default="logistic",
    show_default=True,
    type=click.Choice(["logistic", "sgd", "sgd-features", "grid", "grid-features"]),
    help="logistic: scikit-learn on features extracted once; sgd: the published protocol, augmented "
    "images every epoch; sgd-features: its optimiser on features extracted once; grid, "
    "grid-features: the same for many settings in one pass, a held-out tenth of train/ chooses.",
)
@click.option("--epochs", default=100, show_default=True, type=Whole(1, 100_000), help="Of SGD.")
@click.option("--lr", default=0.001, show_default=True, type=ABOVE_0, help="Of SGD, for batch 256.")
@click.option(
    "--lrs",
    type=Numbers(above=0),
    help="Grid: learning rates, for batch 256; 13 from 1e-5 to 0.1 by default.",
)
@click.option("--wds", type=Numbers(), help="Grid: weight decays; 0 by default.")
@click.option(
    "--features", type=Numbers(str), help="Grid: any of class,patches,both; class by default."
)
@click.option("--c", "cs", default="default", help="Logistic: default, dino (45), or values.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--save-head", type=Place(file=True), help="Keep the probe in this file.")
@click.option(
    "--apply",
    "probe",
    type=Place(),
    metavar="HEAD",
    help="Score with a saved probe, train nothing.",
)
@click.option(
    "--split", type=click.Choice(["train", "val"]), help="--apply: of DATA; val by default."
)
@click.option(
    "--predictions",
    type=Place(file=True),
    help="--apply: write image, prediction, probability, label as CSV; DATA needs no labels then.",
)
@click.pass_context
@on_all_processes
def linear(
    ctx: click.Context,
    judged: SubjectOptions,
    output: OutputOptions,
    protocol: str,
    epochs: int,
    lr: float,
    lrs: tuple[float, ...] | None,
    wds: tuple[float, ...] | None,
    features: tuple[str, ...] | None,
    cs: str,
    seed: int,
    save_head: str | None,
    probe: str | None,
    split: str | None,
    predictions: str | None,
) -> None:
    """A linear probe of the frozen features, trained on train/, scored on val/.

    Long probes leave their state beside the results; the same command goes on from there. A
    saved probe (--save-head, by any protocol) is used on other images by --apply. Under torchrun
    every process looks at its share of the images, and the numbers are those of one process.
    """
    if probe is not None:
        _apply(ctx, judged, output, probe, split, predictions)
        return
    for name, value in {"--split": split, "--predictions": predictions}.items():
        if value is not None:
            raise UsageError(f"{name} belongs to --apply HEAD, a probe that --save-head kept")
    for name, chosen in {"--lrs": lrs, "--wds": wds, "--features": features}.items():
        if chosen is not None and not protocol.startswith("grid"):
            raise UsageError(f"{name} belongs to --protocol grid or grid-features, not {protocol}")
    if cs not in ("default", "dino"):
        numbers(cs, "c", above=0)
    if not protocol.startswith("grid"):  # its own options come first, and take torch to check
        judged.there(judged.data)
    from xdino_eval.evaluators import Linear
    from xdino_eval.linear.grid import Grid
    from xdino_eval.linear.logistic import GRIDS
    from xdino_eval.linear.sgd import Sgd

    given: dict[str, Any] = {"lrs": lrs, "weight_decays": wds, "features": features}
    many = Grid(**{name: values for name, values in given.items() if values is not None})
    strengths = cs if cs in GRIDS else numbers(cs, "c", above=0)
    how = Sgd(epochs=epochs, batch_size=judged.batch_size, lr=lr, seed=seed)
    subject = judged.open().on_all()
    kept = output.file(judged.weights)
    keep_in = kept.parent if kept else None
    to_remove: list[Callable[[], None]] = []  # once the row is safe
    probe_of = Linear(
        protocol, how, many, strengths or "default", keep_in, save_head, to_remove.append
    )
    rows = probe_of(subject.backbone, subject.train, subject.val, subject.options)
    output.tell(rows, judged.weights)
    if os.environ.get("RANK", "0") == "0":  # who kept them
        for remove in to_remove:
            remove()


def _apply(
    ctx: click.Context,
    judged: SubjectOptions,
    output: OutputOptions,
    probe: str,
    split: str | None,
    predictions: str | None,
) -> None:
    """`--apply`, on the first process: options that only training has are refused."""
    training = ("protocol", "epochs", "lr", "lrs", "wds", "features", "cs", "seed", "save_head")
    for name in training:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = {"cs": "c"}.get(name, name).replace("_", "-")
            raise UsageError(f"--apply trains nothing: leave out --{option}")
    places.check_files("probe", probe)
    judged.there(judged.data)
    from xdino.runtime import distributed, turns
    from xdino_launch.evaluation.probing import use

    def work() -> None:
        rows = use(judged.open, probe, split, predictions)
        if predictions is not None:
            click.echo(f"predictions: {predictions}", err=True)
        if rows:
            output.tell(rows, judged.weights)

    turns.on_first(work, distributed.world_size() > 1 and judged.cache is None)
