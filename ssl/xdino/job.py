"""What the loop of `train` asks of a kind of training, and what it tells whoever watches.

A second kind (a classifier, a detector) is another class with these members: it owns its data, plan,
networks, columns and files, and `train.run` gives it signals, checkpoints, exact resuming, the policy
for numbers that are not finite, metrics and evaluations.

Steps carry their number, counted from 1; `iteration` counts completed steps.
"""

import copy
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import nn

from xdino.backbone import Origin
from xdino.checkpoint import STATE_FILE
from xdino.config import RunConfig
from xdino.data import BadImage, fingerprint
from xdino.data.sources import Source
from xdino.errors import RunFailed, UsageError, reason
from xdino.runtime import distributed, rng
from xdino.runtime.device import resolve_device, resolve_precision
from xdino.runtime.drop_path import Rows, tell_rows
from xdino.stepping import StepResult

#: What a job gives to be judged -> its scores, for metrics.jsonl; leaves the network as it was.
Evaluator = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class OfAllProcesses:
    """An evaluator that every process calls, each to do its part; others run on the first alone.

    It leaves in the same exception on all, asks for signals by `stopping.asked`, and writes on the
    first.
    """

    evaluate: Evaluator

    def __call__(self, judged: Any) -> dict[str, float]:
        return self.evaluate(judged)


class Judged(Protocol):
    """What evaluators are given: a backbone, or the whole network of a job that learns a task."""

    origin: Origin


class Job(Protocol):
    """One kind of training. All processes call the same members in the same order."""

    device: torch.device  # from `make_plan` on, as the next two
    iterations: int
    steps_per_epoch: int
    last_start: Mapping[str, Any]  # of environment.json; set before `make_plan`. "batch": how the
    # run's first start shared out its images (`BatchLayout`), also where this one is the first

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
            UsageError: the state was made with other data.
            RunFailed: it is not a state of this configuration.
        """

    def export(self, path: Path, iteration: int) -> None:
        """Write the weights that others load."""

    def exporter(self, iteration: int) -> Callable[[Path], None] | None:
        """What `export` would do now, to be done later by a thread, whatever is learned meanwhile.

        None where that cannot be: training then waits for every state. One is asked for at a time.
        """

    def before_moving(self, wait: Callable[[], None]) -> None:
        """From here on every step calls `wait` before it moves what `state_dict` gives; small
        tensors (running statistics) may have moved. Without `exporter` it need not."""


Batch = TypeVar("Batch")
Trained = TypeVar("Trained", bound=nn.Module)


class LoaderJob(ABC, Generic[Batch]):
    """What jobs have in common whose micro-batches come from a `DataLoader` of their own.

    A job sets `learner` in `build` and `loader` in `open`, and has the rest of `Job`'s members. Its plan
    says device, precision, total_batch, iterations and steps_per_epoch.
    """

    plan: Any
    learner: Any
    loader: Any

    def __init__(self, config: Any) -> None:
        self.config = config
        self.last_start: Mapping[str, Any] = {}
        self._batches: Generator[Batch, None, None] | None = None
        self._copy: nn.Module | None = None
        self._number = 0  # of the step that comes next, less one

    @property
    @abstractmethod
    def source(self) -> Source:
        """The images that are learned from."""

    def take_plan(self, config: Any, plan: Callable[[str], Any]) -> None:
        """`plan(precision)` on every process, the same precision on all."""
        self.config = config
        precision = self._precision()
        self.plan = distributed.together(lambda: plan(precision))
        self.fingerprint = fingerprint(self.source)
        self.iterations, self.steps_per_epoch = self.plan.iterations, self.plan.steps_per_epoch
        self.device = self.plan.device

    def _precision(self) -> str:
        """ "auto" is bf16 where every process is faster in it; of a run that goes on, what it was."""
        train, device = self.config.train, self.config.runtime.device
        before = self.last_start.get("precision")
        found = distributed.together(
            lambda: resolve_precision(train.precision, resolve_device(device), before)
        )
        return "fp32" if "fp32" in distributed.gather(found) else found

    def same_everywhere(self) -> dict[str, Any]:
        return {"the number of images": len(self.source), "the images' names": self.fingerprint}

    def ask_every_step(self) -> None:
        self.learner.stepping.asks_every_step = True

    # --- steps ---

    def loader_options(self, known_bad: list[BadImage]) -> dict[str, Any]:
        """What every loader is told besides its images and views."""
        runtime = self.config.runtime
        return {
            "workers": min(runtime.workers, os.cpu_count() or 1) if runtime.workers else 0,
            "prefetch": runtime.prefetch,
            "pin_memory": self.device.type == "cuda",
            "known_bad": known_bad,
        }

    def start(self, iteration: int) -> None:
        self.close()
        self._number = iteration
        rows = self.rows() if distributed.world_size() > 1 else None
        for network in self.learner.stepping.networks.values():
            tell_rows(network, rows)
        self._batches = self.loader.iterate(iteration, self.iterations)

    def rows(self) -> Rows:
        """Which images of every micro-batch over all processes are this process's."""
        size, rank = self.config.train.batch_size, distributed.rank()
        return Rows(size * distributed.world_size(), ((rank * size, (rank + 1) * size),))

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def skip(self, number: int) -> None:
        for _ in self.next_batches():
            pass

    def next_batches(self) -> Iterator[Batch]:
        """The micro-batches of the next step, as they are asked for.

        What is drawn between one and the next follows from the seed, the step and the micro-batch,
        whatever was drawn before and by how many processes.
        """
        assert self._batches is not None
        self._number += 1
        train = self.config.train
        for part, batch in enumerate(islice(self._batches, train.accumulate)):
            torch.manual_seed(rng.of_step(train.seed, self._number, part))
            yield batch

    def check(self) -> None:
        self.learner.check()

    # --- what is told of them ---

    @property
    def wait_seconds(self) -> float:
        return float(self.loader.wait_seconds)

    @property
    def images_per_step(self) -> int:
        return int(self.plan.total_batch)

    def take_bad_report(self) -> list[BadImage]:
        return list(self.loader.take_bad_report())

    # --- what is kept ---

    def sampler_state(self, iteration: int) -> dict[str, Any]:
        """Which images come next, and of how many, by which a state knows its own run."""
        return {
            "seed": self.config.train.seed,
            "epoch": iteration // self.steps_per_epoch,
            "step": iteration % self.steps_per_epoch,
            "images": len(self.source),
            "fingerprint": self.fingerprint,
            "total_batch": self.plan.total_batch,
        }

    def check_sampler(self, state: dict[str, Any], run_dir: Path, parts: Sequence[str]) -> None:
        """
        Raises:
            UsageError: the state was made with other data, or other images a step.
            RunFailed: it lacks one of its parts.
        """
        for part in parts:
            if not isinstance(state.get(part), dict):
                raise RunFailed(
                    f"{run_dir / STATE_FILE} is the state of a run, but lacks its {part}"
                )
        sampler = state["sampler"]
        for key, now in (("images", len(self.source)), ("total_batch", self.plan.total_batch)):
            if sampler[key] != now:
                mend = "the same data"
                if key == "total_batch":
                    mend = "train.batch_size x train.accumulate x processes as they were"
                raise UsageError(
                    f"{run_dir} was made with {key.replace('_', ' ')} {sampler[key]}, now it "
                    f"is {now}: continue it with {mend}"
                )
        if sampler.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise UsageError(
                f"{run_dir} was made with other images than those of {self.source.name}: "
                "as many, but of other names, sizes or content. Continue it with its own images, "
                "which may lie anywhere, or choose another folder"
            )

    def exporter(self, iteration: int) -> Callable[[Path], None] | None:
        return None

    def before_moving(self, wait: Callable[[], None]) -> None:
        self.learner.stepping.before_moving = wait

    def copy_of(self, network: Trained) -> Trained:
        """`network` as it is now, on the CPU; the copy that was made before is no more."""
        if self._copy is None:
            self._copy = copy.deepcopy(network).cpu()
        else:
            self._copy.load_state_dict(network.state_dict())
        return cast(Trained, self._copy)

    def load_learner(self, state: dict[str, Any], run_dir: Path) -> None:
        """
        Raises:
            RunFailed: it is not a state of this configuration.
        """
        try:
            self.learner.load_state_dict(state["learner"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise RunFailed(
                f"{run_dir / STATE_FILE} is not a state of this configuration: {reason(error)}"
            ) from error


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
