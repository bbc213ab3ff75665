"""Pretraining from a configuration to a backbone, as one story.

    images -> crops (uint8, by resolution) -> device -> photometric -> student and teacher -> loss
    -> one update of student, centre and teacher -> metrics, checkpoint, k-NN

`iteration` counts completed updates, and everything follows from it: which images come next, every
schedule, where a run continues.
"""

import contextlib
import dataclasses
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdino import augment, checkpoint, data, metrics, nonfinite, schedules
from xdino import config as configuration
from xdino.augment.photometric import photometric
from xdino.backbone import Backbone
from xdino.config import Config
from xdino.errors import NonFinite, RunFailed, Stopped, UsageError, reason
from xdino.learner import Learner, StepResult
from xdino.metrics import check_writable
from xdino.plan import Plan, build_learner, check_disk, make_plan
from xdino.run_directory import INITIAL_FILE, UNREADABLE_FILE, RunDirectory, environment
from xdino.runtime import distributed, transfer
from xdino.runtime.lock import Lock
from xdino.runtime.stopping import StopSignal

Evaluator = Callable[[Backbone], dict[str, float]]


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
        views = transfer.to_device(pixels, device).flatten(0, 1)
        groups.append(photometric(views, table, crops, fused=fused).unflatten(0, (V, B)))
        first += V
    return groups


def pretrain(
    config: Config,
    run_dir: str | Path,
    evaluator: Evaluator | None = None,
    listener: Listener | None = None,
    command: list[str] | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Pretrain, or continue the unfinished run in `run_dir`.

    The first process alone looks at the folder and writes into it; the others go by what it says.

    Args:
        evaluator: given the teacher's backbone every `evaluate.every` epochs; returns numbers for
            metrics.jsonl and leaves the network as it was. If it fails, training goes on.
        listener: is told how it goes.
        command: what a person typed, for environment.json.
        stop: who listens to signals already; None to listen from here on.

    Returns:
        The path of the pretrained backbone.

    Raises:
        UsageError: cannot be done as configured; nothing was written.
        RunFailed: the world intervened; names the last good checkpoint.
        Stopped: by a signal, after saving.
    """
    listener = listener if listener is not None and distributed.rank() == 0 else Listener()
    run = RunDirectory(run_dir)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        with stop.abandoning("while it was planned"), distributed.heard():
            distributed.agree({"the configuration": configuration.to_yaml(config)})
            config = distributed.from_first(lambda: run.resolve(config))
            plan = distributed.together(lambda: make_plan(config, distributed.world_size()))
            fingerprint = data.fingerprint(plan.source)
            distributed.agree(
                {"the number of images": len(plan.source), "the images' names": fingerprint}
            )
            if distributed.from_first(lambda: _is_finished(run, plan, evaluator)):
                listener.notice(
                    f"{run.path} holds a finished run of {plan.iterations} iterations: left alone"
                )
                return run.path / checkpoint.BACKBONE_FILE
            distributed.from_first(lambda: check_disk(plan, run.path))
            begun = distributed.from_first(run.has_state)
            learner = distributed.together(lambda: build_learner(plan, from_init=not begun))
        for sentence in plan.source.notices():
            listener.notice(sentence)
        if learner.kernels.why is not None:
            listener.notice(learner.kernels.why)
        facts = environment(plan.device, distributed.world_size(), config.train.seed)
        chosen = {"network": learner.kernels.network, "views": learner.kernels.views}
        facts |= {"data": plan.source.name, "data_fingerprint": fingerprint}
        facts |= {"precision": plan.precision, "fused_kernels": chosen}
        facts |= {"compiled": learner.kernels.compiled, "command": command}
        trainer: _Trainer | None = None
        try:
            with distributed.heard():
                notice = distributed.from_first(lambda: _owned(run, config, stack))
                if notice is not None:
                    listener.notice(notice)
                trainer = _Trainer(plan, run, learner, evaluator, listener, stop, fingerprint)
                trainer.restore()
                distributed.from_first(lambda: trainer.begin(config, facts))
                trainer.train()
        except (RunFailed, OSError, RuntimeError, MemoryError) as error:
            failure = _sentence(error)
            if failure is None:
                raise
            good = f". {trainer.last_good()}" if trainer is not None else ""
            raise RunFailed(f"{failure}{good}") from error
    return run.path / checkpoint.BACKBONE_FILE


def _owned(run: RunDirectory, config: Config, stack: contextlib.ExitStack) -> str | None:
    """Take the run's folder, making it if need be; a notice where a dead process held it."""
    check_writable(run.path)
    lock = stack.enter_context(Lock(run.path))
    run.resolve(config)  # once more: another process may have begun a run since
    return lock.notice


def _owes_evaluation(
    run: RunDirectory, plan: Plan, evaluator: Evaluator | None, iteration: int
) -> bool:
    """Whether the state of this iteration is to be evaluated and was not (a kill came between)."""
    every = plan.config.evaluate.every
    epoch, step = divmod(iteration, plan.steps_per_epoch)
    if evaluator is None or not every or not epoch or step or epoch % every:
        return False
    return not any(
        row.get("iteration") == iteration and "loss" not in row and "linear_top1" not in row
        for row in run.rows()
    )


def _is_finished(run: RunDirectory, plan: Plan, evaluator: Evaluator | None) -> bool:
    """Whether nothing is left to do; a damaged state is noticed here, and mended by going on."""
    iteration = run.backbone_iteration()  # written after the state
    if not run.has_state() or iteration is None or iteration < plan.iterations:
        return False
    try:
        checkpoint.check_state(run.state_file)
    except RunFailed:
        return False
    return not _owes_evaluation(run, plan, evaluator, iteration)


def _sentence(error: Exception) -> str | None:
    """What the world did, or None for what is a fault of this program."""
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, OSError):
        return f"the disk or the network failed: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory does not suffice: lower train.batch_size and raise train.accumulate, "
            "or set runtime.activation_checkpointing true"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "the memory does not suffice: lower train.batch_size, runtime.prefetch or head.prototypes"
    return None


class _Trainer:
    """One run under way: the loop, and what it leaves on disk."""

    def __init__(
        self,
        plan: Plan,
        run: RunDirectory,
        learner: Learner,
        evaluator: Evaluator | None,
        listener: Listener,
        stop: StopSignal,
        fingerprint: str,
    ) -> None:
        self.plan, self.run, self.learner = plan, run, learner
        self.evaluator, self.listener, self.stop = evaluator, listener, stop
        self.fingerprint = fingerprint
        self.iteration = 0
        self.saved_at: int | None = None
        self.loaded_at = 0
        self.guard = nonfinite.Guard(nonfinite.Policy.parse(plan.config.train.nonfinite))
        # A step can be skipped only if its trouble is known before the next one.
        learner.asks_every_step = self.guard.policy.kind == "skip"
        self.first: io.BytesIO | None = None  # the state to go back to before one is saved
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
            known_bad=distributed.from_first(run.unreadable),
        )

    # --- the loop ---

    def train(self) -> None:
        """Every iteration that is left, and the evaluations that are due.

        Raises:
            Stopped: by a signal, after saving.
        """
        log = self._open_log()
        self.listener.started(
            {
                "images": len(self.plan.source),
                "data": self.plan.source.name,
                "steps_per_epoch": self.plan.steps_per_epoch,
                "iteration": self.iteration,
                "iterations": self.plan.iterations,
                "total_batch": self.plan.total_batch,
                "peak_lr": float(self.plan.schedules.lr.max()),
                "device": str(self.plan.device),
                "precision": self.plan.precision,
            }
        )
        try:
            if distributed.from_first(self._owes):
                self._evaluate(log)
            while True:
                try:
                    return self._loop(log)
                except NonFinite as error:
                    self._go_back(error)
                    if log is not None:
                        log.close()
                    log = self._open_log()  # without the rows of what is made again
        finally:
            if distributed.rank() == 0:  # others may not come: a failure is one process's
                self._tell_bad(self.loader.take_bad_report())
            if log is not None:
                log.close()

    def _loop(self, log: metrics.MetricsLog | None) -> None:
        plan, config, total = self.plan, self.plan.config, self.plan.iterations
        clock = _Clock(self.loader)
        alarm = metrics.CollapseAlarm(config.head.prototypes, after=plan.steps_per_epoch)
        batches = self.loader.iterate(self.iteration, total)
        try:
            for _, micro_batches in groupby(batches, key=lambda batch: batch.iteration):
                done = self.iteration + 1
                logs = done % config.runtime.log_every == 0 or done in (1, total)
                settings = self._settings(done)
                result = self._step(micro_batches, settings, logs)
                self.iteration = done
                if result is None:
                    row = {"iteration": done, "epoch": self._epoch(done), "skipped": 1}
                    self._tell(log, row)
                elif logs:
                    row = self._row(result.loss, result.diagnostics, settings, clock)
                    self._tell(log, row)
                    warning = alarm.look(done, result.loss, result.diagnostics)
                    if warning:
                        self.listener.notice(warning)
                epoch, left = divmod(done, plan.steps_per_epoch)
                if left == 0 or done % config.runtime.checkpoint_every == 0:
                    self.save()
                    clock.restart()
                if done < total:
                    self._stop_if_asked()
                if left == 0 and self._evaluates_after(epoch):
                    self._evaluate(log)
                    clock.restart()
        finally:
            batches.close()

    def _stop_if_asked(self) -> None:
        """Raises Stopped on all processes, after saving, where one of them was asked to stop."""
        if distributed.any_true(self.stop.name is not None):
            self.save()
            raise Stopped(
                f"stopped by {self.stop.name or 'a signal'} after iteration {self.iteration} of "
                f"{self.plan.iterations}; the same command continues it"
            )

    def _settings(self, number: int) -> schedules.StepSettings:
        """Of step `number`, counted from 1."""
        settings = self.plan.schedules.at(number - 1)
        return dataclasses.replace(settings, lr=settings.lr * self.guard.lr_factor)

    def _epoch(self, number: int) -> int:
        return math.ceil(number / self.plan.steps_per_epoch)

    def _step(
        self, batches: Iterator[data.CropBatch], settings: schedules.StepSettings, logs: bool
    ) -> StepResult | None:
        """One step; None where it was left out, as `train.nonfinite` says."""
        number = self.iteration + 1
        if number in self.guard.left_out:
            return None
        try:
            result = self.learner.step(
                self._views(batches), settings, self.plan.config.train.accumulate, diagnose=logs
            )
        except NonFinite as error:
            broke = number - error.standing + 1
            if self._not_finite(error, broke) != "skip":
                raise
            self.listener.notice(f"iteration {broke} was skipped: {error}")
            return None
        self.guard.went_well()
        return result

    def _not_finite(self, error: NonFinite, number: int) -> str:
        """What becomes of step `number`, which broke; written down before it is done."""
        error.number = number
        before = self.guard.state()
        error.action = self.guard.decide(error, number)
        facts = distributed.gather(self._images_of(number))
        settings = self.plan.schedules.at(number - 1)
        event = {
            "iteration": number,
            "epoch": self._epoch(number),
            "what": str(error),
            "loss": error.loss,
            "lr": settings.lr * before["lr_factor"],
            "lr_factor": before["lr_factor"],
            "left_out": before["left_out"],
            "state_iteration": self.loaded_at,
            "precision": self.plan.precision,
            "policy": self.plan.config.train.nonfinite,
            "action": error.action,
            "ranks": facts,
        }
        if distributed.rank() == 0:
            try:
                nonfinite.add(self.run.path, event)
            except RunFailed as failed:  # the step's own trouble is what matters
                self.listener.notice(str(failed))
        return error.action

    def _images_of(self, number: int) -> dict[str, Any]:
        """The images of step `number` on this process, and what their crops follow from."""
        loader = self.loader
        micro = [loader.indices_at(number - 1, i) for i in range(loader.accumulate)]
        indices = [int(index) for _, found in micro for index in found]
        sizes = [[size, count] for size, count in loader.crops_at(number - 1).groups]
        return {
            "rank": distributed.rank(),
            "indices": indices,
            "images": [self.plan.source.describe(index) for index in indices],
            "seeds": [[loader.seed, micro[0][0], index] for index in indices],
            "views": [{"size": size, "count": count} for size, count in sizes],
        }

    def _go_back(self, error: NonFinite) -> None:
        """To the last good state, if `train.nonfinite` says so.

        Raises:
            NonFinite: it does not; with what can be done.
        """
        if error.action is None:  # noticed before saving
            self._not_finite(error, self.iteration - error.standing + 1)
        if error.action != "rollback":
            advice = self.guard.advice(error, self.run.path, self.plan.precision)
            raise NonFinite(
                f"{error} (iteration {error.number}); {advice}", error.loss, error.standing
            ) from error
        guard = self.guard.state()
        if self.saved_at is not None:
            self.restore()
        else:
            assert self.first is not None
            self.first.seek(0)
            self._restore(torch.load(self.first, map_location="cpu", weights_only=True))
        self.guard.restore(guard)  # it knows more than the state
        self.listener.notice(
            f"{error} (iteration {error.number}): back to iteration {self.iteration}, with the "
            f"learning rate times {self.guard.lr_factor:g} from there on"
        )

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

    def _owes(self) -> bool:
        return _owes_evaluation(self.run, self.plan, self.evaluator, self.iteration)

    def _evaluates_after(self, epoch: int) -> bool:
        every = self.plan.config.evaluate.every
        return self.evaluator is not None and every > 0 and epoch % every == 0

    def _evaluate(self, log: metrics.MetricsLog | None) -> None:
        """Score the teacher of a state that is saved already, on the first process.

        A stop signal abandons it; the next start comes back to it.
        """
        epoch = self.iteration // self.plan.steps_per_epoch
        if distributed.rank() == 0:
            assert self.evaluator is not None
            try:
                with self.stop.abandoning("while evaluating"):
                    scores = self.evaluator(self.learner.teacher.backbone)
            except Stopped:
                pass  # all processes stop below
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                # A number is missing then; the run is worth more than the number.
                self.listener.notice(
                    f"the evaluation after epoch {epoch} failed, training goes on: {error}"
                )
            else:
                self._tell(log, {"iteration": self.iteration, "epoch": epoch, **scores})
        self._stop_if_asked()

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
            self.listener.notice,
        )

    def _tell(self, log: metrics.MetricsLog | None, row: dict[str, Any]) -> None:
        if log is not None:
            log.write(row)
        self.listener.step(row)

    # --- what it leaves on disk ---

    def begin(self, config: Config, facts: dict[str, Any]) -> None:
        """What the folder holds before the first step of this start."""
        self.run.create(config)
        notice = self.run.record_start({"iteration": self.iteration, **facts})
        if notice is not None:
            self.listener.notice(notice)
        if self.saved_at is None:
            self.export(self.run.path / INITIAL_FILE)
        elif self.run.backbone_iteration() != self.iteration:  # killed between state and backbone
            self.export(self.run.path / checkpoint.BACKBONE_FILE)

    def save(self) -> None:
        """The whole state, then the teacher's backbone; once an iteration.

        In this order: the backbone follows from the state, and a run that was killed between the
        two writes it at its next start.

        Raises:
            RunFailed: it cannot be written, or should not be; on all processes.
        """
        if self.saved_at == self.iteration:
            return
        self.learner.check()
        rng, bad = zip(
            *distributed.gather((_rng_state(self.plan.device), self.loader.take_bad_report())),
            strict=True,
        )
        self._tell_bad([image for images in bad for image in images])
        self.guard.saved(self.iteration)
        distributed.from_first(lambda: self._write(list(rng)))
        self.saved_at, self.first = self.iteration, None

    def _state(self, rng: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "learner": self.learner.state_dict(),
            "rng": rng,
            "sampler": {
                "seed": self.plan.config.train.seed,
                "epoch": self.iteration // self.plan.steps_per_epoch,
                "step": self.iteration % self.plan.steps_per_epoch,
                "images": len(self.plan.source),
                "fingerprint": self.fingerprint,
                "total_batch": self.plan.total_batch,
            },
            "nonfinite": self.guard.state(),
            "spec": self.plan.spec.to_dict(),
            "config": configuration.to_tree(self.plan.config),
            "versions": {"torch": str(torch.__version__)},
        }

    def _write(self, rng: list[dict[str, Tensor]]) -> None:
        self.run.save(self._state(rng))
        self.saved_at = self.iteration
        self.export(self.run.path / checkpoint.BACKBONE_FILE)
        epoch, step = divmod(self.iteration, self.plan.steps_per_epoch)
        keep = self.plan.config.runtime.keep_every
        if keep and step == 0 and epoch % keep == 0:
            self.run.keep(f"epoch_{epoch:04}.pt")

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

    def restore(self) -> None:
        """Go on from the first process's newest good state, if there is one.

        Raises:
            UsageError: it was made with other images or another number of processes.
        """
        loaded = []

        def load() -> str | None:
            state, notice = self.run.load()
            loaded.append(state)
            return notice

        notice = distributed.from_first(load)
        if notice is not None:
            self.listener.notice(notice)
        state = distributed.broadcast_tree(loaded.pop() if loaded else None)
        if state is not None:
            self._restore(state)
            self.saved_at = self.iteration
        elif self.guard.policy.kind == "rollback":
            self.first = io.BytesIO()
            rng = [_rng_state(self.plan.device)] * distributed.world_size()  # its own, on each
            torch.save(self._state(rng), self.first)

    def _restore(self, state: dict[str, Any]) -> None:
        sampler = state["sampler"]
        for key, now in (("images", len(self.plan.source)), ("total_batch", self.plan.total_batch)):
            if sampler[key] != now:
                raise UsageError(
                    f"{self.run.path} was made with {key.replace('_', ' ')} {sampler[key]}, now it "
                    f"is {now}: continue it with the same data and the same number of processes"
                )
        if sampler.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise UsageError(
                f"{self.run.path} was made with other images than those of {self.plan.source.name}: "
                "as many, but of other names, sizes or content. Continue it with its own images, "
                "which may lie anywhere, or choose another folder"
            )
        try:
            self.learner.load_state_dict(state["learner"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise RunFailed(
                f"{self.run.state_file} is not a state of this configuration: {reason(error)}"
            ) from error
        self.iteration = self.loaded_at = state["iteration"]
        self.guard.restore(state.get("nonfinite", {}))
        if len(state["rng"]) == distributed.world_size():
            _set_rng_state(state["rng"][distributed.rank()], self.plan.device)

    def last_good(self) -> str:
        """A sentence that names what can be continued from."""
        if self.saved_at is None:
            return "No checkpoint was written yet"
        return f"The last good checkpoint is {self.run.state_file}, iteration {self.saved_at}"


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
