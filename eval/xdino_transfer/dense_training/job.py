"""The job of both dense tasks, but for what their batches and networks are.

    path -> bytes -> decoded -> one view with its labels -> device -> losses by name -> one update

Which images a step takes and what happens to them follows from the seed and its number alone, and so
does what is drawn in the network (dropped paths and channels, samples).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from xdino import checkpoint
from xdino.data import BadImage
from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino.job import LoaderJob
from xdino.plan.feasibility import gigabytes
from xdino.runtime import distributed
from xdino.stepping import StepResult
from xdino_transfer.dense_files import MODEL_FILE, write_dense
from xdino_transfer.dense_training import plan as planning
from xdino_transfer.dense_training import starting
from xdino_transfer.dense_training.learner import DenseLearner, adamw, parameter_groups
from xdino_transfer.dense_training.plan import DensePlan
from xdino_transfer.dense_training.recipe import DenseConfig
from xdino_transfer.detection.views import Views
from xdino_transfer.pyramid import without_class_attention
from xdino_transfer.segmentation.views import TestViews

Batch = TypeVar("Batch")
VIEWS_FILE = "views.png"


class DenseJob(LoaderJob[Batch], Generic[Batch]):
    """`xdino.job.Job` of a segmenter or a detector; a subclass has the members that are abstract here."""

    plan: DensePlan
    learner: DenseLearner[Batch]
    begins_at = 0
    protocol: ClassVar[str]  # of its rows in results.json
    doing: ClassVar[str]  # "learning to segment", for whoever watches

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self._notices: list[str] = []
        self._init: dict[str, Any] = {}

    # --- what the tasks differ in ---

    @abstractmethod
    def planned(self, world_size: int, precision: str, spec: dict[str, Any] | None) -> DensePlan:
        """The plan of `self.config`, as `plan.proven` gives it."""

    @abstractmethod
    def network(self) -> tuple[Any, list[str]]:
        """A new network of `self.plan` in training mode on the CPU, its weights those of
        `self.plan.weights` where there are any; and sentences on what is new."""

    @staticmethod
    @abstractmethod
    def losses(network: Any, batch: Any) -> dict[str, Tensor]:
        """See `learner.Losses`."""

    @abstractmethod
    def open(self, known_bad: list[BadImage]) -> None:
        """Sets `loader`, see `Job.open`."""

    @abstractmethod
    def on_device(self, batch: Batch) -> Any:
        """What `losses` takes."""

    @abstractmethod
    def draw(self, batch: Any, path: Path) -> None:
        """A picture of the first batch, as the network sees it."""

    # --- before anything is written ---

    @property
    def source(self) -> Source:
        return self.plan.train

    def make_plan(self, config: DenseConfig) -> None:
        self._init = {  # of a run that is continued
            "init": self.last_start.get("init", config.train.init),
            "init_sha256": self.last_start.get("init_sha256"),
        }
        spec = self.last_start.get("spec")
        self.take_plan(
            config, lambda precision: self.planned(distributed.world_size(), precision, spec)
        )

    def same_everywhere(self) -> dict[str, Any]:
        return super().same_everywhere() | {"the classes": list(self.plan.classes)}

    def check_disk(self, run_dir: Path) -> None:
        planning.check_disk(self.plan, run_dir)

    def build(self, from_init: bool) -> None:
        config = self.config
        if from_init and config.train.init and self.plan.weights is None:
            # A run that was planned once and has no state yet.
            weights = distributed.together(
                lambda: starting.read(config.train.init, config.model.arch)
            )
            self.plan = planning.with_weights(self.plan, weights)
        elif not from_init:
            self.plan = planning.with_weights(self.plan, None)
        torch.manual_seed(config.train.seed)
        network, self._notices = distributed.together(self.network)
        if from_init:
            self._init = distributed.together(lambda: starting.facts(config.train.init))
            distributed.agree({"the content of train.init": self._init.get("init_sha256")})
        self.plan = planning.with_weights(self.plan, None)  # they are in the network now
        network.to(self.device)
        o = config.optim
        groups = parameter_groups(network, o.weight_decay, o.backbone_factor)
        self.learner = DenseLearner(
            network, self.losses, adamw(groups), o.clip_grad, self.plan.precision
        )

    def notices(self) -> Iterator[str]:
        yield from self.plan.train.notices()
        yield from self._notices
        if self.plan.step_bytes > planning.LARGE:
            images = self.config.train.batch_size
            yield (
                f"a step of {images} image{'s' if images > 1 else ''} takes about "
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
        start = "" if self._init.get("init") else " from scratch"
        return {
            "images": len(self.plan.train),
            "data": self.plan.train.name,
            "total_batch": self.plan.total_batch,
            "peak_lr": float(self.plan.rates.max()),
            "precision": self.plan.precision,
            "doing": f"{self.doing}{start}",
        }

    # --- steps ---

    def step(self, number: int, lr_factor: float, diagnose: bool, run_dir: Path) -> StepResult:
        self.learner.begin(self.lr(number) * lr_factor, self.config.train.accumulate)
        for batch in self.next_batches():
            given = self.on_device(batch)
            path = run_dir / VIEWS_FILE
            if number == 1 and distributed.rank() == 0 and not path.exists():
                self.draw(given, path)
            self.learner.add(given)
        return self.learner.finish(ask=diagnose)

    # --- what is told of them ---

    def columns(self, number: int, lr_factor: float) -> dict[str, float]:
        return {"lr": self.lr(number) * lr_factor}

    def warning(self, number: int, result: StepResult) -> str | None:
        return None

    def images_of(self, number: int) -> dict[str, Any]:
        loader = self.loader
        micro = [loader.indices_at(number - 1, i) for i in range(loader.accumulate)]
        indices = [int(index) for _, found in micro for index in found]
        return {
            "indices": indices,
            "images": [self.plan.train.describe(index) for index in indices],
            "seeds": [[loader.seed, micro[0][0], index] for index in indices],
        }

    def lr(self, number: int) -> float:
        return float(self.plan.rates[number - 1])

    # --- what is kept ---

    @property
    def judged(self) -> Any:
        return self.learner.network

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

    @property
    @abstractmethod
    def test_views(self) -> TestViews | Views:
        """How a picture is shown in a test."""

    def write(self, path: Path, iteration: int, network: Any = None, **facts: Any) -> None:
        """The whole network, as `dense_files.read_dense` reads it; `network`: as of `export`."""
        plan = self.plan
        write_dense(
            path,
            network or self.judged,
            self.weights_facts(iteration) | facts,
            spec=plan.spec,
            classes=plan.classes,
            views=self.test_views,
        )

    def exporter(self, iteration: int) -> Callable[[Path], None]:
        network = self.copy_of(self.judged)
        return lambda path: self.export(path, iteration, network)

    def export(self, path: Path, iteration: int, network: Any = None) -> None:
        """The backbone, and beside that of the run the whole network, which comes first: a run that
        was killed between the two writes both at its next start.

        A pyramid's has stem and blocks, and no class attention, which took no part. `network`: as it
        was then, where it is another by now.
        """
        network = network or self.judged
        if path.name == checkpoint.BACKBONE_FILE:
            self.write(path.with_name(MODEL_FILE), iteration, network)
        backbone = network.backbone
        inner = getattr(backbone, "network", None)
        facts = self.weights_facts(iteration)
        tensors = (backbone if inner is None else inner).state_dict()
        if inner is None:
            tensors = {
                name: value
                for name, value in without_class_attention(tensors).items()
                if not name.startswith("fpn")
            }
            facts |= {"part": "stem and blocks"}
        checkpoint.save_tensors(path, tensors, self.plan.spec, facts)
