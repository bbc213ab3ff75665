"""The demo: pretrain on shipped images, then say in one table what that was worth.

Three kinds of features of the same held-out images, judged by the same two protocols: raw pixels,
the run's own teacher before its first step, and the teacher at the end. The held-out images are
never pretrained on.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from xdino import checkpoint, config, data, metrics
from xdino.backbone import Backbone
from xdino.errors import world
from xdino.run_directory import INITIAL_FILE
from xdino_eval import attention, knn, results, sheets
from xdino_eval.attention import figures
from xdino_eval.features import Features, extract, pixels
from xdino_eval.linear import logistic
from xdino_eval.results import Row
from xdino_eval.sheets import Tile
from xdino_eval.transform import EvalTransform
from xdino_launch.console import stderr_console, stdout_console
from xdino_launch.local import run_pretraining

NEIGHBOURS = 20  # the k that DINO reports for ImageNet (section 4.1)
STRENGTHS = (1e-2, 1.0, 1e2)  # of the probe: a held-out tenth of train chooses


def run_demo(run_dir: Path, seed: int = 0, overrides: Mapping[str, str] | None = None) -> list[Row]:
    """Pretrain (or continue), evaluate, draw; print the table.

    Args:
        overrides: dotted keys on top of the demo's recipe, as on the command line.

    Raises:
        UsageError, RunFailed, Stopped: as `pretrain`.
    """
    began = time.monotonic()
    note = stderr_console().print
    resolved = config.load("demo", {"train.seed": str(seed), **(overrides or {})})
    run_pretraining(resolved, run_dir, command=["demo"])
    pretrained = checkpoint.load_backbone(run_dir)
    untrained = checkpoint.load_backbone(run_dir / INITIAL_FILE)
    train, val = data.open_splits(resolved.data.path)
    note("scoring frozen features by k-NN and by a linear probe ...")

    rows: list[Row] = []
    for what, sha, (bank, queries) in (
        ("raw pixels", "none", _pixels(train, val)),
        ("untrained network", untrained.origin.sha256, _features(untrained, train, val)),
        (pretrained.origin.name, pretrained.origin.sha256, _features(pretrained, train, val)),
    ):
        scored = [
            *knn.evaluate(bank, queries, [NEIGHBOURS]),
            logistic.logistic_probe(bank, queries, STRENGTHS).row,
        ]
        rows += results.signed(scored, sha, what)
    with world(f"write {run_dir / 'results.json'}"):  # the rows of an earlier demo in this folder
        (run_dir / "results.json").unlink(missing_ok=True)
    results.append(run_dir / "results.json", rows)
    sheet = _draw(pretrained, val, run_dir / "attention")
    _print(rows, run_dir, sheet, len(val), time.monotonic() - began)
    return rows


def _pixels(train: data.Source, val: data.Source) -> tuple[Features, Features]:
    size = train.read(0).shape[0]
    return pixels(train, size), pixels(val, size)


def _features(
    backbone: Backbone, train: data.Source, val: data.Source
) -> tuple[Features, Features]:
    transform = EvalTransform.of(backbone)
    return extract(backbone, train, transform), extract(backbone, val, transform)


def _draw(backbone: Backbone, val: data.Source, out: Path) -> Path:
    """Attention on one held-out image of each class, and one sheet of all of them."""
    labels = np.asarray(val.labels)
    pages: list[Tile | None] = []
    for label, name in enumerate(val.classes or ()):
        image = val.read(int(np.flatnonzero(labels == label)[0]))
        maps = attention.class_attention_maps(backbone, image)
        # A map of a few patches is looked at, not measured: draw it on an enlarged image.
        large = np.asarray(
            Image.fromarray(image[..., 0]).resize((224, 224), Image.Resampling.BICUBIC)
        )
        stem = name.lower().replace(" ", "-").replace("/", "-")
        files = figures.draw(maps, large[..., None], out, stem)
        pages.append(Tile([np.asarray(Image.open(files[0]))]))
    path = out / "all.png"
    sheets.save(sheets.sheet(pages, columns=1), path)
    return path


def _print(rows: list[Row], run_dir: Path, sheet: Path, val: int, seconds: float) -> None:
    table = Table(title=f"Top-1 in per cent on {val:,} held-out images", title_justify="left")
    for name in ("features", f"k-NN (k = {NEIGHBOURS})", "linear (logistic regression)"):
        table.add_column(name, justify="left" if name == "features" else "right")
    for neighbours, probe in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(neighbours.features, f"{neighbours.top1:.1f}", f"{probe.top1:.1f}")
    console = stdout_console()
    console.print(table)
    logged, _ = metrics.read_rows(run_dir / metrics.METRICS_FILE)
    iterations = max((row["iteration"] for row in logged), default=0)
    console.print(f"{iterations:,} iterations; {seconds:.0f} s in all", soft_wrap=True)
    console.print(f"attention pictures: {sheet}", soft_wrap=True)
    console.print(f"views of the first batch: {run_dir / 'views.png'}", soft_wrap=True)
    console.print(f"every number with its protocol: {run_dir / 'results.json'}", soft_wrap=True)
