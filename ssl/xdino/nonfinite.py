"""What a run does about numbers that are not finite, and the record that it leaves of them.

`train.nonfinite` is one of

stop               end the run; the state before the step is the last good one
skip N             leave the step out and go on, at most N steps in a row
rollback [FACTOR]  go back to the last saved state, with the learning rate times FACTOR (0.5) from
                   there on; the step that broke is left out when its turn comes again

RUN/nonfinite.json is a list of events, the oldest first: iteration (the step's number as in
metrics.jsonl), epoch, what, loss, lr, lr_factor, left_out, state_iteration (where the state that the
step came from was loaded), precision, policy, action, and for each rank its images: indices, names,
seeds (run's seed, epoch, index: an image's crops follow from them) and the views they were made
into. `xdino replay RUN` makes such a step again.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdino.errors import NonFinite, RunFailed, nearest, world
from xdino.runtime.atomic import write_text

RECORD_FILE = "nonfinite.json"
FACTOR = 0.5  # of `rollback` without a number
MOST_ROLLBACKS = 3  # without a state saved beyond the step that broke


@dataclass(frozen=True)
class Policy:
    """`train.nonfinite`, parsed."""

    kind: str  # "stop", "skip" or "rollback"
    most: int = 0  # steps skipped in a row
    factor: float = 1.0  # of the learning rate

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """
        >>> Policy.parse("skip 3")
        Policy(kind='skip', most=3, factor=1.0)

        Raises:
            ValueError: it is none of those.
        """
        kind, *rest = text.split() or [""]
        if kind not in ("stop", "skip", "rollback"):
            known = nearest(kind, ("stop", "skip 3", "rollback", "rollback 0.3"))
            raise ValueError(f"give stop, skip N or rollback FACTOR; {known}")
        if kind == "stop":
            if rest:
                raise ValueError("stop takes no number")
            return cls(kind)
        if kind == "skip":
            if len(rest) != 1 or not re.fullmatch(r"[1-9][0-9]{0,8}", rest[0]):
                raise ValueError('skip takes the number of steps in a row, as in "skip 3"')
            return cls(kind, most=int(rest[0]))
        factor = rest[0] if rest else str(FACTOR)
        if (
            len(rest) > 1
            or not re.fullmatch(r"[0-9]*\.?[0-9]+", factor)
            or not 0 < float(factor) <= 1
        ):
            raise ValueError(
                'rollback takes a factor of the learning rate above 0 and at most 1, as in "rollback 0.3"'
            )
        return cls(kind, factor=float(factor))


def valid_policy(text: str) -> str:
    """The text, single spaces between its words; raises ValueError where it is no policy."""
    Policy.parse(text)
    return " ".join(text.split())


@dataclass
class Guard:
    """The policy at work in one run: what was done so far, and what is to be done next.

    All processes hold the same one, for they raise `NonFinite` together.
    """

    policy: Policy
    lr_factor: float = 1.0
    left_out: set[int] = field(default_factory=set)  # iterations that broke, before going back
    in_row: int = 0  # steps skipped, up to now
    rollbacks: int = 0  # since a state beyond `furthest` was saved
    furthest: int = 0  # iteration that broke

    def decide(self, error: NonFinite, iteration: int) -> str:
        """ "stop", "skip" or "rollback", after step number `iteration` broke."""
        self.furthest = max(self.furthest, iteration)
        if self.policy.kind == "skip" and not error.spoilt and self.in_row < self.policy.most:
            self.in_row += 1
            return "skip"
        if self.policy.kind == "rollback" and self.rollbacks < MOST_ROLLBACKS:
            self.rollbacks += 1
            self.lr_factor *= self.policy.factor
            self.left_out.add(iteration)
            return "rollback"
        return "stop"

    def went_well(self) -> None:
        """A step was finite."""
        self.in_row = 0

    def saved(self, iteration: int) -> None:
        """A state of `iteration` completed steps was saved: what lies before it is history."""
        self.left_out = {i for i in self.left_out if i > iteration}
        if iteration > self.furthest:
            self.rollbacks = 0

    def advice(self, error: NonFinite, run: Path, precision: str) -> str:
        """What can be done about a run that stops, in words that work on that run."""
        again = f"`xdino replay {run}` makes the step again"
        gentler = "a new run with a lower optim.lr or optim.clip_grad"
        if precision != "fp32":
            gentler += ", or with --train.precision fp32"
        if self.rollbacks >= MOST_ROLLBACKS:
            return f"going back {self.rollbacks} times did not help: start {gentler}; {again}"
        skip = (
            "" if error.spoilt or self.policy.kind == "skip" else '--train.nonfinite "skip 3" or '
        )
        if self.in_row:
            again = f"{self.in_row} steps in a row were skipped before it; {again}"
        return (
            f"continue it by the same command with {skip}--train.nonfinite rollback, "
            f"or start {gentler}; {again}"
        )

    def state(self) -> dict[str, Any]:
        """For the run's state: with it a continued run goes on alike."""
        return {
            "lr_factor": self.lr_factor,
            "left_out": sorted(self.left_out),
            "in_row": self.in_row,
            "rollbacks": self.rollbacks,
            "furthest": self.furthest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; an older run's state knows nothing of it."""
        self.lr_factor = float(state.get("lr_factor", 1.0))
        self.left_out = {int(i) for i in state.get("left_out", ())}
        self.in_row = int(state.get("in_row", 0))
        self.rollbacks = int(state.get("rollbacks", 0))
        self.furthest = int(state.get("furthest", 0))


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run; none where there is no record.

    Raises:
        RunFailed: it cannot be read or is something else.
    """
    path = run / RECORD_FILE
    if not path.exists():
        return []
    with world(f"read {path}"):
        text = path.read_bytes()
    try:
        events = json.loads(text)
        for event in events:
            int(event["iteration"]), list(event["ranks"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RunFailed(f"{path} is damaged or no record of steps that were not finite") from None
    return events


def add(run: Path, event: dict[str, Any]) -> None:
    """Add an event to the run's record; a damaged record is begun anew.

    Raises:
        RunFailed: it cannot be written.
    """
    try:
        events = read(run)
    except RunFailed:
        events = []
    plain = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()
    }
    write_text(run / RECORD_FILE, json.dumps([*events, plain], indent=1) + "\n")
