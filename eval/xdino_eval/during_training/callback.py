"""Evaluators for a trainer: rows become the numbers of metrics.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np

from xdino.backbone import Backbone
from xdino.data.sources import Source
from xdino.runtime import distributed, turns
from xdino_eval.during_training.best_teacher import BestTeacher
from xdino_eval.evaluators import LABEL_FREE, Evaluator, check_labels
from xdino_eval.extraction import Options
from xdino_eval.features import Features
from xdino_eval.results import Row


@dataclass(frozen=True)
class Remembering(Options):
    """Options of one evaluation of one network: what several evaluators read is computed once."""

    kept: dict[tuple[Any, ...], Features] = field(default_factory=dict)

    @classmethod
    def like(cls, options: Options) -> "Remembering":
        return cls(**{f.name: getattr(options, f.name) for f in fields(options)})

    def features_of(
        self,
        backbone: Backbone,
        split: str,
        source: Source,
        indices: np.ndarray | None = None,
        part: str = "",
        tokens: Sequence[str] = ("class",),
        may_be_empty: bool = False,
    ) -> Features:
        """As `Options.features_of`."""
        places = None if indices is None else np.asarray(indices, np.int64).tobytes()
        key = (id(source), tuple(tokens), places)
        if key not in self.kept:
            self.kept[key] = super().features_of(
                backbone, split, source, indices, part, tokens, may_be_empty
            )
        return self.kept[key]

    def remembered(self, source: Source) -> Features | None:
        """The class features of the images of `source` that were read, if any were."""
        found = [v for k, v in self.kept.items() if k[:2] == (id(source), ("class",))]
        return max(found, key=lambda features: len(features.features), default=None)


def callback(
    evaluators: Mapping[str, Evaluator],
    train: Source,
    val: Source,
    options: Options,
    best: BestTeacher | None = None,
    after: Callable[[Backbone, Remembering], None] | None = None,
) -> Callable[[Backbone], dict[str, float]]:
    """A function from a backbone to all their numbers, see `numbers`.

    The network is judged where it lies and comes back in the mode it was in; no random number is
    drawn from any generator that training uses. With `options.shared` every process calls it, and
    `best` and `after` see what they are for on the first.

    Args:
        best: is shown the rows of "knn", to keep the teacher that has the best.
        after: is called when all have judged, with what they have read; promises the same.

    Raises:
        UsageError: sources without labels, where one of the evaluators needs them.
    """
    if any(name not in LABEL_FREE for name in evaluators):
        check_labels(train, val)

    def evaluate(backbone: Backbone) -> dict[str, float]:
        found: dict[str, float] = {}
        once = Remembering.like(options)
        for name, evaluator in evaluators.items():
            judge = partial(evaluator, backbone, train, val, once)
            rows = turns.all_hear(judge, options.shared)
            found |= numbers(name, rows) | beside(rows, train, val)
            if name == "knn" and best is not None:
                turns.all_hear(partial(look, backbone, rows), options.shared)
        if after is not None and distributed.rank() == 0:
            after(backbone, once)
        return found

    def look(backbone: Backbone, rows: Sequence[Row]) -> None:
        alone = replace(options, shared=False)
        if best is not None and distributed.rank() == 0:
            best.look(backbone, rows, lambda b: evaluators["knn"](b, train, val, alone))

    return evaluate


def beside(rows: Sequence[Row], train: Source, val: Source) -> dict[str, float]:
    """What the scores of an evaluator are to be read against: what scores without looking, of how
    many images."""
    if any(row.top1 is not None for row in rows):
        return {"chance_top1": chance(train, val), "val_images": rows[0].val_size}
    views = [row.settings["lidar_images"] for row in rows if "agreement" in row.metrics]
    return {"chance_agreement": 100 / views[0]} if views else {}


def chance(train: Source, val: Source) -> float:
    """Per cent of `val` that has the commonest class of `train`: 100 / K for K even classes.

    What a classifier scores that never looks at an image; among equals the lower class.
    """
    commonest = int(np.bincount(np.asarray(train.labels)).argmax())
    return 100.0 * float(np.mean(np.asarray(val.labels) == commonest))


def numbers(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """The scores of an evaluator: "knn_top1" and "knn_top5" of its first row, "knn_top1_k100" and
    so on of the others, "quality_rankme" where a row has named metrics."""
    found: dict[str, float] = {}
    for place, row in enumerate(rows):
        suffix = f"_k{row.settings['k']}" if place else ""
        scores = {"top1": row.top1, "top5": row.top5, **row.metrics}
        found |= {f"{name}_{n}{suffix}": v for n, v in scores.items() if v is not None}
    return found
