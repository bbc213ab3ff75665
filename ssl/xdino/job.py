"""What the loop of `train` asks of a kind of training, and what it tells whoever watches.

A second kind (a classifier, a detector) is another class with these members: it owns its data, plan,
networks, columns and files, and `train.run` gives it signals, checkpoints, exact resuming, the policy
for numbers that are not finite, metrics and evaluations.

Steps carry their number, counted from 1; `iteration` counts completed steps.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from xdino.backbone import Origin
from xdino.config import RunConfig
from xdino.data import BadImage
from xdino.stepping import StepResult

#: What a job gives to be judged -> its scores, for metrics.jsonl; leaves the network as it was.
Evaluator = Callable[[Any], dict[str, float]]


class Judged(Protocol):
    """What evaluators are given: a backbone, or the whole network of a job that learns a task."""

    origin: Origin


class Job(Protocol):
    """One kind of training. All processes call the same members in the same order."""

    device: torch.device  # from `make_plan` on, as the next two
    iterations: int
    steps_per_epoch: int
    last_start: Mapping[str, Any]  # of environment.json; set before `make_plan`

    @property
    def config(self) -> RunConfig:
        """What is run; from `make_plan` on, the run's own."""

    # --- before anything is written, in this order ---

    def make_plan(self, config: Any) -> None:
        """Open the data and prove that `config`, the run's own, can be done; perhaps twice.

        `iterations` counts those of extensions (`config.train.all_epochs`).

        Raises:
            UsageError: it cannot.
        """

    def same_everywhere(self) -> dict[str, Any]:
        """What every process must have found alike, by what it is called in a sentence."""

    def check_disk(self, run_dir: Path) -> None:
        """Raises UsageError where the disk has no room for the run's states."""

    def build(self, from_init: bool) -> None:
        """The networks; `from_init`: from the weights that the configuration names, if any."""

    @property
    def begins_at(self) -> int:
        """From `build` on: completed steps that a new run counts from, where its networks bring some."""

    def ask_every_step(self) -> None:
        """From here on `step` says at once what is not finite, also on a GPU."""

    def notices(self) -> Iterable[str]:
        """Sentences that a person should read before the first step."""

    def facts(self) -> dict[str, Any]:
        """For environment.json: the data's name and fingerprint, precision, kernels, ..."""

    def dimensions(self) -> dict[str, Any]:
        """For `Listener.started`: images, total_batch, peak_lr, doing ("pretraining"), ..."""

    # --- steps ---

    def open(self, known_bad: list[BadImage]) -> None:
        """Once, before `start`; `known_bad`: images that earlier starts could not read."""

    def start(self, iteration: int) -> None:
        """The next step is number `iteration` + 1, here and after going back."""

    def step(self, number: int, lr_factor: float, diagnose: bool, run_dir: Path) -> StepResult:
        """The next step; `lr_factor`: of the learning rate, below 1 after going back.

        Raises:
            NonFinite: on all processes; nothing moved.
        """

    def skip(self, number: int) -> None:
        """Pass over the next step's data."""

    def close(self) -> None:
        """No more steps, until another `start`."""

    def check(self) -> None:
        """Raises NonFinite where anything that a state holds is not finite."""

    # --- what is told of them ---

    @property
    def images_per_step(self) -> int:
        """Of all processes."""

    @property
    def wait_seconds(self) -> float:
        """How long steps have waited for data so far."""

    def columns(self, number: int, lr_factor: float) -> dict[str, float]:
        """What metrics.jsonl tells of a step besides its loss: schedules, sizes."""

    def warning(self, number: int, result: StepResult) -> str | None:
        """A sentence where a step looks as if nothing were learned."""

    def take_bad_report(self) -> list[BadImage]:
        """The images found unreadable since the last call, on this process."""

    def images_of(self, number: int) -> dict[str, Any]:
        """For nonfinite.json: this process's images of a step, and what their views follow from."""

    def lr(self, number: int) -> float:
        """The learning rate of a step by its schedule."""

    # --- what is kept ---

    @property
    def judged(self) -> Judged:
        """What evaluators are given."""

    def state_dict(self, iteration: int) -> dict[str, Any]:
        """Tensors and plain types; the same on every process."""

    def load_state_dict(self, state: dict[str, Any], run_dir: Path) -> None:
        """
        Raises:
            UsageError: the state was made with other data or other processes.
            RunFailed: it is not a state of this configuration.
        """

    def export(self, path: Path, iteration: int) -> None:
        """Write the weights that others load."""


class Listener:
    """What somebody who watches a run is told. The command line draws it; nobody has to listen."""

    def started(self, facts: dict[str, Any]) -> None:
        """Once, before the first step: images, steps_per_epoch, iterations, iteration, ..."""

    def step(self, row: dict[str, Any]) -> None:
        """At every logging interval: the row that went into metrics.jsonl."""

    def notice(self, sentence: str) -> None:
        """Something a person should know."""


class LinesListener(Listener):
    """Plain lines on standard error, one at most every few seconds."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._iterations, self._told = 0, -math.inf

    def started(self, facts: dict[str, Any]) -> None:
        self._iterations = facts["iterations"]
        doing = "continuing" if facts["iteration"] else facts.get("doing", "pretraining")
        self.notice(
            f"{doing} on {facts['images']:,} images "
            f"of {facts['data']}: iteration {facts['iteration']:,} of {facts['iterations']:,}, "
            f"{facts['steps_per_epoch']:,} an epoch, on {facts['device']}"
        )

    def step(self, row: dict[str, Any]) -> None:
        last = row["iteration"] == self._iterations
        if "loss" in row and not last and time.monotonic() - self._told < self.SECONDS:
            return
        self._told = time.monotonic()
        names = ("loss", "lr", "images_per_second")
        known = [
            name for name in row if name in names or name.startswith(("knn_", "linear_", "val_"))
        ]
        numbers = "".join(f" · {name} {row[name]:.4g}" for name in known)
        self.notice(
            f"epoch {row['epoch']} · iteration {row['iteration']:,}/{self._iterations:,}{numbers}"
        )

    def notice(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)
