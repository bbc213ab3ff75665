"""What learns on the learning board: each arm in a process of its own, by its kind."""

from collections.abc import Callable

import torch
from learning_judging import Job, Judge, Say
from learning_loops import train_published, train_supervised
from learning_ours import train_auto, train_ours

from xdino.plan import make_plan

TRAINERS: dict[str, Callable[[Job, Say], None]] = {
    "ours": train_ours,
    "auto": train_auto,
    "published": train_published,
    "supervised": train_supervised,
}


def run(job: Job, say: Say) -> None:
    """Train and judge; a row along the way has "step" and "knn", the last one "linear" too."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    kind = job.arm.kind
    if kind in TRAINERS:
        TRAINERS[kind](job, say)
        return
    plan = make_plan(job.configured())
    backbone = plan.spec.build() if kind == "untrained" else None
    say({"step": 0, "minutes": 0.0, "last": True, **Judge(plan)(backbone, at_end=True)})
