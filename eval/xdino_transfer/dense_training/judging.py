"""What judges a segmenter or a detector while it learns and at its end, and what is kept of it.

Each evaluation gives numbers to metrics.jsonl. The network that scored best lies in
RUN/best.safetensors, whose header says how, and has a row in results.json beside that of the last.
RUN/per_class.csv has a line a class, of the last.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from xdino import checkpoint
from xdino.checkpoint import BEST_FILE
from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed
from xdino_eval import results
from xdino_eval.results import Row, signed
from xdino_transfer.dense_files import MODEL_FILE, read_dense
from xdino_transfer.dense_training.job import DenseJob

_WHICH = "weights"  # of a row's settings: "last" or "best"


@dataclass(frozen=True)
class Scored:
    """rows: not signed yet. numbers: for metrics.jsonl. per_class: a line a class, its name first."""

    rows: list[Row]
    numbers: dict[str, float]
    per_class: list[dict[str, Any]]


class DenseJudge(ABC):
    """An evaluator for `train.run` (`job.Evaluator`) of a job in the folder `run`.

    Of several processes every one calls it (`job.OfAllProcesses`).

    notice: is told where the best cannot be kept, in a sentence.
    """

    score: ClassVar[str]  # of `Scored.numbers`, and of the best file's facts: larger is better

    def __init__(
        self,
        job: DenseJob[Any],
        run: Path,
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.job, self.run, self.notice = job, run, notice
        self._last: tuple[int, Scored] | None = None

    @abstractmethod
    def scored(self, network: Any, shared: bool = False) -> Scored:
        """The val images through the network, which is left as it was; `shared`: by all processes."""

    def __call__(self, network: Any) -> dict[str, float]:
        iteration = int(network.origin.facts["iteration"])
        found = self._told(self.scored(network, distributed.world_size() > 1))
        self._last = iteration, found
        if iteration and distributed.rank() == 0:
            try:
                self._keep_best(iteration, found)
            except (RunFailed, UsageError, OSError) as error:  # a run is worth more than this file
                self.notice(f"the best network so far could not be kept: {error}")
        return found.numbers

    def _told(self, found: Scored) -> Scored:
        """With what a reader of its rows should know of the run."""
        job, train = self.job, self.job.config.train
        init = job.weights_facts(0)["init"]
        told = {
            "init": "from scratch" if init is None else init,
            "frozen": job.config.model.frozen,
            "iterations": job.iterations,
            "total batch": job.plan.total_batch,
            "seed": train.seed,
        }
        rows = [
            replace(row, settings={**row.settings, **told}, train_size=len(job.plan.train))
            for row in found.rows
        ]
        return replace(found, rows=rows)

    def _keep_best(self, iteration: int, found: Scored) -> None:
        path, before = self.run / BEST_FILE, self._best()
        mine = before is not None and before.get("iteration") == iteration
        score = found.numbers[self.score]
        if before is not None and not mine and score <= before[self.score]:
            return
        self.job.write(path, iteration, **{self.score: score})
        self._tell(path, found.rows, iteration, "best")

    def _best(self) -> dict[str, Any] | None:
        """What the best file says of itself; None without one that is whole."""
        try:
            facts = checkpoint.read_weights(self.run / BEST_FILE).facts
        except (RunFailed, UsageError):
            return None
        usable = isinstance(facts.get(self.score), int | float)
        return facts if usable else None

    def _tell(self, path: Path, rows: Sequence[Row], iteration: int, which: str) -> None:
        """The rows of a file in results.json, in place of those of the one before it."""
        start = "from weights" if self.job.weights_facts(0)["init"] else "from scratch"
        digest = checkpoint.sha256(path)
        told = [
            replace(row, settings={**row.settings, _WHICH: which})
            for row in signed([*rows], digest, f"{start}, iteration {iteration}")
        ]

        def is_mine(row: Row) -> bool:
            return row.protocol == self.job.protocol and row.settings.get(_WHICH) == which

        results.append(self.run / "results.json", told, instead_of=is_mine)

    def conclude(self) -> dict[str, float] | None:
        """At the end: the row of the last network, and its classes; None where it had the row already."""
        path = self.run / MODEL_FILE
        digest, end = checkpoint.sha256(path), self.job.iterations
        table = self.run / results.CLASSES_FILE
        for row in results.load(self.run / "results.json"):
            mine = row.checkpoint == digest and row.settings.get(_WHICH) == "last"
            if mine and table.is_file():
                return None
        if self._last is not None and self._last[0] == end:
            found = self._last[1]
        else:
            network: Any = read_dense(self.run).network
            found = self._told(self.scored(network.to(self.job.device)))
        results.write_classes(table, found.per_class)
        self._tell(path, found.rows, end, "last")
        return found.numbers
