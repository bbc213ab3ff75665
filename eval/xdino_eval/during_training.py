"""Evaluators for a trainer: rows become the numbers of metrics.jsonl."""

from collections.abc import Callable, Mapping, Sequence

from xdino.backbone import Backbone
from xdino.data.sources import Source
from xdino_eval.evaluators import LABEL_FREE, Evaluator, check_labels
from xdino_eval.extraction import Options
from xdino_eval.knn.best_teacher import BestTeacher
from xdino_eval.results import Row


def callback(
    evaluators: Mapping[str, Evaluator],
    train: Source,
    val: Source,
    options: Options,
    best: BestTeacher | None = None,
) -> Callable[[Backbone], dict[str, float]]:
    """A function from a backbone to all their numbers, see `numbers`.

    The network is judged where it lies and comes back in the mode it was in; no random number is
    drawn from any generator that training uses.

    Args:
        best: is shown the rows of "knn", to keep the teacher that has the best.

    Raises:
        UsageError: sources without labels, where one of the evaluators needs them.
    """
    if any(name not in LABEL_FREE for name in evaluators):
        check_labels(train, val)

    def evaluate(backbone: Backbone) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, evaluator in evaluators.items():
            rows = evaluator(backbone, train, val, options)
            found |= numbers(name, rows)
            if name == "knn" and best is not None:
                best.look(backbone, rows, lambda b: evaluators["knn"](b, train, val, options))
        return found

    return evaluate


def numbers(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """The scores of an evaluator: "knn_top1" and "knn_top5" of its first row, "knn_top1_k100" and
    so on of the others, "quality_rankme" where a row has named metrics."""
    found: dict[str, float] = {}
    for place, row in enumerate(rows):
        suffix = f"_k{row.settings['k']}" if place else ""
        scores = {"top1": row.top1, "top5": row.top5, **row.metrics}
        found |= {f"{name}_{n}{suffix}": v for n, v in scores.items() if v is not None}
    return found
