"""The loop of every job, from a run directory to what it leaves there.

`iteration` counts completed steps, and everything follows from it: which data come next, every schedule,
where a run continues. What a step is, the job knows (`job.Job`).
"""

import contextlib
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xdino import checkpoint, metrics, nonfinite, starting
from xdino import config as configuration
from xdino.backbone import Origin
from xdino.data import BadImage
from xdino.errors import NonFinite, RunFailed, Stopped
from xdino.job import Evaluator, Job, Listener, OfAllProcesses
from xdino.run_directory import INITIAL_FILE, RunDirectory, batches, environment
from xdino.run_directory.background import StateWriter
from xdino.runtime import distributed, rng, stopping
from xdino.runtime.stopping import StopSignal
from xdino.stepping import StepResult, failure_of


def run(
    job: Job,
    run_dir: str | Path,
    evaluator: Evaluator | None = None,
    listener: Listener | None = None,
    command: list[str] | None = None,
    stop: StopSignal | None = None,
    extend: int | None = None,
    from_iteration: int | None = None,
) -> None:
    """Run the job in `run_dir`, or continue it there.

    The first process alone looks at the folder and writes into it; the others go by what it says.

    Args:
        evaluator: given `job.judged` every `evaluate.every` epochs and before the first step;
            returns numbers for metrics.jsonl and leaves the network as it was. If it fails,
            training goes on.
        listener: is told how it goes.
        command: what a person typed, for environment.json.
        stop: who listens to signals already; None to listen from here on.
        extend: epochs that a finished run is given on top.
        from_iteration: of a kept state to go back to.

    Raises:
        UsageError: cannot be done as configured; nothing was written.
        RunFailed: the world intervened; names the last good checkpoint.
        Stopped: by a signal, after saving.
    """
    listener = listener if listener is not None and distributed.rank() == 0 else Listener()
    place = RunDirectory(run_dir)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        with stop.abandoning("while it was planned"), distributed.heard():
            wanted = starting.Wanted(evaluator is not None, extend, from_iteration)
            if not starting.prepared(job, place, wanted, listener):
                return
        for sentence in job.notices():
            listener.notice(sentence)
        facts = environment(job.device, distributed.world_size(), job.config.train.seed)
        facts |= job.facts() | {"command": command, batches.FACT: job.last_start[batches.FACT]}
        loop: _Loop | None = None
        try:
            with distributed.heard():
                own = partial(place.own, job.config, stack, from_iteration)
                notice = distributed.from_first(own)
                if notice is not None:
                    listener.notice(notice)
                loop = _Loop(job, place, evaluator, listener, stop)
                loop.restore()
                distributed.from_first(lambda: loop.begin(facts))
                loop.train()
        except (RunFailed, OSError, RuntimeError, MemoryError) as error:
            failure = failure_of(error)
            if failure is None:
                raise
            good = f". {loop.writer.last_good()}" if loop is not None else ""
            raise RunFailed(f"{failure}{good}") from error


class _Loop:
    """A run under way: its steps, and what it leaves on disk."""

    def __init__(
        self,
        job: Job,
        run: RunDirectory,
        evaluator: Evaluator | None,
        listener: Listener,
        stop: StopSignal,
    ) -> None:
        self.job, self.run = job, run
        self.evaluator, self.listener, self.stop = evaluator, listener, stop
        self.iteration = self.loaded_at = job.begins_at
        self.saved_at: int | None = None  # a state was handed to the writer, or loaded
        self.writer = StateWriter(run, job.config.runtime.keep_last, self._milestone)
        self.guard = nonfinite.Guard(nonfinite.Policy.parse(job.config.train.nonfinite))
        if self.guard.policy.kind == "skip":
            # A step can be skipped only if its trouble is known before the next one.
            job.ask_every_step()
        self.first: io.BytesIO | None = None  # the state to go back to before one is saved
        job.before_moving(self.writer.copied)
        job.open(known_bad=distributed.from_first(run.unreadable))

    # --- steps ---

    def train(self) -> None:
        """Every iteration that is left, and the evaluations that are due.

        Raises:
            Stopped: by a signal, after saving.
        """
        log = self._open_log()
        self.listener.started(
            {
                "steps_per_epoch": self.job.steps_per_epoch,
                "iteration": self.iteration,
                "iterations": self.job.iterations,
                "device": str(self.job.device),
                **self.job.dimensions(),
            }
        )
        try:
            if distributed.from_first(self._owes):
                self._evaluate(log)
            while True:
                try:
                    self._steps(log)
                    return self._settle()
                except NonFinite as error:
                    self._go_back(error)
                    if log is not None:
                        log.close()
                    log = self._open_log()  # without the rows of what is made again
        finally:
            self.writer.join()
            if distributed.rank() == 0:  # others may not come: a failure is one process's
                self._tell_bad(self.job.take_bad_report())
            if log is not None:
                log.close()

    def _steps(self, log: metrics.MetricsLog | None) -> None:
        job, runtime, total = self.job, self.job.config.runtime, self.job.iterations
        clock = metrics.Clock(lambda: job.wait_seconds)
        job.start(self.iteration)
        try:
            while self.iteration < total:
                done = self.iteration + 1
                logs = done % runtime.log_every == 0 or done in (job.begins_at + 1, total)
                result = self._step(done, logs)
                self.iteration = done
                if result is None:
                    self._tell(log, {"iteration": done, "epoch": self._epoch(done), "skipped": 1})
                elif logs:
                    self._tell(log, self._row(result, clock))
                    warning = job.warning(done, result)
                    if warning:
                        self.listener.notice(warning)
                # Where a number was asked for, or on a CPU, the step is done; a GPU may be behind.
                finished = done if logs or job.device.type == "cpu" else None
                epoch, left = divmod(done, job.steps_per_epoch)
                if left == 0 or done % runtime.checkpoint_every == 0 or done == total:
                    self.save()
                    clock.restart(finished)
                if done < total:
                    self._stop_if_asked()
                if left == 0 and self._evaluates_after(epoch):
                    self._evaluate(log)
                    clock.restart(finished)
        finally:
            job.close()

    def _stop_if_asked(self) -> None:
        """Raises Stopped on all processes, after saving, where one of them was asked to stop.

        And RunFailed where a state could not be written.
        """
        if distributed.any_true(self.stop.name is not None or self.writer.failed):
            self._settle()
            self.save()
            self._settle()
            raise Stopped(
                f"stopped by {self.stop.name or 'a signal'} after iteration {self.iteration} of "
                f"{self.job.iterations}; the same command continues it"
            )

    def _epoch(self, number: int) -> int:
        return math.ceil(number / self.job.steps_per_epoch)

    def _step(self, number: int, logs: bool) -> StepResult | None:
        """One step; None where it was left out, as `train.nonfinite` says."""
        if number in self.guard.left_out:
            self.job.skip(number)
            return None
        torch.manual_seed(rng.of_step(self.job.config.train.seed, number))
        try:
            result = self.job.step(number, self.guard.lr_factor, logs, self.run.path)
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
        mine = {"rank": distributed.rank(), **self.job.images_of(number)}
        event = {
            "iteration": number,
            "epoch": self._epoch(number),
            "what": str(error),
            "loss": error.loss,
            "lr": self.job.lr(number) * before["lr_factor"],
            "lr_factor": before["lr_factor"],
            "left_out": before["left_out"],
            "state_iteration": self.loaded_at,
            "precision": self.job.facts()["precision"],
            "policy": self.job.config.train.nonfinite,
            "batch": batches.of_config(self.job.config, distributed.world_size()).to_dict(),
            "action": error.action,
            "ranks": distributed.gather(mine),
        }
        if distributed.rank() == 0:
            try:
                nonfinite.add(self.run.path, event)
            except RunFailed as failed:  # the step's own trouble is what matters
                self.listener.notice(str(failed))
        return error.action

    def _go_back(self, error: NonFinite) -> None:
        """To the last good state, if `train.nonfinite` says so.

        Raises:
            NonFinite: it does not; with what can be done.
        """
        self._settle()
        if error.action is None:  # noticed before saving
            self._not_finite(error, self.iteration - error.standing + 1)
        if error.action != "rollback":
            precision = self.job.facts()["precision"]
            advice = self.guard.advice(error, self.run.path, precision)
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

    # --- what is told ---

    def _row(self, result: StepResult, clock: metrics.Clock) -> dict[str, Any]:
        images, device = self.job.images_per_step, self.job.device
        measured = clock.measured(self.iteration, images, device, result.work)
        return {
            "iteration": self.iteration,
            "epoch": self._epoch(self.iteration),
            "loss": result.loss,
            **self.job.columns(self.iteration, self.guard.lr_factor),
            **result.diagnostics,
            **measured,
        }

    def _owes(self) -> bool:
        evaluated = self.evaluator is not None
        return starting.owes_evaluation(self.run, self.job, evaluated, self.iteration)

    def _evaluates_after(self, epoch: int) -> bool:
        every = self.job.config.evaluate.every
        return self.evaluator is not None and every > 0 and epoch % every == 0

    def _evaluate(self, log: metrics.MetricsLog | None) -> None:
        """Score the network of a state that is saved already, on the first process or on all.

        A stop signal abandons it; the next start comes back to it.
        """
        epoch = self.iteration // self.job.steps_per_epoch
        shared = distributed.world_size() > 1 and isinstance(self.evaluator, OfAllProcesses)
        if shared or distributed.rank() == 0:
            assert self.evaluator is not None
            facts = {"iteration": self.iteration, "iterations": self.job.iterations}
            judged = self.job.judged
            judged.origin = Origin(facts={**facts, "data": self.job.facts()["data"]})
            try:
                heard = self.stop.abandoning("while evaluating")
                with stopping.heeding(self.stop) if shared else heard:
                    scores = self.evaluator(judged)
            except Stopped:
                pass  # all processes stop below
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                # A number is missing then; the run is worth more than the number.
                what = f"after epoch {epoch}" if epoch else "before the first step"
                self.listener.notice(f"the evaluation {what} failed, training goes on: {error}")
            else:
                self._tell(log, {"iteration": self.iteration, "epoch": epoch, **scores})
        self._stop_if_asked()

    def _tell_bad(self, found: list[BadImage]) -> None:
        """Name unreadable images, and keep them in the run's list, on the first process."""
        if found and distributed.rank() == 0:
            self.listener.notice(self.run.add_unreadable(found, self.iteration))

    def _open_log(self) -> metrics.MetricsLog | None:
        if distributed.rank() != 0:
            return None
        runtime = self.job.config.runtime
        return metrics.MetricsLog(
            self.run.path,
            self.iteration,
            runtime.wandb,
            runtime.wandb_project,
            configuration.to_tree(self.job.config),
            self.listener.notice,
            runtime.tensorboard,
        )

    def _tell(self, log: metrics.MetricsLog | None, row: dict[str, Any]) -> None:
        if log is not None:
            log.write(row)
        self.listener.step(row)

    # --- what it leaves on disk ---

    def begin(self, facts: dict[str, Any]) -> None:
        """What the folder holds before the first step of this start."""
        self.run.create(self.job.config)
        notice = self.run.record_start({"iteration": self.iteration, **facts})
        if notice is not None:
            self.listener.notice(notice)
        if self.saved_at is None:
            self.job.export(self.run.path / INITIAL_FILE, self.iteration)
        elif self.run.backbone_iteration() != self.iteration:  # killed between state and backbone
            self.job.export(self.run.path / checkpoint.BACKBONE_FILE, self.iteration)

    def save(self) -> None:
        """The whole state, then the weights; once an iteration.

        Both are written while training goes on, from copies.

        Raises:
            RunFailed: the one before could not be written, or this should not be; on all processes.
        """
        if self.saved_at == self.iteration:
            return
        self._settle()
        self.job.check()
        bad = distributed.gather(self.job.take_bad_report())
        self._tell_bad([image for images in bad for image in images])
        self.guard.saved(self.iteration)
        distributed.from_first(self._begin_to_write)
        self.saved_at, self.first = self.iteration, None

    def _settle(self) -> None:
        """What was saved is on the disk.

        Raises:
            RunFailed: it cannot be written; on all processes.
        """
        distributed.from_first(self.writer.wait)
        self.writer.good_at = self.saved_at  # of the others, too

    def _begin_to_write(self) -> None:
        iteration, later = self.iteration, self.job.exporter(self.iteration)
        now = partial(self.job.export, iteration=iteration)
        self.writer.begin(iteration, self._state(), now, later)

    def _milestone(self, iteration: int) -> str | None:
        epoch, step = divmod(iteration, self.job.steps_per_epoch)
        every = self.job.config.runtime.keep_every
        return f"epoch_{epoch:04}.pt" if every and step == 0 and epoch % every == 0 else None

    def _state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            **self.job.state_dict(self.iteration),
            "nonfinite": self.guard.state(),
            "config": configuration.to_tree(self.job.config),
            "versions": {"torch": str(torch.__version__)},
        }

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
            self.saved_at = self.writer.good_at = self.iteration
        elif self.guard.policy.kind == "rollback":
            self.first = io.BytesIO()
            torch.save(self._state(), self.first)

    def _restore(self, state: dict[str, Any]) -> None:
        self.job.load_state_dict(state, self.run.path)
        self.iteration = self.loaded_at = state["iteration"]
        self.guard.restore(state.get("nonfinite", {}))
        if state.get("rng") and getattr(vars(self.job.config).get("model"), "drop_path", 0):
            self.listener.notice(
                f"the state of iteration {self.iteration} is of an earlier version: from here on "
                "dropped paths follow from the iteration, and are others than they would have been"
            )
