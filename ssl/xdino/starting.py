"""What comes before the first step of a start: the folder, the plan, the networks; nothing is written.

The first process alone looks at the folder; the others go by what it says.
"""

from dataclasses import dataclass

from xdino import config as configuration
from xdino.job import Job, Listener
from xdino.run_directory import RunDirectory, batches
from xdino.runtime import distributed


@dataclass(frozen=True)
class Wanted:
    """What a start is asked for: as of `train.run`. evaluated: whether somebody judges on the way."""

    evaluated: bool
    extend: int | None = None
    from_iteration: int | None = None


def prepared(job: Job, place: RunDirectory, wanted: Wanted, listener: Listener) -> bool:
    """Plan and build; False, and a notice, where the folder holds the finished run.

    Raises:
        UsageError: cannot be done as configured.
    """
    told = {"the configuration": configuration.to_yaml(job.config), "--extend": wanted.extend}
    distributed.agree({**told, "--from-iteration": wanted.from_iteration})
    config = distributed.from_first(lambda: place.resolve(job.config, wanted.extend))
    processes, back = distributed.world_size(), wanted.from_iteration
    config, first, notice = distributed.from_first(lambda: place.share_out(config, processes))
    job.last_start = {**distributed.from_first(place.last_start), batches.FACT: first.to_dict()}
    job.make_plan(config)
    distributed.agree(job.same_everywhere())
    shape = job.iterations, job.steps_per_epoch
    settled = distributed.from_first(lambda: place.settle(job.config, *shape, wanted.extend))
    if settled != job.config:  # an extension that was cut off
        job.make_plan(settled)
    if back is not None:
        distributed.from_first(lambda: place.find(back))
    elif distributed.from_first(lambda: _is_finished(place, job, wanted.evaluated)):
        listener.notice(
            f"{place.path} holds a finished run of {job.iterations} iterations: left alone"
            + " (--extend N adds epochs)" * ("extended" in vars(job.config.train))
        )
        return False
    distributed.from_first(lambda: job.check_disk(place.path))
    begun = back is not None or distributed.from_first(place.has_state)
    job.build(from_init=not begun)
    if notice is not None:
        listener.notice(notice)
    return True


def _is_finished(run: RunDirectory, job: Job, evaluated: bool) -> bool:
    """Whether nothing is left to do; a damaged state is noticed here, and mended by going on."""
    reached = run.reached(job.iterations)
    return reached is not None and not owes_evaluation(run, job, evaluated, reached)


def owes_evaluation(run: RunDirectory, job: Job, evaluated: bool, iteration: int) -> bool:
    """Whether the state of this iteration is to be evaluated and was not (a kill came between)."""
    every = job.config.evaluate.every if evaluated else 0
    return run.owes_evaluation(iteration, every * job.steps_per_epoch)
