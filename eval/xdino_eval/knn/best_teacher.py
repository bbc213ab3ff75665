"""The teacher whose k-NN was best while a run trained: RUN/best.safetensors, beside the last one.

    best = best_of(run)  # None, or its path, iteration and k-NN; `last`: whether it is the run's last

The file itself says of which iteration it is and how it scored, so that weights and score cannot
part; its rows of results.json carry its hash and `weights: best`. It is written where an evaluation
scores higher than the file does (an equal score keeps the earlier), which makes an evaluation that is
made again after a kill harmless. Scores are compared under one protocol only: where `evaluate.*`
changed, the file is judged again first. The untrained network (iteration 0) is no candidate, and a
run without k-NN among `evaluate.protocols`, such as one without labels, has no best.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xdino import checkpoint
from xdino.backbone import Backbone
from xdino.checkpoint import BACKBONE_FILE, BEST_FILE
from xdino.errors import RunFailed, UsageError
from xdino_eval import results
from xdino_eval.features import device_of
from xdino_eval.results import Row, signed

LIMIT = "during training, images of a split at most"  # of a row's settings
_SCORE, _JUDGED = "knn_top1", "knn_protocol"  # of the file's facts
_PROTOCOL = ("protocol", "settings", "data", "transform", "train_size", "val_size")

Judge = Callable[[Backbone], Sequence[Row]]


@dataclass(frozen=True)
class Best:
    """`top1` is k-NN's in per cent, of the first row of its evaluation."""

    path: Path
    iteration: int
    top1: float
    last: bool  # the run's backbone.safetensors is of the same iteration


def best_of(run: Path) -> Best | None:
    """The best teacher of a run; None where it has none, or one that cannot be read."""
    facts = _facts(run / BEST_FILE)
    if facts is None:
        return None
    newest = _facts(run / BACKBONE_FILE, scored=False) or {}
    last = newest.get("iteration") == facts["iteration"]
    return Best(run / BEST_FILE, facts["iteration"], facts[_SCORE], last)


def _facts(path: Path, scored: bool = True) -> dict[str, Any] | None:
    try:
        facts = checkpoint.read_weights(path).facts
    except (RunFailed, UsageError):  # not there, or damaged
        return None
    usable = isinstance(facts.get("iteration"), int)
    return facts if usable and (not scored or isinstance(facts.get(_SCORE), int | float)) else None


@dataclass(frozen=True)
class BestTeacher:
    """Keeps the best of the teachers that it is shown in `run`.

    limit: of images, for the rows. notice: is told where it cannot, in a sentence.
    """

    run: Path
    limit: int | None = None
    notice: Callable[[str], None] = lambda sentence: None

    def look(self, backbone: Backbone, rows: Sequence[Row], judge: Judge) -> bool:
        """Whether this teacher, which `rows` speak of, is kept as the best so far.

        Args:
            backbone: its origin's facts say its iteration.
            judge: gives the rows of another backbone.
        """
        try:
            return self._look(backbone, rows, judge)
        except (RunFailed, UsageError, OSError) as error:  # a run is worth more than this file
            self.notice(f"the best teacher so far could not be kept: {error}")
            return False

    def _look(self, backbone: Backbone, rows: Sequence[Row], judge: Judge) -> bool:
        iteration = backbone.origin.facts.get("iteration", 0)
        if not iteration or not rows or rows[0].top1 is None:
            return False
        before = self._before(backbone, rows, judge)
        if before is not None and rows[0].top1 <= before[_SCORE]:
            if before["iteration"] == iteration:  # killed before the rows were written
                self._tell(rows, iteration)
            return False
        self._keep(backbone, backbone.origin.facts, rows)
        return True

    def _before(
        self, backbone: Backbone, rows: Sequence[Row], judge: Judge
    ) -> dict[str, Any] | None:
        """Facts of the file, its score by the protocol of `rows`; None where there is no good one."""
        path = self.run / BEST_FILE
        facts = _facts(path)
        if facts is None or facts.get(_JUDGED) == _protocol(rows):
            return facts
        if facts["iteration"] == backbone.origin.facts["iteration"]:
            return None  # the same teacher, judged already
        best = checkpoint.load_backbone(path).to(device_of(backbone))
        again = judge(best)
        self._keep(best, best.origin.facts, again)
        return _facts(path)

    def _keep(self, backbone: Backbone, facts: dict[str, Any], rows: Sequence[Row]) -> None:
        told = {
            **facts,
            "role": "teacher",
            "weights": "best",
            _SCORE: rows[0].top1,
            _JUDGED: _protocol(rows),
        }
        checkpoint.save_backbone(self.run / BEST_FILE, backbone, backbone.spec, **told)
        self._tell(rows, told["iteration"])

    def _tell(self, rows: Sequence[Row], iteration: int) -> None:
        """The file's rows in results.json, in place of those of the one before it."""
        digest = checkpoint.sha256(self.run / BEST_FILE)
        mine = [
            replace(row, settings={**row.settings, "weights": "best", LIMIT: self.limit})
            for row in signed(rows, digest, f"teacher, iteration {iteration}")
        ]
        path = self.run / "results.json"
        if [row.checkpoint for row in results.load(path) if _is_mine(row)] != [digest] * len(mine):
            results.append(path, mine, instead_of=_is_mine)


def _is_mine(row: Row) -> bool:
    return row.settings.get("weights") == "best" and LIMIT in row.settings


def _protocol(rows: Sequence[Row]) -> list[Any]:
    """What a score depends on besides the weights, as a header keeps it."""
    tree = asdict(rows[0])
    return json.loads(json.dumps([tree[name] for name in _PROTOCOL]))
