"""One contract for all that judges frozen features: a backbone and two sources in, rows out.

    rows = KNN(ks=(10, 20))(backbone, train, val, Options(batch_size=256))

The same objects serve the command line, a run while it trains (`during_training`) and Python. What
is one's own (neighbours, learning rates) are its fields; what all share is in `Options`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from xdino.backbone import Backbone
from xdino.config import Crops
from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino.runtime import distributed, turns
from xdino_eval import knn, quality
from xdino_eval.extraction import Options
from xdino_eval.features import Features, device_of
from xdino_eval.linear.grid import Grid, grid_probe, grid_probe_features
from xdino_eval.linear.logistic import logistic_probe
from xdino_eval.linear.probe import Trained
from xdino_eval.linear.sgd import OverImages, Sgd, sgd_probe, sgd_probe_features
from xdino_eval.results import Row, signed


class Evaluator(Protocol):
    """What judges a backbone, which comes back where it lay and in the mode that it was in.

    No random number is drawn from any generator that training uses. Rows are signed with the
    origin of the backbone, as far as it has one.

    Raises:
        UsageError, RunFailed: as it says.
    """

    def __call__(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> list[Row]: ...


def _signed(rows: list[Row], backbone: Backbone) -> list[Row]:
    return signed(rows, backbone.origin.sha256, backbone.origin.name)


@dataclass(frozen=True)
class KNN:
    """Weighted k-NN of cosine similarities: `train` votes on `val`; a row for every k."""

    ks: tuple[int, ...] = (20,)
    temperature: float = 0.07

    def __call__(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> list[Row]:
        both = options.features(backbone, train, val)
        if options.shared:
            both = (own_part(both[0]), own_part(both[1]))
        rows = knn.evaluate(*both, self.ks, self.temperature, shared=options.shared)
        return _signed(rows, backbone)


PROBES = ("logistic", "sgd", "sgd-features", "grid", "grid-features")


@dataclass(frozen=True)
class Linear:
    """A linear probe by one of the `PROBES`, trained on `train`, scored on `val`: one row.

    how, grid, strengths: of SGD, of grids, of logistic regression.
    keep_in: a folder for the state to go on from. save_head: a file for the probe.
    when_safe: is given what removes that state, to be called when the row is safe; by default now.
    """

    protocol: str = "logistic"
    how: Sgd = field(default_factory=Sgd)
    grid: Grid = field(default_factory=Grid)
    strengths: str | tuple[float, ...] = "default"
    keep_in: Path | None = None
    save_head: str | None = None
    when_safe: Callable[[Callable[[], None]], None] = lambda remove: remove()

    def __call__(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> list[Row]:
        train_probe = self._over_images if self.protocol in ("sgd", "grid") else self._over_features
        done = train_probe(backbone, train, val, options)
        if self.save_head is not None and distributed.rank() == 0:
            done.probe.signed(train.classes, backbone.origin.sha256).save(self.save_head)
        self.when_safe(done.settled)
        return _signed([done.row], backbone)

    def _over_images(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> Trained:
        if options.limit is not None:
            raise ValueError(f"{self.protocol} reads all images: a limit needs features")
        images = OverImages(
            backbone,
            train,
            val,
            options.transform_for(backbone),
            options.device,
            options.workers,
            options.precision,
            self.keep_in,
            options.counter("epoch"),
            options.shared,
        )
        if self.protocol == "sgd":
            return sgd_probe(images, self.how)
        return grid_probe(images, self.grid, self.how)

    def _over_features(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> Trained:
        tokens = self.grid.features if self.protocol == "grid-features" else ("class",)
        both = options.features(backbone, train, val, tokens)
        device = options.device or device_of(backbone)
        told = options.counter("fit" if self.protocol == "logistic" else "epoch")

        def fit() -> Trained:
            if self.protocol == "logistic":
                seed, keep_in = self.how.seed, self.keep_in
                return logistic_probe(
                    *both, self.strengths, seed=seed, keep_in=keep_in, progress=told
                )
            if self.protocol == "sgd-features":
                return sgd_probe_features(*both, self.how, device, self.keep_in, told)
            return grid_probe_features(*both, self.grid, self.how, device, self.keep_in, told)

        return turns.on_first(fit, options.shared)


@dataclass(frozen=True)
class Quality:
    """RankMe, LiDAR and the spread of the features of `train`; needs no labels. See `quality`."""

    crops: Crops | None = None
    lidar_images: int = 1_000
    views: int = 50
    seed: int = 0

    def __call__(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> list[Row]:
        row = quality.evaluate(
            backbone, train, options, self.crops, self.lidar_images, self.views, self.seed
        )
        return _signed([row], backbone)


def own_part(found: Features) -> Features:
    """Of features that every process has, the rows that are this one's to search."""
    rank, count = distributed.rank(), distributed.world_size()
    first, last = (len(found.features) * r // count for r in (rank, rank + 1))
    rows = slice(first, last)
    labels = None if found.labels is None else found.labels[rows]
    skipped = found.skipped if rank == 0 else []
    return replace(
        found,
        features=found.features[rows],
        labels=labels,
        indices=found.indices[rows],
        skipped=skipped,
    )


EVALUATORS: dict[str, Evaluator] = {
    "knn": KNN(),
    "logistic": Linear("logistic"),
    "grid": Linear("grid-features"),
    "quality": Quality(),
}
"""By the names that `evaluate.protocols` and `evaluate.linear` take."""

PATCH_PROBES = ("patch-knn", "patch-linear")
"""More such names, of `xdino_transfer`: they look at pictures with masks of their own."""

LABEL_FREE = ("quality", *PATCH_PROBES)


def check_labels(train: Source, val: Source) -> None:
    """Raises UsageError where the two sources have no labels, or number them differently."""
    for source in (train, val):
        if source.labels is None:
            raise UsageError(f"k-NN and probes need labels, and {source.name} has none")
    if train.classes != val.classes:
        raise UsageError(f"{train.name} and {val.name} number their classes differently")
