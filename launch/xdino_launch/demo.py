"""The demo: pretrain on shipped images, then say in one table what that was worth.

Three kinds of features of the same held-out images, judged by the same two protocols: raw pixels,
the run's own teacher before its first step, and the teacher at the end. The held-out images are
never pretrained on. Garments lie at random places on random textures; beside them the table has the
plain images, upright and in the middle, where two of a kind agree pixel by pixel and raw pixels are
hard to beat.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from xdino import checkpoint, config, data, metrics
from xdino.backbone import Backbone
from xdino.errors import world
from xdino.run_directory import INITIAL_FILE
from xdino_eval import knn, results
from xdino_eval.attention import captions, class_attention_maps, figures
from xdino_eval.attention.colours import Scale
from xdino_eval.attention.figures import Looked
from xdino_eval.attention.sizes import Shown, shown
from xdino_eval.features import Features, extract, pixels
from xdino_eval.linear import logistic
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform
from xdino_launch.console import stderr_console, stdout_console
from xdino_launch.local import run_pretraining

NEIGHBOURS = 20  # the k that DINO reports for ImageNet (section 4.1)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the probe: a held-out tenth of train chooses
PLAIN = "fashion_mnist_sample"  # the same garments as they were


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
    note("scoring frozen features by k-NN and by a linear probe ...")
    rows: list[Row] = []
    for path in (resolved.data.path, PLAIN):
        train, val = data.open_splits(path, channels=len(pretrained.mean))
        rows += _scored(train, val, untrained, pretrained)
    file = run_dir / "results.json"
    on_the_way = [row for row in results.load(file) if row.settings.get("weights") == "best"]
    with world(f"write {file}"):  # the rows of an earlier demo in this folder
        file.unlink(missing_ok=True)
    results.append(file, on_the_way + rows)
    _, val = data.open_splits(resolved.data.path)
    sheet = _draw(pretrained, untrained, val, run_dir / "attention")
    _print(rows, run_dir, sheet, len(val), time.monotonic() - began)
    return rows


def _scored(
    train: data.Source, val: data.Source, untrained: Backbone, pretrained: Backbone
) -> list[Row]:
    """Two rows of each kind of features: k-NN and the probe."""
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
    return rows


def _pixels(train: data.Source, val: data.Source) -> tuple[Features, Features]:
    size = train.read(0).shape[0]
    return pixels(train, size), pixels(val, size)


def _features(
    backbone: Backbone, train: data.Source, val: data.Source
) -> tuple[Features, Features]:
    transform = EvalTransform.of(backbone)
    return extract(backbone, train, transform), extract(backbone, val, transform)


def _draw(pretrained: Backbone, untrained: Backbone, val: data.Source, out: Path) -> Path:
    """Attention on one held-out image of each class, before and after; one sheet of all of them."""
    labels = np.asarray(val.labels)
    told = captions.weights(pretrained)
    pairs: list[tuple[Looked, Looked]] = []
    seen: list[Shown] = []
    for label, name in enumerate(val.classes or ()):
        image = val.read(int(np.flatnonzero(labels == label)[0]))
        seen.append(shown(pretrained, image.shape))
        lines = (told, captions.inputs(pretrained, seen[-1:]))
        before, after = (
            Looked(name, image, class_attention_maps(backbone, image, seen[-1].shorter), lines)
            for backbone in (untrained, pretrained)
        )
        pairs.append((before, after))
    scale = Scale.of(figures.one_map(after.maps.layers[-1], None) for _, after in pairs)
    for _, after in pairs:
        stem = after.name.lower().replace(" ", "-").replace("/", "-")
        figures.draw_overlay(after, out / f"{stem}-overlay.png", scale)

    def row(before: Looked, after: Looked) -> tuple[str, list[np.ndarray]]:
        name, (image, overlay, mask) = figures.row(after, scale)
        return name, [image, figures.row(before, scale)[1][1], overlay, mask]

    def below() -> list[str]:
        return [
            "Each: the image; attention laid over, before the first step and at the end; the patches "
            "that hold 60% of it at the end, and what share of all they are (even: 60%)",
            f"{told} · {figures.told_map(pairs[0][1].maps)}",
            captions.inputs(pretrained, seen),
        ]

    rows = (row(*pair) for pair in pairs)
    sheet, *_ = figures.folder_sheets(rows, out, told=below, bar=captions.bar(scale))
    return sheet


def _print(rows: list[Row], run_dir: Path, sheet: Path, val: int, seconds: float) -> None:
    table = Table(title=f"Top-1 in per cent on {val:,} held-out images", title_justify="left")
    table.add_column("features")
    half = len(rows) // 2
    for place in ("scattered", "plain"):
        for protocol in (f"k-NN (k = {NEIGHBOURS})", "linear"):
            table.add_column(f"{place}:\n{protocol}", justify="right")
    for first in range(0, half, 2):
        of_these = rows[first : first + 2] + rows[half + first : half + first + 2]
        table.add_row(rows[first].features, *(f"{row.top1:.1f}" for row in of_these))
    console = stdout_console()
    console.print(table)
    logged, _ = metrics.read_rows(run_dir / metrics.METRICS_FILE)
    iterations = max((row["iteration"] for row in logged), default=0)
    console.print(f"{iterations:,} iterations; {seconds:.0f} s in all", soft_wrap=True)
    console.print(f"attention pictures: {sheet}", soft_wrap=True)
    console.print(f"views of the first batch: {run_dir / 'views.png'}", soft_wrap=True)
    console.print(f"every number with its protocol: {run_dir / 'results.json'}", soft_wrap=True)
