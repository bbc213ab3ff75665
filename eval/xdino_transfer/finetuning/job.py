"""Supervised training of a classifier: the job that `train.run` runs.

    path -> bytes -> decoded -> crop, flip, RandAugment (uint8) -> device -> normalised, erased
    -> mixed with soft targets -> classifier (and teacher) -> loss -> one update, the moving average

Which images a step takes and what happens to them follows from the seed and its number alone.

Letters: B images, K classes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdino import checkpoint
from xdino.augment.picture import save_views
from xdino.backbones import compile_backbone
from xdino.data import BadImage
from xdino.runtime import distributed, transfer
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
from xdino_transfer.supervised import VIEWS_FILE, SupervisedJob


class ClassificationJob(SupervisedJob[LabelledBatch]):
    """`xdino.job.Job` of a classifier on labelled images."""

    plan: Plan
    learner: ClassificationLearner
    loader: LabelledLoader
    protocol = PROTOCOL

    def planned(self, precision: str, spec: dict[str, Any] | None) -> Plan:
        processes = distributed.world_size()
        return planning.make_plan(self.config, processes, precision, spec, self.first)

    def init_facts(self) -> dict[str, Any]:
        return planning.init_facts(self.config)

    @property
    def doing(self) -> str:
        return "fine-tuning" if self.from_weights else "training from scratch"

    @property
    def of_size(self) -> str:
        return f" of {self.plan.spec.input_size} pixels"

    def build(self, from_init: bool) -> None:
        config = self.config
        classifier, dropped = distributed.together(
            lambda: planning.build_classifier(self.plan, from_init)
        )
        teacher, remarks = distributed.together(lambda: planning.build_teacher(self.plan))
        if from_init:
            self.begin_with()
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

    # --- steps ---

    def open(self, known_bad: list[BadImage]) -> None:
        self.loader = planning.loader_of(
            self.config,
            self.plan.train,
            self.plan.view,
            distributed.rank(),
            distributed.world_size(),
            first=self.first,
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

    # --- what is kept ---

    @property
    def judged(self) -> Classifier:
        average = self.learner.ema
        if self.config.evaluate.weights == "average" and average is not None:
            return average.network  # type: ignore[return-value]  # a copy of the classifier
        return self.learner.classifier

    def weights_facts(self, iteration: int) -> dict[str, Any]:
        return super().weights_facts(iteration) | {"weights": self.config.evaluate.weights}

    def export(self, path: Path, iteration: int, network: Classifier | None = None) -> None:
        """The backbone, and beside that of the run the whole classifier, which comes first: a run
        that was killed between the two writes both at its next start."""
        classifier = network or self.judged
        facts = self.weights_facts(iteration)
        if path.name == checkpoint.BACKBONE_FILE:
            write_classifier(path.with_name(MODEL_FILE), classifier, facts)
        checkpoint.save_backbone(path, classifier.backbone, self.plan.spec, **facts)
