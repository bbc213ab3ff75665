"""What the jobs have in common that learn with labels: a classifier's, a segmenter's, a detector's.

They learn from one split, are scored on another, begin with weights or from scratch, and keep the whole
network beside its backbone. A run goes on with the same classes, whatever it began with.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino.job import LoaderJob
from xdino.plan import feasibility
from xdino.plan.feasibility import gigabytes
from xdino.runtime import distributed
from xdino.runtime.batch_layout import BatchLayout
from xdino.stepping import StepResult

LARGE = 2**31  # bytes of a step, from which on they are told before it
VIEWS_FILE = "views.png"

Batch = TypeVar("Batch")


class SupervisedJob(LoaderJob[Batch], Generic[Batch]):
    """`xdino.job.Job` of labelled images; a subclass has what is abstract here and missing there.

    Its plan says besides: train, classes, spec (of the backbone), rates [iterations], step_bytes,
    state_bytes, and the config with what the data decided.
    """

    begins_at = 0
    protocol: ClassVar[str]  # of its rows in results.json

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._notices: list[str] = []
        self._init: dict[str, Any] = {}

    # --- what the tasks differ in ---

    @abstractmethod
    def planned(self, precision: str, spec: dict[str, Any] | None) -> Any:
        """The plan of `self.config`; `spec`: of a run that goes on, whose first weights may be gone."""

    @abstractmethod
    def init_facts(self) -> dict[str, Any]:
        """What the run starts from, as `init`, and its SHA-256, as `init_sha256`."""

    @property
    @abstractmethod
    def doing(self) -> str:
        """For whoever watches: "fine-tuning"."""

    @property
    @abstractmethod
    def judged(self) -> Any:
        """See `Job.judged`."""

    @abstractmethod
    def export(self, path: Path, iteration: int, network: Any = None) -> None:
        """See `Job.export`; `network`: as it was then, where it is another by now."""

    # --- before anything is written ---

    @property
    def source(self) -> Source:
        found: Source = self.plan.train
        return found

    @property
    def first(self) -> BatchLayout | None:
        """How the run's first start shared out a step's images."""
        return BatchLayout.from_dict(self.last_start.get("batch"))

    def make_plan(self, config: Any) -> None:
        self._init = {  # of a run that is continued
            "init": self.last_start.get("init", config.train.init),
            "init_sha256": self.last_start.get("init_sha256"),
        }
        spec = self.last_start.get("spec")
        self.take_plan(config, lambda precision: self.planned(precision, spec))
        self.config = self.plan.config

    def same_everywhere(self) -> dict[str, Any]:
        return super().same_everywhere() | {"the classes": list(self.plan.classes)}

    def check_disk(self, run_dir: Path) -> None:
        states = self.config.runtime.keep_last
        feasibility.check_disk(run_dir, states * self.plan.state_bytes, states)

    def begin_with(self) -> None:
        """Note what the run starts from, and that it is the same on every process."""
        self._init = distributed.together(self.init_facts)
        distributed.agree({"the content of train.init": self._init.get("init_sha256")})

    @property
    def of_size(self) -> str:
        """ " of 224 pixels", where every image of a step has the same."""
        return ""

    @property
    def from_weights(self) -> bool:
        return bool(self._init.get("init"))

    def notices(self) -> Iterator[str]:
        yield from self.plan.train.notices()
        yield from self._notices
        if self.plan.step_bytes > LARGE:
            images = self.config.train.batch_size
            yield (
                f"a step of {images} image{'s' if images > 1 else ''}{self.of_size} takes about "
                f"{gigabytes(self.plan.step_bytes)} of memory (estimated)"
            )

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.plan.train.name,
            "data_fingerprint": self.fingerprint,
            "precision": self.plan.precision,
            "spec": self.plan.spec.to_dict(),
            "classes": len(self.plan.classes),
            **self._init,
        }

    def dimensions(self) -> dict[str, Any]:
        return {
            "images": len(self.plan.train),
            "data": self.plan.train.name,
            "total_batch": self.plan.total_batch,
            "peak_lr": float(self.plan.rates.max()),
            "precision": self.plan.precision,
            "doing": self.doing,
        }

    # --- what is told of steps ---

    def columns(self, number: int, lr_factor: float) -> dict[str, float]:
        return {"lr": self.lr(number) * lr_factor}

    def warning(self, number: int, result: StepResult) -> str | None:
        return None

    def images_of(self, number: int) -> dict[str, Any]:
        loader = self.loader
        micro = [loader.images_at(number - 1, i) for i in range(loader.accumulate)]
        indices, repeats = (
            np.concatenate([part[which] for part in micro]).tolist() for which in (1, 2)
        )
        return {
            "indices": indices,
            "images": [self.plan.train.describe(index) for index in indices],
            "seeds": [
                [loader.seed, micro[0][0], index, repeat]
                for index, repeat in zip(indices, repeats, strict=True)
            ],
        }

    def lr(self, number: int) -> float:
        return float(self.plan.rates[number - 1])

    # --- what is kept ---

    def state_dict(self, iteration: int) -> dict[str, Any]:
        return {
            "kind": self.config.kind,
            "learner": self.learner.state_dict(),
            "sampler": self.sampler_state(iteration),
            "spec": self.plan.spec.to_dict(),
            "classes": list(self.plan.classes),
        }

    def load_state_dict(self, state: dict[str, Any], run_dir: Path) -> None:
        self.check_sampler(state, run_dir, ("learner", "sampler"))
        if state.get("classes") != [*self.plan.classes]:
            raise UsageError(
                f"{run_dir} was made with other classes than those of {self.source.name}. Continue "
                "it with its own images, which may lie anywhere, or choose another folder"
            )
        self.load_learner(state, run_dir)

    def weights_facts(self, iteration: int) -> dict[str, Any]:
        """What the header of a file of weights says besides the network."""
        return {
            "iteration": iteration,
            "iterations": self.iterations,
            "data": self.plan.train.name,
            "protocol": self.protocol,
            "images": len(self.plan.train),
            **self._init,
        }

    def exporter(self, iteration: int) -> Callable[[Path], None]:
        network = self.copy_of(self.judged)
        return lambda path: self.export(path, iteration, network)
