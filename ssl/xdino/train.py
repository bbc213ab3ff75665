"""Pretraining from a configuration to a backbone, as one story.

    images -> crops (uint8, by resolution) -> device -> photometric -> student and teacher -> loss
    -> one update of student, centre and teacher -> metrics, checkpoint, k-NN

`iteration` counts completed updates, and everything follows from it: which images come next, every
schedule, where a run continues.
"""

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from xdino import augment, checkpoint, copies, data, distributed, files, metrics, schedules
from xdino import config as configuration
from xdino.config import Config
from xdino.errors import RunFailed, Stopped, UsageError, asked
from xdino.learner import Learner
from xdino.photometric import photometric
from xdino.plan import Plan, build_learner, check_disk, make_plan
from xdino.run import INITIAL_FILE, UNREADABLE_FILE, RunDirectory, environment

Evaluator = Callable[[nn.Module], dict[str, float]]


class Listener:
    """What somebody who watches a run is told. The command line draws it; nobody has to listen."""

    def started(self, facts: dict[str, Any]) -> None:
        """Once, before the first step: images, steps_per_epoch, iterations, iteration, ..."""

    def step(self, row: dict[str, Any]) -> None:
        """At every logging interval: the row that went into metrics.jsonl."""

    def notice(self, sentence: str) -> None:
        """Something a person should know."""


def to_device(
    batch: data.CropBatch, crops: augment.MultiCrop, device: torch.device, fused: bool = False
) -> list[Tensor]:
    """uint8 crops by resolution -> normalised views on the device, each `[V_r, B, C, h, w]`.

    `fused`: by the photometric kernels.
    """
    groups, first = [], 0
    for pixels in batch.crops:
        V, B = pixels.shape[:2]
        table = batch.table[first : first + V].reshape(-1)
        views = copies.to_device(pixels, device).flatten(0, 1)
        groups.append(photometric(views, table, crops, fused=fused).unflatten(0, (V, B)))
        first += V
    return groups


class StopSignal:
    """Remembers SIGTERM, SIGINT and SIGUSR1, so that a run ends between two steps."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self.name = signal.Signals(number).name

    def __enter__(self) -> "StopSignal":
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def pretrain(
    config: Config,
    run_dir: str | Path,
    evaluator: Evaluator | None = None,
    listener: Listener | None = None,
    command: list[str] | None = None,
) -> Path:
    """Pretrain, or continue the unfinished run in `run_dir`.

    Args:
        evaluator: given the teacher's backbone every `evaluate.every` epochs; returns numbers for
            metrics.jsonl and leaves the network as it was. If it fails, training goes on.
        listener: is told how it goes.
        command: what a person typed, for environment.json.

    Returns:
        The path of the pretrained backbone.

    Raises:
        UsageError: cannot be done as configured; nothing was written.
        RunFailed: the world intervened; names the last good checkpoint.
        Stopped: by a signal, after saving.
    """
    listener = listener if listener is not None and distributed.rank() == 0 else Listener()
    plan = make_plan(config, distributed.world_size())
    with asked(f"cannot use {run_dir}"):
        run = RunDirectory(run_dir, config)
    backbone_path = run.path / checkpoint.BACKBONE_FILE
    if run.iteration >= plan.iterations:
        listener.notice(
            f"{run.path} holds a finished run of {plan.iterations} iterations: left alone"
        )
        return backbone_path
    check_disk(plan, run.path)
    learner = build_learner(plan)
    if learner.kernels.why is not None:
        listener.notice(learner.kernels.why)
    trainer = _Trainer(plan, run, learner, evaluator, listener)
    if distributed.rank() == 0:
        run.create()
        facts = environment(plan.device, distributed.world_size(), config.train.seed)
        facts |= {"data": plan.source.name, "data_fingerprint": data.fingerprint(plan.source)}
        chosen = {"network": learner.kernels.network, "views": learner.kernels.views}
        facts |= {"precision": plan.precision, "fused_kernels": chosen}
        run.record_start({**facts, "command": command})
        if run.state is None:
            trainer.export(run.path / INITIAL_FILE)
    distributed.barrier()
    try:
        with StopSignal() as stop:
            trainer.train(stop)
    except (RunFailed, OSError) as error:
        reason = (
            str(error)
            if isinstance(error, RunFailed)
            else f"the disk or the network failed: {error}"
        )
        raise RunFailed(f"{reason}. {trainer.last_good()}") from error
    return backbone_path


class _Trainer:
    """One run under way: the loop, and what it leaves on disk."""

    def __init__(
        self,
        plan: Plan,
        run: RunDirectory,
        learner: Learner,
        evaluator: Evaluator | None,
        listener: Listener,
    ) -> None:
        self.plan, self.run, self.learner = plan, run, learner
        self.evaluator, self.listener = evaluator, listener
        self.iteration = run.iteration
        self.saved_at = run.iteration if run.state else None
        runtime = plan.config.runtime
        self.loader = data.CropLoader(
            plan.source,
            plan.crops,
            plan.config.train.batch_size,
            plan.config.train.seed,
            accumulate=plan.config.train.accumulate,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=min(runtime.workers, os.cpu_count() or 1) if runtime.workers else 0,
            prefetch=runtime.prefetch,
            pin_memory=plan.device.type == "cuda",
            max_bad_share=plan.config.data.max_bad_share,
            early_crops=plan.early_crops,
            early_iterations=plan.early_iterations,
            known_bad=run.unreadable(),
        )
        if run.state is not None:
            self._restore(run.state)

    # --- the loop ---

    def train(self, stop: StopSignal) -> None:
        plan, config = self.plan, self.plan.config
        total = plan.iterations
        log = self._open_log()
        self.listener.started(
            {
                "images": len(plan.source),
                "data": plan.source.name,
                "steps_per_epoch": plan.steps_per_epoch,
                "iteration": self.iteration,
                "iterations": total,
                "total_batch": plan.total_batch,
                "peak_lr": float(plan.schedules.lr.max()),
                "device": str(plan.device),
                "precision": plan.precision,
            }
        )
        clock = _Clock(self.loader)
        batches = self.loader.iterate(self.iteration, total)
        try:
            for _, micro_batches in groupby(batches, key=lambda batch: batch.iteration):
                done = self.iteration + 1
                logs = done % config.runtime.log_every == 0 or done in (1, total)
                settings = plan.schedules.at(self.iteration)
                result = self.learner.step(
                    self._views(micro_batches), settings, config.train.accumulate, diagnose=logs
                )
                self.iteration = done
                if logs:
                    row = self._row(result.loss, result.diagnostics, settings, clock)
                    self._tell(log, row)
                    warning = metrics.collapse_warning(
                        result.loss, result.diagnostics, config.head.prototypes
                    )
                    if warning and done > plan.steps_per_epoch:
                        self.listener.notice(warning)
                ends_epoch = done % plan.steps_per_epoch == 0
                if ends_epoch:
                    # Before saving: a run that is killed here comes back and evaluates.
                    self._end_epoch(log, done // plan.steps_per_epoch)
                if ends_epoch or done % config.runtime.checkpoint_every == 0:
                    self.save()
                    clock.restart()
                if done < total and distributed.any_true(stop.name is not None):
                    self.save()
                    raise Stopped(
                        f"stopped by {stop.name or 'a signal'} after iteration {done} of {total}; "
                        "the same command continues it"
                    )
        finally:
            batches.close()
            if distributed.rank() == 0:  # others may not come: a failure is one process's
                self._tell_bad(self.loader.take_bad_report())
            if log is not None:
                log.close()

    def _views(self, micro_batches: Iterator[data.CropBatch]) -> Iterator[list[Tensor]]:
        for batch in micro_batches:
            fused = self.learner.kernels.views
            groups = to_device(batch, self.plan.crops, self.plan.device, fused)
            picture = self.run.path / "views.png"
            if self.iteration == 0 and distributed.rank() == 0 and not picture.exists():
                metrics.save_views(picture, groups, self.plan.spec.mean, self.plan.spec.std)
            yield groups

    def _row(
        self,
        loss: float,
        diagnostics: dict[str, float],
        settings: schedules.StepSettings,
        clock: "_Clock",
    ) -> dict[str, Any]:
        steps, seconds, waited = clock.lap(self.iteration)
        row: dict[str, Any] = {
            "iteration": self.iteration,
            "epoch": math.ceil(self.iteration / self.plan.steps_per_epoch),
            "loss": loss,
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            "teacher_temp": settings.teacher_temp,
            **self._sizes(),
            **diagnostics,
        }
        if steps:
            row["images_per_second"] = steps * self.plan.total_batch / seconds
            row["wait_share"] = waited / seconds
        resident = metrics.resident_megabytes()
        if resident is not None:
            row["resident_mb"] = round(resident, 1)
        if self.plan.device.type == "cuda":
            row["peak_memory_mb"] = torch.cuda.max_memory_allocated(self.plan.device) / 2**20
        return row

    def _sizes(self) -> dict[str, int]:
        """Of the crops of the step just made, in pixels."""
        views = self.loader.crops_at(self.iteration - 1).views
        sizes = {"global_size": views[0].size}
        return sizes | ({"local_size": views[-1].size} if len(views) > 2 else {})

    def _end_epoch(self, log: metrics.MetricsLog | None, epoch: int) -> None:
        config = self.plan.config
        every = config.evaluate.every
        if self.evaluator is not None and every and epoch % every == 0:
            if distributed.rank() == 0:
                try:
                    scores = self.evaluator(self.learner.teacher.backbone)
                except (OSError, RuntimeError, ValueError, MemoryError) as error:
                    # A number is missing then; the run is worth more than the number.
                    self.listener.notice(
                        f"the evaluation after epoch {epoch} failed, training goes on: {error}"
                    )
                else:
                    self._tell(log, {"iteration": self.iteration, "epoch": epoch, **scores})
            distributed.barrier()

    def _tell_bad(self, found: list[data.BadImage]) -> None:
        """Name unreadable images, and keep them in the run's list, on the first process."""
        bad = sorted(set(found))
        if not bad or distributed.rank() != 0:
            return
        self.run.add_unreadable(bad, self.iteration)
        named = "; ".join(f"{image.where} ({image.why})" for image in bad[:20])
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        self.listener.notice(
            f"skipped {len(bad)} unreadable images (all are in {UNREADABLE_FILE}): {named}{more}"
        )

    def _open_log(self) -> metrics.MetricsLog | None:
        if distributed.rank() != 0:
            return None
        runtime = self.plan.config.runtime
        return metrics.MetricsLog(
            self.run.path,
            self.iteration,
            runtime.wandb,
            runtime.wandb_project,
            configuration.to_tree(self.plan.config),
        )

    def _tell(self, log: metrics.MetricsLog | None, row: dict[str, Any]) -> None:
        if log is not None:
            log.write(row)
        self.listener.step(row)

    # --- what it leaves on disk ---

    def save(self) -> None:
        """The teacher's backbone, then the whole state; once an iteration.

        In this order: a run that is killed between the two continues from the older state and
        writes the same backbone again.
        """
        if self.saved_at == self.iteration:
            return
        self.learner.check()
        rng, bad = zip(
            *distributed.gather((_rng_state(self.plan.device), self.loader.take_bad_report())),
            strict=True,
        )
        self._tell_bad([image for images in bad for image in images])
        if distributed.rank() == 0:
            self.export(self.run.path / checkpoint.BACKBONE_FILE)
            self.run.save(
                {
                    "iteration": self.iteration,
                    "learner": self.learner.state_dict(),
                    "rng": list(rng),
                    "sampler": {
                        "seed": self.plan.config.train.seed,
                        "epoch": self.iteration // self.plan.steps_per_epoch,
                        "step": self.iteration % self.plan.steps_per_epoch,
                        "images": len(self.plan.source),
                        "total_batch": self.plan.total_batch,
                    },
                    "spec": self.plan.spec.to_dict(),
                    "config": configuration.to_tree(self.plan.config),
                    "versions": {"torch": str(torch.__version__)},
                }
            )
            self._keep()
        self.saved_at = self.iteration

    def _keep(self) -> None:
        """A copy of the state that later epochs do not overwrite, every `runtime.keep_every`."""
        epoch, step = divmod(self.iteration, self.plan.steps_per_epoch)
        keep = self.plan.config.runtime.keep_every
        if keep and step == 0 and epoch % keep == 0:
            last = self.run.path / checkpoint.STATE_FILE
            with files.written_beside(last.with_name(f"epoch_{epoch:04}.pt")) as beside:
                shutil.copyfile(last, beside)

    def export(self, path: Path) -> None:
        """The teacher's backbone as it is now."""
        checkpoint.save_backbone(
            path,
            self.learner.teacher.backbone,
            self.plan.spec,
            role="teacher",
            iteration=self.iteration,
            iterations=self.plan.iterations,
            data=self.plan.source.name,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        sampler = state["sampler"]
        for key, now in (("images", len(self.plan.source)), ("total_batch", self.plan.total_batch)):
            if sampler[key] != now:
                raise UsageError(
                    f"{self.run.path} was made with {key.replace('_', ' ')} {sampler[key]}, now it "
                    f"is {now}: continue it with the same data and the same number of processes"
                )
        self.learner.load_state_dict(state["learner"])
        if len(state["rng"]) == distributed.world_size():
            _set_rng_state(state["rng"][distributed.rank()], self.plan.device)

    def last_good(self) -> str:
        """A sentence that names what can be continued from."""
        if self.saved_at is None:
            return "No checkpoint was written yet"
        path = self.run.path / checkpoint.STATE_FILE
        return f"The last good checkpoint is {path}, iteration {self.saved_at}"


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that training draws from (drop path). Crops need none."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class _Clock:
    """Seconds and waiting between two logged steps."""

    def __init__(self, loader: data.CropLoader) -> None:
        self.loader = loader
        self.iteration: int | None = None
        self.restart()

    def restart(self) -> None:
        """Leave out what went by since the last lap (evaluation, checkpoints)."""
        self.time, self.waited = time.perf_counter(), self.loader.wait_seconds
        self.iteration = None

    def lap(self, iteration: int) -> tuple[int, float, float]:
        """Steps, seconds and seconds waited for data since the last lap; 0 steps at the first."""
        now, waited = time.perf_counter(), self.loader.wait_seconds
        lap = (
            iteration - self.iteration if self.iteration is not None else 0,
            max(now - self.time, 1e-9),
            waited - self.waited,
        )
        self.time, self.waited, self.iteration = now, waited, iteration
        return lap
