"""`xdino linear`."""

from dataclasses import replace
from typing import Any

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import (
    evaluation_options,
    finish,
    numbers,
    results_file,
    subject_options,
)


@click.command()
@evaluation_options
@click.option(
    "--protocol",
    default="logistic",
    show_default=True,
    type=click.Choice(["logistic", "sgd", "sgd-features", "grid", "grid-features"]),
    help="logistic: scikit-learn on features extracted once; sgd: the published protocol, augmented "
    "images every epoch; sgd-features: its optimiser on features extracted once; grid, "
    "grid-features: the same for many settings in one pass, a held-out tenth of train/ chooses.",
)
@click.option("--epochs", default=100, show_default=True, type=click.IntRange(1), help="Of SGD.")
@click.option("--lr", default=0.001, show_default=True, type=float, help="Of SGD, for batch 256.")
@click.option("--lrs", help="Grid: learning rates, for batch 256; 13 from 1e-5 to 0.1 by default.")
@click.option("--wds", help="Grid: weight decays; 0 by default.")
@click.option("--features", help="Grid: any of class,patches,both; class by default.")
@click.option("--c", "cs", default="default", help="Logistic: default, dino (45), or values.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--save-head", type=click.Path(), help="SGD: keep the head, as safetensors.")
def linear(
    protocol: str,
    epochs: int,
    lr: float,
    lrs: str | None,
    wds: str | None,
    features: str | None,
    cs: str,
    seed: int,
    save_head: str | None,
    **options: Any,
) -> None:
    """A linear probe of the frozen features, trained on train/, scored on val/.

    The protocols over images leave their state after each epoch beside the results; the same
    command goes on from there.
    """
    if lr <= 0:
        raise UsageError(f"--lr must be above 0, got {lr}")
    chosen = {"--lrs": lrs, "--wds": wds, "--features": features}
    for name, value in chosen.items():
        if value is not None and not protocol.startswith("grid"):
            raise UsageError(f"{name} belongs to --protocol grid or grid-features, not {protocol}")
    from xdino_eval import linear as rooms
    from xdino_eval.grid import Grid, Tokens, grid_probe, grid_probe_features
    from xdino_eval.logistic import GRIDS, logistic_probe
    from xdino_launch.evaluate import Subject

    given: dict[str, Any] = {
        "lrs": numbers(lrs, "lrs"),
        "weight_decays": numbers(wds, "wds"),
        "features": numbers(features, "features", str),
    }
    many = Grid(**{name: values for name, values in given.items() if values is not None})
    strengths = cs if cs in GRIDS else numbers(cs, "c")
    subject = Subject.open(**subject_options(options))
    how = rooms.Sgd(epochs=epochs, batch_size=options["batch_size"], lr=lr, seed=seed)
    kept = results_file(options["weights"], options["out"])
    over_images: dict[str, Any] = {
        "transform": subject.transform,
        "how": how,
        "device": subject.device,
        "workers": options["workers"],
        "precision": options["precision"],
        "save_to": save_head,
        "progress": subject.progress("epoch"),
        "keep_in": kept.parent if kept else None,
    }
    three = subject.backbone, subject.train, subject.val
    if protocol == "sgd":
        row = rooms.sgd_probe(*three, **over_images)
    elif protocol == "grid":
        row = grid_probe(*three, grid=many, **over_images)
    elif protocol == "grid-features":
        network = Tokens(subject.backbone, many.features)
        train, val = replace(subject, backbone=network).features()
        row = grid_probe_features(train, val, many, how, save_to=save_head)
    else:
        train, val = subject.features()
        if protocol == "sgd-features":
            row = rooms.sgd_probe_features(train, val, how, save_to=save_head)
        else:
            row = logistic_probe(train, val, strengths or "default", seed=seed)
    finish(subject.sign([row]), options["weights"], options["out"], options["as_json"])
