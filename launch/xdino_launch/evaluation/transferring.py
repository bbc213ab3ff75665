"""`xdino transfer`: a suite of data sets, from weights to one table.

Frozen features are judged by k-NN and linear probes. Whole networks learn on from the weights
(`finetune`), and the same network from scratch (`scratch`): the same recipe on the same images for as
many steps, and so for as many minutes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from xdino import checkpoint, config
from xdino.backbone import Backbone, Spec
from xdino.errors import RunFailed, UsageError
from xdino_eval import results
from xdino_eval.extraction import Options
from xdino_eval.results import Row
from xdino_launch.local import run_finetuning
from xdino_launch.report.paying import minutes
from xdino_launch.report.run import Run
from xdino_launch.report.transfer import write_transfer
from xdino_transfer.finetuning.recipe import FineTuning
from xdino_transfer.suite import (
    COLUMN,
    SET,
    Cell,
    Column,
    DataSet,
    Going,
    Make,
    Suite,
    frozen_columns,
)

FROZEN, LEARNED = ("knn", "linear"), ("finetune", "scratch")
TITLES = {"knn": "k-NN", "linear": "linear", "finetune": "fine-tuned", "scratch": "scratch"}
RECIPE = "finetune_small"
# What a recipe has for the sake of weights to start from, as the published code has it without.
FROM_SCRATCH = {"model.head_scale": "1", "model.frozen": "0", "optim.layer_decay": "1",
                "optim.backbone_factor": "1"}  # fmt: skip
SHAPES = ("patch_size", "embed_dim", "depth", "num_heads", "eta", "tokens_norm")  # keys of model
USUAL = (("mlp_ratio", 4.0), ("class_attention_layers", 2), ("in_chans", 3))  # what all have


def transfer(
    backbone: Backbone,
    weights: str,
    file: Path,
    folder: Path,
    options: Options,
    arch: str | None = None,
) -> list[Row]:
    """Go through the suite in `file`, in `folder`; the rows of all cells, in its order.

    The report of what there is lies in folder/report.html, also where cells failed.

    Args:
        weights, arch: what `backbone` was loaded from, and as what.

    Raises:
        UsageError: a suite that is not as it must be; a folder of something else.
        RunFailed: a cell failed; the others are done.
    """
    spec, device = backbone.spec, str(options.device or "auto")
    makes = frozen_columns(backbone, options) | learned_columns(weights, arch, spec, device)
    suite = Suite.read(file, makes, FROZEN)
    if "scratch" in suite.columns:  # what is compared has the same recipe
        mine = suite.columns.get("finetune", {}) | suite.columns["scratch"]
        suite = replace(suite, columns=suite.columns | {"scratch": mine})
    columns = {name: makes[name](told) for name, told in suite.columns.items()}
    origin = backbone.origin
    going = Going(suite, columns, folder, origin.sha256, backbone.in_chans, options.notice)
    try:
        return going.run()
    finally:
        if rows := going.done():
            write_transfer(folder, rows, TITLES)


def learned_columns(weights: str, arch: str | None, spec: Spec, device: str) -> dict[str, Make]:
    """Networks that learn as `xdino finetune` does: keys are `recipe` and whatever it can be told.

    Args:
        arch: of files that do not say. spec: of the network in `weights`, which is what learns from
            scratch, too.
    """
    both = {"model.in_chans": str(spec.in_chans), "runtime.device": device, "evaluate.every": "0"}

    def make(own: Mapping[str, Any], told: Mapping[str, Any]) -> Column:
        keys = {**both, **{key: value for key, value in told.items() if key != "recipe"}, **own}
        recipe = str(told.get("recipe") or RECIPE)

        def of(data: DataSet) -> FineTuning:
            where = {"data.path": data.path, "data.category": data.category}
            return config.load(recipe, keys | where, FineTuning)

        of(DataSet("."))  # what is wrong with a key is told before anything learns

        def column(cell: Cell) -> list[Row]:
            path = run_finetuning(of(cell.data), cell.folder)
            digest = checkpoint.sha256(path)
            rows = results.load(cell.folder / "results.json")
            spent = _minutes(cell.folder)
            own = [row for row in rows if row.checkpoint == digest][-1:]
            if not own:
                raise RunFailed(f"{cell.folder} has no score of its classifier")
            return [replace(row, settings={**row.settings, **spent}) for row in own]

        return column

    def finetune(told: Mapping[str, Any]) -> Column:
        return make({"train.init": weights, **({"model.arch": arch} if arch else {})}, told)

    def scratch(told: Mapping[str, Any]) -> Column:
        unlike = {k: v for k, v in spec.shape.items() if k not in SHAPES and (k, v) not in USUAL}
        if unlike:
            raise UsageError(f"scratch: no recipe makes a {spec.arch} of {unlike}; leave it out")
        shape = {f"model.{key}": value for key, value in spec.shape.items() if key in SHAPES}
        view: dict[str, Any] = {
            "view.size": told.get("view.size") or str(spec.input_size),
            "view.mean": list(map(str, spec.mean)),
            "view.std": list(map(str, spec.std)),
        }
        return make({**FROM_SCRATCH, "model.arch": spec.arch, **shape, **view}, told)

    return {"finetune": finetune, "scratch": scratch}


def _minutes(run: Path) -> dict[str, float]:
    """Of training, without what was scored and drawn; nothing where no speed was logged."""
    told = Run.open(run)
    last = max((row["iteration"] for row in told.metrics if "loss" in row), default=0)
    found = minutes(told, np.array([last]))
    return {} if found is None else {"minutes of training": round(float(found[-1]), 2)}


def table(rows: Sequence[Row]) -> Table:
    """A line for each data set, a column for each way to use the backbone: top-1 in per cent."""
    out = Table(header_style="bold", pad_edge=False)
    columns = list(dict.fromkeys(str(row.settings[COLUMN]) for row in rows))
    out.add_column("data set", overflow="fold")
    for title in ("train", "val", *(TITLES.get(name, name) for name in columns)):
        out.add_column(title, justify="right", no_wrap=True)
    for name in dict.fromkeys(str(row.settings[SET]) for row in rows):
        mine = [row for row in rows if row.settings[SET] == name]
        last = {row.settings[COLUMN]: row for row in mine}
        cells = [_per_cent(last.get(column)) for column in columns]
        out.add_row(name, f"{mine[0].train_size:,}", f"{mine[0].val_size:,}", *cells)
    return out


def _per_cent(row: Row | None) -> str:
    return "-" if row is None or row.top1 is None else f"{row.top1:.2f}"
