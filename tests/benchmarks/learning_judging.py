"""What every arm of the learning board shares: its job, its clock, and what judges it.

Minutes are those of the process on its cores, all threads together (`time.process_time`): what else
the machine does costs none, and a thread that reads ahead is paid for. Evaluations are left out. Ten
steps of a pilot say how many whole epochs the minutes buy, at least one; schedules are laid out for
as many, so that every arm ends where its schedule ends.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sklearn.decomposition import PCA
from torch import nn

from xdino import config, data
from xdino.plan import Plan
from xdino_eval import knn
from xdino_eval.features import Features, extract, pixels
from xdino_eval.linear import logistic_probe
from xdino_eval.transform import EvalTransform

NEIGHBOURS = 20
STRENGTHS = (1e-2, 1.0, 1e2)  # of the linear probe: a held-out tenth of train chooses
COMPONENTS = 1024  # of features wider than that: raw pixels
PILOT = (3, 13)  # steps between which the clock runs


@dataclass(frozen=True)
class Arm:
    """kind: "pixels", "untrained", "supervised", "published", "ours" or "auto".

    settings: dotted keys of the configuration that differ from the board's. change: of `CHANGES`,
    what no key says.
    """

    kind: str
    settings: Mapping[str, str] = field(default_factory=dict)
    change: str = ""


@dataclass(frozen=True)
class Job:
    """One arm on one data set by one seed. settings: of the board, for every arm."""

    arm: Arm
    path: str
    seed: int
    minutes: float
    points: int  # evaluations along the way, about
    settings: Mapping[str, str]
    dino: str | None = None
    xcit: str | None = None

    def configured(self, epochs: int = 1) -> config.Config:
        own = {"data.path": self.path, "train.seed": str(self.seed), "train.epochs": str(epochs)}
        quiet = {"runtime.device": "cpu", "runtime.workers": "1", "runtime.prefetch": "1"}
        tree: dict[str, dict[str, str]] = {}
        for key, value in (quiet | {**self.settings, **self.arm.settings} | own).items():
            section, _, leaf = key.partition(".")
            tree.setdefault(section, {})[leaf] = value
        return config.parse(tree)

    def epochs(self, seconds_a_step: float, steps: int) -> int:
        """Whole epochs of `steps` steps that the minutes buy, at least one."""
        return max(1, int(60 * self.minutes / (seconds_a_step * steps)))


Say = Callable[[dict[str, Any]], None]  # a row for the board; returns when it is this arm's turn


# Judging, the same for every arm


class Judge:
    """k-NN, and at the end a linear probe, of features of whole images."""

    def __init__(self, plan: Plan) -> None:
        self.splits = data.open_splits(plan.config.data.path, channels=plan.spec.in_chans)
        self.size = plan.spec.input_size

    def features(self, backbone: nn.Module | None) -> list[Features]:
        """Of the training and the validation images; None: their pixels."""
        if backbone is None:
            return [pixels(source, self.size) for source in self.splits]
        transform = EvalTransform.of(backbone)
        return [extract(backbone, source, transform, workers=1) for source in self.splits]

    def __call__(self, backbone: nn.Module | None, at_end: bool = False) -> dict[str, float | None]:
        bank, queries = self.features(backbone)
        found = {"knn": knn.evaluate(bank, queries, [NEIGHBOURS])[0].top1}
        if at_end:
            bank, queries = principal(bank, queries)
            found["linear"] = logistic_probe(bank, queries, STRENGTHS).row.top1
        return found


def principal(bank: Features, queries: Features) -> list[Features]:
    """Their first `COMPONENTS` principal components, where there are more dimensions (raw pixels).

    On 12,288 pixels the probe's L-BFGS takes tens of minutes.
    """
    if bank.features.shape[1] <= COMPONENTS:
        return [bank, queries]
    count = min(COMPONENTS, len(bank.features))
    pca = PCA(count, svd_solver="randomized", random_state=0).fit(bank.features.numpy())
    return [
        replace(each, features=torch.from_numpy(pca.transform(each.features.numpy())))
        for each in (bank, queries)
    ]


class Clock:
    """Seconds of this process, but for what happens in `paused`."""

    def __init__(self) -> None:
        self._since = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self._since += time.process_time() - began
