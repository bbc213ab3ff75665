"""Pretraining by DINO: the job that `train.run` runs, and the call that starts it.

    path -> bytes -> decoded -> crops (uint8, by resolution) -> device -> photometric -> student, teacher
    -> loss -> one update of student, centre and teacher

Which images and crops make up a step follows from the seed and its number alone, so the job has no
place to remember but the networks.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdino import checkpoint, metrics, train
from xdino.augment import MultiCrop, picture
from xdino.augment.photometric import photometric
from xdino.backbone import Backbone
from xdino.config import Config
from xdino.data import BadImage, CropBatch, CropLoader
from xdino.data.decode import UnreadableImage
from xdino.data.sources import Source
from xdino.job import Evaluator, Listener, LoaderJob
from xdino.learner import Learner
from xdino.metrics.profiling import Profile
from xdino.plan import Begun, Plan, build_learner, check_disk, continue_published, make_plan
from xdino.runtime import distributed, transfer
from xdino.runtime.stopping import StopSignal
from xdino.schedules import StepSettings
from xdino.stepping import StepResult, Work


def pretrain(
    config: Config,
    run_dir: str | Path,
    evaluator: Evaluator | None = None,
    listener: Listener | None = None,
    command: list[str] | None = None,
    stop: StopSignal | None = None,
    extend: int | None = None,
    watching: "Watching | None" = None,
) -> Path:
    """Pretrain, or continue the unfinished run in `run_dir`; arguments and errors as `train.run`.

    `evaluator` is given the teacher's backbone. watching: what else is told of the steps.

    Returns:
        The path of the pretrained backbone.
    """
    train.run(Pretraining(config, watching), run_dir, evaluator, listener, command, stop, extend)
    return Path(run_dir) / checkpoint.BACKBONE_FILE


@dataclasses.dataclass(frozen=True)
class Watching:
    """What is told of the steps besides what every run tells.

    profile: of so many steps a trace of the profiler's. capacity: a plan -> the operations of one of
    its steps on a process, and how many its device can do in a second; None where nobody knows.
    """

    profile: int = 0
    capacity: Callable[[Plan], tuple[float, float] | None] | None = None


def to_device(
    batch: CropBatch, crops: MultiCrop, device: torch.device, fused: bool = False
) -> list[Tensor]:
    """uint8 crops by resolution -> normalised views on the device, each `[V_r, B, C, h, w]`.

    `fused`: by the photometric kernels.
    """
    groups, first = [], 0
    for pixels in batch.crops:
        V, B = pixels.shape[:2]
        table = batch.table[first : first + V].reshape(-1)
        views = transfer.to_device(pixels, device).flatten(0, 1)
        groups.append(photometric(views, table, crops, fused=fused).unflatten(0, (V, B)))
        first += V
    return groups


def loader_of(plan: Plan, rank: int, world_size: int, **options: Any) -> CropLoader:
    """The batches of one process of a run; `options` as of `CropLoader`."""
    return CropLoader(
        plan.source,
        plan.crops,
        plan.config.train.batch_size,
        plan.config.train.seed,
        accumulate=plan.config.train.accumulate,
        rank=rank,
        world_size=world_size,
        max_bad_share=plan.config.data.max_bad_share,
        early_crops=plan.early_crops,
        early_iterations=plan.early_iterations,
        **options,
    )


class Pretraining(LoaderJob[CropBatch]):
    """`train.Job` of a student that learns from its teacher on unlabelled images."""

    plan: Plan
    learner: Learner
    loader: CropLoader

    def __init__(self, config: Config, watching: Watching | None = None) -> None:
        super().__init__(config)
        self.watching = watching or Watching()
        self._profile, self._written = Profile(0), ""
        self._capacity: tuple[float, float] = (0.0, 0.0)
        self.begun: Begun | None = None  # where another trainer's checkpoint goes on

    @property
    def source(self) -> Source:
        return self.plan.source

    # --- before anything is written ---

    def make_plan(self, config: Config) -> None:
        self.take_plan(
            config, lambda precision: make_plan(config, distributed.world_size(), precision)
        )
        self.config = self.plan.config  # with what was measured of bands

    def check_disk(self, run_dir: Path) -> None:
        check_disk(self.plan, run_dir)

    def build(self, from_init: bool) -> None:
        self.learner = distributed.together(lambda: build_learner(self.plan, from_init=from_init))
        if from_init and self.config.train.continue_from:
            self.begun = distributed.together(lambda: continue_published(self.plan, self.learner))
            distributed.agree({"the content of train.continue_from": self.begun.sha256})
        self._alarm = self._new_alarm()

    @property
    def begins_at(self) -> int:
        return self.begun.iteration if self.begun is not None else 0

    def notices(self) -> Iterator[str]:
        yield from self.plan.source.notices()
        yield from self.learner.loss.notices()
        yield from self.begun.notices if self.begun is not None else ()
        if (added := self.config.train.extended) and self.plan.iterations:
            last = self.plan.schedules.lr[-added[-1] * self.steps_per_epoch :]
            yield (
                f"{self.config.train.epochs} epochs, extended by {' and '.join(map(str, added))}: "
                f"in the last {added[-1]} lr is at most {last.max():.3g} and ends at {last[-1]:.3g}"
            )
        if self.learner.kernels.why is not None:
            yield self.learner.kernels.why

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.plan.source.name,
            "data_fingerprint": self.fingerprint,
            "precision": self.plan.precision,
            **self.learner.kernels.facts(),
        }

    def dimensions(self) -> dict[str, Any]:
        return {
            "images": len(self.plan.source),
            "data": self.plan.source.name,
            "total_batch": self.plan.total_batch,
            "peak_lr": float(self.plan.schedules.lr.max()),
            "precision": self.plan.precision,
            "doing": "pretraining",
        }

    # --- steps ---

    def open(self, known_bad: list[BadImage]) -> None:
        capacity, first = self.watching.capacity, distributed.rank() == 0
        self._profile = Profile(self.watching.profile if first else 0)
        known = capacity(self.plan) if capacity is not None and first else None
        self._capacity = known or (0.0, 0.0)
        self.loader = loader_of(
            self.plan,
            distributed.rank(),
            distributed.world_size(),
            **self.loader_options(known_bad),
        )

    def start(self, iteration: int) -> None:
        super().start(iteration)
        self._alarm = self._new_alarm()

    def close(self) -> None:
        self._profile.close()
        super().close()

    def step(self, number: int, lr_factor: float, diagnose: bool, run_dir: Path) -> StepResult:
        self._profile.before_step()
        self.learner.begin(self._settings(number, lr_factor), self.config.train.accumulate)
        for batch in self.next_batches():
            views = to_device(batch, self.plan.crops, self.device, self.learner.kernels.views)
            if number == self.begins_at + 1:
                self._draw(batch, views, run_dir)
            self.learner.add(views)
        result = self.learner.finish(diagnose)
        self._written = self._profile.after_step(run_dir) or self._written
        return self._with_speed(result, number) if diagnose else result

    def _with_speed(self, result: StepResult, number: int) -> StepResult:
        """What is told of a step's gradient, and what its speed is worked out from."""
        told, norm = dict(result.diagnostics), self.learner.stepping.gradient_norm()
        if norm is not None:
            told["gradient_norm"] = norm
        patch = self.judged.patch_size
        if not patch:
            return dataclasses.replace(result, diagnostics=told)
        views = self.loader.crops_at(number - 1).views
        tokens = self.plan.total_batch * sum((view.size // patch) ** 2 for view in views)
        # The curriculum's smaller crops take fewer operations than were counted.
        early = number <= self.plan.early_iterations
        work = Work(tokens, *((0.0, 0.0) if early else self._capacity))
        return dataclasses.replace(result, diagnostics=told, work=work)

    def _settings(self, number: int, lr_factor: float) -> StepSettings:
        settings = self.plan.schedules.at(number - 1)
        return dataclasses.replace(settings, lr=settings.lr * lr_factor)

    def _draw(self, batch: CropBatch, views: list[Tensor], run_dir: Path) -> None:
        """The first batch as the networks see it, beside the images that it was cut from."""
        path = run_dir / "views.png"
        if distributed.rank() != 0 or path.exists():
            return

        def original(number: int) -> np.ndarray | None:
            try:
                return self.plan.source.read(int(batch.indices[number]))
            except (UnreadableImage, OSError):  # another image stands in for it
                return None

        spec, crops = self.plan.spec, self.plan.crops
        picture.save_views(
            path,
            views,
            spec.mean,
            spec.std,
            original,
            batch.table,
            crops.ratio,
            self.plan.source.channels,
        )

    # --- what is told of them ---

    def columns(self, number: int, lr_factor: float) -> dict[str, float]:
        settings = self._settings(number, lr_factor)
        views = self.loader.crops_at(number - 1).views
        sizes = {"global_size": views[0].size}
        if len(views) > 2:
            sizes["local_size"] = views[-1].size
        return {
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            **({"teacher_temp": settings.teacher_temp} if self.learner.loss.of_prototypes else {}),
            **sizes,
        }

    def warning(self, number: int, result: StepResult) -> str | None:
        alarm = self._alarm.look(number, result.loss, result.diagnostics)
        passes = self.learner.passes
        said, self._written = [alarm or "", self._written], ""
        said.append((passes and passes.why_not()) or "")
        return "; ".join(filter(None, said)) or None

    def _new_alarm(self) -> metrics.CollapseAlarm | metrics.EmbeddingAlarm:
        after, objective = self.steps_per_epoch, self.config.loss.objective
        if objective != "dino":
            return metrics.EmbeddingAlarm(objective, after)
        return metrics.CollapseAlarm(self.config.head.prototypes, after)

    def images_of(self, number: int) -> dict[str, Any]:
        loader = self.loader
        micro = [loader.indices_at(number - 1, i) for i in range(loader.accumulate)]
        indices = [int(index) for _, found in micro for index in found]
        sizes = [[size, count] for size, count in loader.crops_at(number - 1).groups]
        return {
            "indices": indices,
            "images": [self.plan.source.describe(index) for index in indices],
            "seeds": [[loader.seed, micro[0][0], index] for index in indices],
            "views": [{"size": size, "count": count} for size, count in sizes],
        }

    def lr(self, number: int) -> float:
        return self.plan.schedules.at(number - 1).lr

    # --- what is kept ---

    @property
    def judged(self) -> Backbone:
        return self.learner.teacher.backbone

    def state_dict(self, iteration: int) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "sampler": self.sampler_state(iteration),
            "spec": self.plan.spec.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], run_dir: Path) -> None:
        self.check_sampler(state, run_dir, ("learner", "sampler", "spec"))
        self.load_learner(state, run_dir)

    def exporter(self, iteration: int) -> Callable[[Path], None]:
        teacher = self.copy_of(self.judged)
        return lambda path: self.export(path, iteration, teacher)

    def export(self, path: Path, iteration: int, teacher: Backbone | None = None) -> None:
        """`teacher`: as it was then, where it is another by now."""
        checkpoint.save_backbone(
            path,
            teacher or self.judged,
            self.plan.spec,
            role="teacher",
            iteration=iteration,
            iterations=self.iterations,
            data=self.plan.source.name,
        )
