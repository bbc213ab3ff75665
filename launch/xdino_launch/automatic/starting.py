"""Pretraining by what was chosen; the choice is made once, and kept."""

import contextlib
import time
from pathlib import Path

from xdino.errors import UsageError
from xdino.forecast.choosing import Asked, Choosing, Recipe
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino.runtime.stopping import StopSignal
from xdino_launch.automatic.record import (
    RECORD_FILE,
    recorded,
    table,
    tell_end,
    with_reasons,
    write,
)  # fmt: skip
from xdino_launch.console import stderr_console
from xdino_launch.local import evaluator_of, run_pretraining


def pretrain_auto(
    wanted: Asked,
    run_dir: str | Path,
    command: list[str],
    stop: StopSignal,
    began: float | None = None,
) -> Path:
    """Choose and pretrain, or continue the run that was chosen before.

    Args:
        began: `time.monotonic()` when the minutes began; by default now.

    Returns:
        The path of the pretrained backbone.

    Raises:
        UsageError, RunFailed, Stopped: as `pretrain`; no choice of a person's can be done, or not
            one epoch fits into the minutes.
    """
    began = time.monotonic() if began is None else began
    run = Path(run_dir)
    with contextlib.ExitStack() as stack:
        recipe, fresh = _agreed(wanted, run, stop, began, stack)
        config = recipe.config
        if fresh:
            distributed.from_first(lambda: write(run, wanted, recipe))
        path = run_pretraining(config, run, command=command, stop=stop)
        if fresh and distributed.rank() == 0:
            tell_end(run, wanted, (time.monotonic() - began) / 60)
    return path


def recipe_text(wanted: Asked, run_dir: str | Path | None, stop: StopSignal) -> str:
    """The recipe with its reasons, as YAML. Nothing is written; `run_dir`: of a run, if there is one."""
    run = None if run_dir is None else Path(run_dir)
    with contextlib.ExitStack() as stack:
        recipe, _ = _agreed(wanted, run, stop, time.monotonic(), stack)
    return with_reasons(recipe)


def _agreed(
    wanted: Asked, run: Path | None, stop: StopSignal, began: float, stack: contextlib.ExitStack
) -> tuple[Recipe, bool]:
    """The recipe that all processes go by, and whether it is new."""
    device = resolve_device(wanted.given.get("runtime.device", "auto"))
    with stop.abandoning("while its processes met"):
        if distributed.start(device):
            stack.callback(distributed.stop)

    def note(sentence: str) -> None:
        if distributed.rank() == 0:
            stderr_console().print(sentence, soft_wrap=True)

    with stop.abandoning("while its recipe was chosen"), distributed.heard():
        before = distributed.from_first(lambda: recorded(run, wanted) if run else None)
        if before is not None:
            note(f"{run}: by what was chosen at its start ({RECORD_FILE})")
            return before, False
        if wanted.minutes is None and "train.epochs" not in wanted.own:
            raise UsageError("say how long: --minutes 30, or --epochs N")
        recipe = Choosing(wanted, run, device, began, note, evaluator_of).recipe()
    if distributed.rank() == 0:
        stderr_console().print(table(recipe.choices))
    return recipe, True
