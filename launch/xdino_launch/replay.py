"""One step of a run made again, to see where its numbers stopped being finite. The run is only read.

The step follows from the run's configuration, a state from before it and its number: images and
crops are functions of them. Steps between the state and the one asked for are made first. A run of
several processes is replayed by one, on the images of all of them: the same step but for rounding.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdino import checkpoint, data, nonfinite
from xdino import config as configuration
from xdino.errors import NonFinite, RunFailed, UsageError
from xdino.learner import Learner
from xdino.loss import Views
from xdino.plan import Plan, build_learner, continue_published, make_plan
from xdino.pretraining import loader_of, to_device
from xdino.run_directory import CONFIG_FILE, INITIAL_FILE, RunDirectory
from xdino.runtime import rng
from xdino.runtime.batch_layout import BatchLayout
from xdino.runtime.device import resolve_device, resolve_precision
from xdino.schedules import StepSettings
from xdino.student_teacher import Embedded


@dataclass
class Replay:
    """What was seen of one step. Names of modules and parameters are those of the checkpoint."""

    iteration: int
    from_iteration: int  # of the state that the steps were made from
    processes: int
    what: str | None = None  # the sentence of the step; None: it was finite
    loss: float = math.nan
    pairs: list[dict[str, Any]] = field(default_factory=list)  # teacher view, student view, loss
    module: dict[str, str] | None = None  # the first whose output is not finite
    gradient: str | None = None  # the first parameter, in order of the backward pass
    images: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        tree = dataclasses.asdict(self)
        tree["loss"] = _number(self.loss)
        return tree


def replay(run: Path, iteration: int | None = None, device: str | None = None) -> Replay:
    """Make a step of `run` again.

    Args:
        iteration: the step's number as in metrics.jsonl; None for the last of nonfinite.json.
        device: where, if not where the run was.

    Raises:
        UsageError: no run there, no such step.
        RunFailed: a file of it is damaged.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UsageError(f"{run} is not a run (it has no {CONFIG_FILE})")
    events = nonfinite.read(run)
    if iteration is None:
        if not events:
            raise UsageError(
                f"{run} holds no {nonfinite.RECORD_FILE}: no step of it had numbers that are not "
                "finite; name a step with --iteration"
            )
        iteration = int(events[-1]["iteration"])
    event = next((e for e in reversed(events) if e["iteration"] == iteration), None)
    state = _state_before(run, iteration)
    config, processes = _as_shared_out(_configuration(run, device), event, state)
    before = RunDirectory(run).last_start().get("precision")
    precision = resolve_precision(
        config.train.precision, resolve_device(config.runtime.device), before
    )
    plan = make_plan(config, processes, precision)
    if not 1 <= iteration <= plan.iterations:
        raise UsageError(f"--iteration goes from 1 to {plan.iterations:,}, got {iteration:,}")
    learner = build_learner(plan)
    learner.stepping.asks_every_step = True
    guard = nonfinite.Guard(nonfinite.Policy("stop"))
    done = 0
    if state is not None:
        done = _restore(learner, guard, state, plan)
    elif plan.config.train.continue_from:
        done = continue_published(plan, learner).iteration
        if iteration <= done:
            raise UsageError(f"the run begins at iteration {done:,}: --iteration is above it")
    found = Replay(iteration, done, _loader(plan, 0).world_size)
    for number, batches in _steps(plan, done, iteration):
        if event is not None and number > int(event.get("state_iteration", 0)):
            guard.restore(event)  # its learning rate, and the steps that were left out by then
        settings = plan.schedules.at(number - 1)
        settings = dataclasses.replace(settings, lr=settings.lr * guard.lr_factor)
        if number == iteration:
            _look(learner, batches, settings, plan, found)
        elif number not in guard.left_out:
            _repeat(learner, batches, settings, plan)
    return found


def _configuration(run: Path, device: str | None) -> configuration.Config:
    config = configuration.load(str(run / CONFIG_FILE))
    # Hooks look at each pass, which a compiled or a recorded one would not run through.
    runtime = dataclasses.replace(
        config.runtime, compile=False, cuda_graphs=False, workers=1, prefetch=1
    )
    if device is not None:
        runtime = dataclasses.replace(runtime, device=device)
    train = config.train
    if train.init is not None and (run / INITIAL_FILE).is_file():
        train = dataclasses.replace(train, init=str(run / INITIAL_FILE))
    return dataclasses.replace(config, runtime=runtime, train=train)


def _state_before(run: Path, iteration: int) -> dict[str, Any] | None:
    """The latest state in which the step is still to be made; None for the start of the run."""
    last = run / checkpoint.STATE_FILE
    kept = sorted(last.parent.glob("epoch_*.pt"), reverse=True)
    for path in [*([last] if last.exists() else []), *kept]:
        state = checkpoint.load_state(path)
        if state["iteration"] < iteration:
            return state
    return None


def _as_shared_out(
    config: configuration.Config, event: dict[str, Any] | None, state: dict[str, Any] | None
) -> tuple[configuration.Config, int]:
    """The configuration with the step's own batches, and its number of processes."""
    train = config.train
    own = BatchLayout.from_dict(event.get("batch")) if event is not None else None
    if own is not None:
        train = dataclasses.replace(train, batch_size=own.batch_size, accumulate=own.accumulate)
        return dataclasses.replace(config, train=train), own.processes
    if event is not None:
        return config, max(1, len(event["ranks"]))
    total = state["sampler"]["total_batch"] if state is not None else 0
    return config, max(1, total // (train.batch_size * train.accumulate))


def _restore(learner: Learner, guard: nonfinite.Guard, state: dict[str, Any], plan: Plan) -> int:
    sampler = state["sampler"]
    for key, now in (("images", len(plan.source)), ("total_batch", plan.total_batch)):
        if sampler[key] != now:
            raise UsageError(
                f"the run was made with {key.replace('_', ' ')} {sampler[key]}, now it is {now}: "
                "the step would be another"
            )
    learner.load_state_dict(state["learner"])
    guard.restore(state.get("nonfinite", {}))
    return int(state["iteration"])


def _loader(plan: Plan, rank: int) -> data.CropLoader:
    train = plan.config.train
    world_size = plan.total_batch // (train.batch_size * train.accumulate)
    return loader_of(plan, rank, world_size, workers=0)


#: The micro-batches of a step: for each, the batch of every process.
Batches = list[list[data.CropBatch]]


def _steps(plan: Plan, start: int, end: int) -> Iterator[tuple[int, Batches]]:
    """Steps start + 1 to end, by their numbers."""
    ranks = plan.total_batch // (plan.config.train.batch_size * plan.config.train.accumulate)
    rows = [_loader(plan, rank).iterate(start, end) for rank in range(ranks)]
    for number in range(start + 1, end + 1):
        micro = range(plan.config.train.accumulate)
        yield number, [[next(row) for row in rows] for _ in micro]


def _views(batches: Batches, plan: Plan, learner: Learner) -> Iterator[list[Tensor]]:
    seed = plan.config.train.seed
    for part, batch in enumerate(batches):
        torch.manual_seed(rng.of_step(seed, batch[0].iteration + 1, part))
        groups = [to_device(b, plan.crops, plan.device, learner.kernels.views) for b in batch]
        yield [torch.cat(same, dim=1) for same in zip(*groups, strict=True)]


def _repeat(learner: Learner, batches: Batches, settings: StepSettings, plan: Plan) -> None:
    """A step on the way; one that breaks moves nothing, as in the run."""
    try:
        learner.step(_views(batches, plan, learner), settings, len(batches))
    except NonFinite as error:
        if error.spoilt:
            raise RunFailed(f"a step before the one asked for broke already: {error}") from error


def _look(
    learner: Learner, batches: Batches, settings: StepSettings, plan: Plan, found: Replay
) -> None:
    """The step itself, with hooks on everything."""
    loader = _loader(plan, 0)
    for batch in batches:
        for rank, part in enumerate(batch):
            found.images += [
                {
                    "rank": rank,
                    "index": int(index),
                    "image": plan.source.describe(int(index)),
                    "seed": [loader.seed, part.epoch, int(index)],
                }
                for index in part.indices
            ]
    hooks = _hooks(learner, settings, found)
    try:
        found.loss = learner.step(_views(batches, plan, learner), settings, len(batches)).loss
    except NonFinite as error:
        found.what, found.loss = str(error), error.loss
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(learner: Learner, settings: StepSettings, found: Replay) -> list[Any]:
    """First module and first gradient that are not finite; the loss of every pair of views."""
    hooks: list[Any] = []
    teacher: list[Embedded] = []

    def watch(role: str, name: str, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found.module is None and not all(x.isfinite().all() for x in _tensors(output)):
                came_in = all(x.isfinite().all() for x in _tensors(inputs))
                came = "finite" if came_in else "not finite"
                found.module = {"network": role, "name": name, "kind": kind, "inputs": came}

        return hook

    def pairs(module: nn.Module, inputs: Any, output: Embedded) -> None:
        views = Views(
            output.bottleneck.float(),
            teacher.pop().bottleneck.float(),
            output.tokens,
            settings.teacher_temp,
            learner.student.head.last_layer,
            learner.teacher.head.last_layer,
        )
        with torch.no_grad(), torch.autocast(learner.device.type, enabled=False):
            found.pairs += _pairs(learner.loss.pairs(views))

    def gradient(name: str) -> Any:
        def hook(p: Tensor) -> None:
            if found.gradient is None and p.grad is not None and not p.grad.isfinite().all():
                found.gradient = name

        return hook

    for role, network in (("teacher", learner.teacher), ("student", learner.student)):
        for name, module in network.named_modules():
            if name:
                hooks.append(module.register_forward_hook(watch(role, name, type(module).__name__)))
    hooks.append(learner.teacher.register_forward_hook(lambda m, i, out: teacher.append(out)))
    hooks.append(learner.student.register_forward_hook(pairs))
    for name, p in learner.student.named_parameters():
        if p.requires_grad:
            hooks.append(p.register_post_accumulate_grad_hook(gradient(name)))
    return hooks


def _pairs(losses: Tensor) -> Iterator[dict[str, Any]]:
    """The loss of each teacher view with each other student view, mean over images, of `[G, V]`."""
    for g, row in enumerate(losses.tolist()):
        for v, loss in enumerate(row):
            if v != g:
                finite = math.isfinite(loss)
                yield {"teacher": g, "student": v, "loss": _number(loss), "finite": finite}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
