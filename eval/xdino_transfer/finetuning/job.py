"""Supervised training of a classifier: the job that `train.run` runs.

    path -> bytes -> decoded -> crop, flip, RandAugment (uint8) -> device -> normalised, erased
    -> mixed with soft targets -> classifier (and teacher) -> loss -> one update, the moving average

Which images a step takes and what happens to them follows from the seed and its number alone.

Letters: B images, K classes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdino import checkpoint
from xdino.augment.picture import save_views
from xdino.backbones import compile_backbone
from xdino.data import BadImage
from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino.job import LoaderJob
from xdino.plan.feasibility import gigabytes
from xdino.runtime import distributed, transfer
from xdino.runtime.batch_layout import BatchLayout
from xdino.runtime.drop_path import Rows
from xdino.stepping import StepResult
from xdino_transfer.classification import optim
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import MODEL_FILE, write_classifier
from xdino_transfer.classification.learner import ClassificationLearner, StepSettings
from xdino_transfer.classification.losses import Distillation
from xdino_transfer.classification.scoring import PROTOCOL
from xdino_transfer.finetuning import plan as planning
from xdino_transfer.finetuning.loader import LabelledBatch, LabelledLoader
from xdino_transfer.finetuning.plan import Plan
from xdino_transfer.finetuning.recipe import FineTuning

LARGE = 2**31  # bytes of a step, from which on they are told before it
VIEWS_FILE = "views.png"


class ClassificationJob(LoaderJob[LabelledBatch]):
    """`xdino.job.Job` of a classifier on labelled images."""

    plan: Plan
    learner: ClassificationLearner
    loader: LabelledLoader
    begins_at = 0

    def __init__(self, config: FineTuning) -> None:
        super().__init__(config)
        self._notices: list[str] = []
        self._init: dict[str, Any] = {}

    @property
    def source(self) -> Source:
        return self.plan.train

    # --- before anything is written ---

    def make_plan(self, config: FineTuning) -> None:
        self._init = {  # of a run that is continued
            "init": self.last_start.get("init", config.train.init),
            "init_sha256": self.last_start.get("init_sha256"),
        }
        spec = self.last_start.get("spec")
        self.take_plan(
            config,
            lambda precision: planning.make_plan(
                config, distributed.world_size(), precision, spec, self._first
            ),
        )
        self.config = self.plan.config  # with what was measured of bands

    @property
    def _first(self) -> BatchLayout | None:
        return BatchLayout.from_dict(self.last_start.get("batch"))

    def same_everywhere(self) -> dict[str, Any]:
        return super().same_everywhere() | {"the classes": list(self.plan.classes)}

    def check_disk(self, run_dir: Path) -> None:
        planning.check_disk(self.plan, run_dir)

    def build(self, from_init: bool) -> None:
        config = self.config
        classifier, dropped = distributed.together(
            lambda: planning.build_classifier(self.plan, from_init)
        )
        teacher, remarks = distributed.together(lambda: planning.build_teacher(self.plan))
        if from_init:
            self._init = distributed.together(lambda: planning.init_facts(config))
            distributed.agree({"the content of train.init": self._init.get("init_sha256")})
        self._notices = [*dropped, *remarks]
        classifier.to(self.device)
        o, d = config.optim, config.distillation
        groups = optim.parameter_groups(
            classifier, o.weight_decay, o.layer_decay, o.backbone_factor
        )
        self.learner = ClassificationLearner(
            classifier,
            optim.build(o.name, groups),
            config.train.ema,
            Distillation(d.kind, d.alpha, d.tau),
            teacher,
            o.clip_grad,
            self.plan.precision,
        )
        if config.runtime.compile:
            compile_backbone(classifier.backbone)  # type: ignore[arg-type]

    def notices(self) -> Iterator[str]:
        yield from self.plan.train.notices()
        yield from self._notices
        if self.plan.step_bytes > LARGE:
            train = self.config.train
            yield (
                f"a step of {train.batch_size} images of {self.plan.spec.input_size} pixels takes "
                f"about {gigabytes(self.plan.step_bytes)} of memory (estimated)"
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
            "doing": "fine-tuning" if self._init.get("init") else "training from scratch",
        }

    # --- steps ---

    def open(self, known_bad: list[BadImage]) -> None:
        self.loader = planning.loader_of(
            self.config,
            self.plan.train,
            self.plan.view,
            distributed.rank(),
            distributed.world_size(),
            first=self._first,
            **self.loader_options(known_bad),
        )

    def rows(self) -> Rows:
        return Rows(self.config.train.batch_size * distributed.world_size(), self.loader.mine)

    def step(self, number: int, lr_factor: float, diagnose: bool, run_dir: Path) -> StepResult:
        settings = StepSettings(self.lr(number) * lr_factor)
        self.learner.begin(settings, self.config.train.accumulate)
        for batch in self.next_batches():
            images, targets = self._mixed(batch)
            if number == 1:
                self._draw(images, run_dir)
            self.learner.add(images, targets)
        return self.learner.finish(ask=diagnose)

    def _mixed(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """What the networks see of a micro-batch: images [B, C, s, s] and targets [B, K]."""
        plan, seed = self.plan, self.config.train.seed
        crops = transfer.to_device(batch.crops, self.device)
        labels = transfer.to_device(batch.labels, self.device)
        images = plan.view.finish(crops, batch.drawn, seed)
        size, mixed = batch.part_size, []
        for i in range(0, len(images), size):
            mix = plan.mixup.draw(seed, batch.iteration, batch.part + i // size, *images.shape[2:])
            part = slice(i, i + size)
            mixed.append(plan.mixup(images[part], labels[part], len(plan.classes), mix))
        if len(mixed) == 1:
            return mixed[0]
        shown, targets = zip(*mixed, strict=True)
        return torch.cat(shown), torch.cat(targets)

    def _draw(self, images: Tensor, run_dir: Path) -> None:
        """The first batch as the network sees it."""
        path, spec = run_dir / VIEWS_FILE, self.plan.spec
        if distributed.rank() != 0 or path.exists():
            return
        rows = min(8, len(images))
        columns = min(4, len(images) // rows)
        sheet = images[: rows * columns].unflatten(0, (columns, rows))
        save_views(path, [sheet.float().cpu()], spec.mean, spec.std)

    # --- what is told of them ---

    def columns(self, number: int, lr_factor: float) -> dict[str, float]:
        return {"lr": self.lr(number) * lr_factor}

    def warning(self, number: int, result: StepResult) -> str | None:
        return None

    def images_of(self, number: int) -> dict[str, Any]:
        loader = self.loader
        micro = [loader.images_at(number - 1, i) for i in range(loader.accumulate)]
        indices = [int(index) for _, found, _ in micro for index in found]
        repeats = np.concatenate([found for *_, found in micro]).tolist()
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

    @property
    def judged(self) -> Classifier:
        average = self.learner.ema
        if self.config.evaluate.weights == "average" and average is not None:
            return average.network  # type: ignore[return-value]  # a copy of the classifier
        return self.learner.classifier

    def state_dict(self, iteration: int) -> dict[str, Any]:
        return {
            "kind": FineTuning.kind,
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
            "protocol": PROTOCOL,
            "weights": self.config.evaluate.weights,
            "images": len(self.plan.train),
            **self._init,
        }

    def exporter(self, iteration: int) -> Callable[[Path], None]:
        classifier = self.copy_of(self.judged)
        return lambda path: self.export(path, iteration, classifier)

    def export(self, path: Path, iteration: int, classifier: Classifier | None = None) -> None:
        """The backbone, and beside that of the run the whole classifier, which comes first: a run
        that was killed between the two writes both at its next start.

        `classifier`: as it was then, where it is another by now."""
        classifier = classifier or self.judged
        facts = self.weights_facts(iteration)
        if path.name == checkpoint.BACKBONE_FILE:
            write_classifier(path.with_name(MODEL_FILE), classifier, facts)
        checkpoint.save_backbone(path, classifier.backbone, self.plan.spec, **facts)
