"""Arms of the learning board that `pretrain` trains, by settings, by `auto`, or with what no key says."""

import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from learning_judging import PILOT, Arm, Clock, Job, Judge, Say
from torch import Tensor, nn

from xdino import checkpoint, config, student_teacher
from xdino.forecast import choosing
from xdino.job import Listener
from xdino.plan import make_plan
from xdino.pretraining import pretrain
from xdino_launch.local import evaluator_of

# What BatchNorm normalises by: no keys, for none of it is published


@contextlib.contextmanager
def teacher_in_evaluation() -> Iterator[None]:
    """The teacher normalises by the student's running statistics, not by those of its own batch."""

    def follow(
        teacher: nn.Module, student: nn.Module, momentum: float, still: Tensor | None = None
    ) -> None:
        student_teacher.update_teacher(teacher, student, momentum, still)
        theirs = dict(student.named_buffers())
        for name, buffer in teacher.named_buffers():
            buffer.copy_(theirs[name])
        teacher.eval()

    with mock.patch("xdino.learner.update_teacher", follow):
        yield


@contextlib.contextmanager
def statistics_at_rest(after: int = 50) -> Iterator[None]:
    """From step `after` on, student and teacher normalise by the statistics gathered until then."""
    steps = itertools.count(1)

    def follow(
        teacher: nn.Module, student: nn.Module, momentum: float, still: Tensor | None = None
    ) -> None:
        student_teacher.update_teacher(teacher, student, momentum, still)
        if next(steps) == after:
            for module in (*teacher.modules(), *student.modules()):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    with mock.patch("xdino.learner.update_teacher", follow):
        yield


CHANGES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "teacher in evaluation": teacher_in_evaluation,
    "statistics at rest": statistics_at_rest,
}


# Ours


class _EnoughSeen(Exception):
    """The pilot has seen enough."""


class _Pilot(Listener):
    """Times the first steps, then ends the run."""

    def step(self, row: dict[str, Any]) -> None:
        if row["iteration"] == PILOT[0]:
            self.clock = Clock()
        elif row["iteration"] == PILOT[1]:
            self.seconds = self.clock.seconds / (PILOT[1] - PILOT[0])
            raise _EnoughSeen


def train_ours(job: Job, say: Say) -> None:
    """`pretrain`, unchanged; checkpoints are written as ever, and paid for."""
    steps = make_plan(job.configured()).steps_per_epoch
    with tempfile.TemporaryDirectory() as folder:
        pilot = _Pilot()
        told = replaced(job.configured(epochs=1 + PILOT[1] // steps), "runtime", log_every=1)
        with contextlib.suppress(_EnoughSeen):
            pretrain(told, Path(folder) / "pilot", listener=pilot)
        epochs = job.epochs(pilot.seconds, steps)
        every = max(1, epochs // job.points)
        asked = replaced(job.configured(epochs), "evaluate", every=every)
        asked = replaced(asked, "runtime", keep_every=0)
        judge = Judge(make_plan(asked))
        done = itertools.count(0, every * steps)
        clock = Clock()

        def evaluate(backbone: nn.Module) -> dict[str, float]:
            minutes, number = clock.seconds / 60, next(done)
            with clock.paused():
                found = judge(backbone)
                if number < epochs * steps:
                    say({"step": number, "minutes": minutes, **found})
            return {"knn_top1": found["knn"] or 0.0}

        with CHANGES[job.arm.change]():
            path = pretrain(asked, Path(folder) / "run", evaluate)
        minutes = clock.seconds / 60
        found = judge(checkpoint.load_backbone(path), at_end=True)
    say({"step": epochs * steps, "minutes": minutes, "last": True, **found})


def train_auto(job: Job, say: Say) -> None:
    """What `xdino pretrain auto --minutes N` chooses for the images; nothing of the board's settings."""
    given = {"data.path": job.path, "train.seed": str(job.seed), "runtime.device": "cpu"}
    wanted = choosing.Asked(job.minutes, None, given)
    device = torch.device("cpu")
    # Its minutes are the board's: CPU time, which what else runs on the core does not use up.
    timed = functools.partial(choosing.time_steps, clock=time.process_time)
    with (
        mock.patch.object(time, "monotonic", time.process_time),
        mock.patch.object(choosing, "time_steps", timed),
    ):
        began = time.monotonic()
        recipe = choosing.Choosing(wanted, None, device, began, print, evaluator_of).recipe()
    chosen = {
        choice.key: choice.value
        for choice in recipe.choices
        if not choice.key.startswith(
            ("runtime.", "evaluate.", "data.", "train.epochs", "train.images_")
        )
    }
    train_ours(replace(job, arm=Arm("ours", chosen), settings={}), say)


def replaced(settings: config.Config, section: str, **values: Any) -> config.Config:
    """The configuration with some keys of a section changed."""
    return replace(settings, **{section: replace(getattr(settings, section), **values)})
