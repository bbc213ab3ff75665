"""The job of both dense tasks, but for what their batches and networks are.

    path -> bytes -> decoded -> one view with its labels -> device -> losses by name -> one update

Which images a step takes and what happens to them follows from the seed and its number alone, and so
does what is drawn in the network (dropped paths and channels, samples).
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from xdino import checkpoint
from xdino.data import BadImage
from xdino.runtime import distributed
from xdino.stepping import StepResult
from xdino_transfer.dense_files import MODEL_FILE, write_dense
from xdino_transfer.dense_training import plan as planning
from xdino_transfer.dense_training import starting
from xdino_transfer.dense_training.learner import DenseLearner, adamw, parameter_groups
from xdino_transfer.dense_training.plan import DensePlan
from xdino_transfer.detection.views import Views
from xdino_transfer.pyramid import without_class_attention
from xdino_transfer.segmentation.views import TestViews
from xdino_transfer.supervised import VIEWS_FILE, SupervisedJob

Batch = TypeVar("Batch")


class DenseJob(SupervisedJob[Batch], Generic[Batch]):
    """`xdino.job.Job` of a segmenter or a detector; a subclass has the members that are abstract here."""

    plan: DensePlan
    learner: DenseLearner[Batch]
    task: ClassVar[str]  # "learning to segment", for whoever watches

    # --- what the tasks differ in ---

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

    def init_facts(self) -> dict[str, Any]:
        return starting.facts(self.config.train.init)

    @property
    def doing(self) -> str:
        return self.task if self.from_weights else f"{self.task} from scratch"

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
            self.begin_with()
        self.plan = planning.with_weights(self.plan, None)  # they are in the network now
        network.to(self.device)
        o = config.optim
        groups = parameter_groups(network, o.weight_decay, o.backbone_factor)
        self.learner = DenseLearner(
            network, self.losses, adamw(groups), o.clip_grad, self.plan.precision
        )

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

    # --- what is kept ---

    @property
    def judged(self) -> Any:
        return self.learner.network

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
