"""What judges a classifier while it learns and at its end, and what is kept of it.

Each evaluation gives val_top1 and val_top5 to metrics.jsonl. The classifier that scored best lies in
RUN/best.safetensors, whose header says how, and has a row in results.json beside that of the last.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from xdino import checkpoint
from xdino.checkpoint import BEST_FILE
from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed, turns
from xdino_eval import results
from xdino_eval.during_training.callback import chance
from xdino_eval.extraction import Options
from xdino_eval.results import Row, signed
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import MODEL_FILE, read_classifier, write_classifier
from xdino_transfer.classification.scoring import PROTOCOL, published_transform, score
from xdino_transfer.finetuning.job import ClassificationJob

SCORE = "val_top1"  # of metrics.jsonl, and of the best file's facts
_WHICH = "weights"  # of a row's settings: "last" or "best"


class Judge:
    """An evaluator for `train.run` (`job.Evaluator`) of a job in the folder `run`; of several
    processes every one calls it (`job.OfAllProcesses`).

    notice: is told where the best cannot be kept, in a sentence.
    """

    def __init__(
        self,
        job: ClassificationJob,
        run: Path,
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.job, self.run, self.notice = job, run, notice
        self._last: tuple[int, list[Row]] | None = None

    def __call__(self, classifier: Classifier) -> dict[str, float]:
        iteration = int(classifier.origin.facts["iteration"])
        shared = distributed.world_size() > 1
        rows = turns.all_hear(partial(self._score, classifier, shared), shared)
        self._last = iteration, rows
        if iteration and distributed.rank() == 0:
            try:
                self._keep_best(classifier, iteration, rows)
            except (RunFailed, UsageError, OSError) as error:  # a run is worth more than this file
                self.notice(f"the best classifier so far could not be kept: {error}")
        return self._numbers(rows)

    def _score(self, classifier: Classifier, shared: bool = False) -> list[Row]:
        plan, config = self.job.plan, self.job.config
        options = Options(
            published_transform(plan.spec, config.evaluate.full_crop),
            batch_size=config.evaluate.batch_size,
            workers=max(1, config.runtime.workers),
            shared=shared,
        )
        bad = config.data.max_bad_share
        found = score(classifier, plan.val, options, len(plan.train), bad)
        init = self.job.weights_facts(0)["init"]
        told = {
            "init": "from scratch" if init is None else init,
            "images learned from": config.images(),
            "frozen blocks": config.model.frozen,
            "epochs": config.train.epochs,
            "seed": config.train.seed,
            "average": config.evaluate.weights == "average",
        }
        return [replace(row, settings={**row.settings, **told}) for row in found]

    def _numbers(self, rows: list[Row]) -> dict[str, float]:
        plan = self.job.plan
        top1, top5 = rows[0].top1, rows[0].top5
        assert top1 is not None
        assert top5 is not None
        return {
            SCORE: top1,
            "val_top5": top5,
            "chance_top1": chance(plan.train, plan.val),
            "val_images": rows[0].val_size,
        }

    def _keep_best(self, classifier: Classifier, iteration: int, rows: list[Row]) -> None:
        path, before = self.run / BEST_FILE, self._best()
        assert rows[0].top1 is not None
        mine = before is not None and before.get("iteration") == iteration
        if before is not None and not mine and rows[0].top1 <= before[SCORE]:
            return
        facts = {**self.job.weights_facts(iteration), SCORE: rows[0].top1}
        write_classifier(path, classifier, facts)
        self._tell(path, rows, iteration, "best")

    def _best(self) -> dict[str, Any] | None:
        """What the best file says of itself; None without one that is whole."""
        try:
            facts = checkpoint.read_weights(self.run / BEST_FILE).facts
        except (RunFailed, UsageError):
            return None
        usable = isinstance(facts.get(SCORE), int | float)
        return facts if usable else None

    def _tell(self, path: Path, rows: list[Row], iteration: int, which: str) -> None:
        """The rows of a file in results.json, in place of those of the one before it."""
        start = "fine-tuned" if self.job.weights_facts(0)["init"] else "from scratch"
        digest = checkpoint.sha256(path)
        told = [
            replace(row, settings={**row.settings, _WHICH: which})
            for row in signed(rows, digest, f"{start}, iteration {iteration}")
        ]

        def is_mine(row: Row) -> bool:
            return row.protocol == PROTOCOL and row.settings.get(_WHICH) == which

        results.append(self.run / "results.json", told, instead_of=is_mine)

    def conclude(self) -> dict[str, float] | None:
        """At the end: the row of the last classifier; its numbers, None where it had the row already."""
        path = self.run / MODEL_FILE
        digest, end = checkpoint.sha256(path), self.job.iterations
        for row in results.load(self.run / "results.json"):
            if row.checkpoint == digest and row.settings.get(_WHICH) == "last":
                return None
        if self._last is not None and self._last[0] == end:
            rows = self._last[1]
        else:
            classifier = read_classifier(self.run).classifier
            rows = self._score(classifier.to(self.job.device))
        self._tell(path, rows, end, "last")
        return self._numbers(rows)
