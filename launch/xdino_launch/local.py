"""Pretraining in this process, alone or as one of those that a launcher started."""

import contextlib
from pathlib import Path

from xdino import checkpoint, data
from xdino import config as configuration
from xdino.config import Config
from xdino.data.sources import Source
from xdino.errors import UsageError, asked
from xdino.metrics import MetricsLog
from xdino.run_directory import RunDirectory
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino.runtime.stopping import StopSignal
from xdino.train import Evaluator, Listener, pretrain
from xdino.values import shown
from xdino_eval import results
from xdino_eval.during_training import AT_END, knn_callback, linear_at_end
from xdino_launch.console import ConsoleListener


def run_pretraining(
    config: Config,
    run_dir: str | Path,
    command: list[str] | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """`pretrain` with the evaluations that the configuration asks for, drawn on the console.

    `stop`: who listens to signals already; None to listen from here on.
    """
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        with stop.abandoning("while its processes met"):
            if distributed.start(resolve_device(config.runtime.device)):
                stack.callback(distributed.stop)
        listener = stack.enter_context(ConsoleListener())
        with stop.abandoning("while it was planned"), distributed.heard():
            splits = distributed.together(lambda: labelled_splits(config))
        evaluator = evaluator_of(config, splits)
        path = pretrain(config, run_dir, evaluator, listener, command, stop)
        if config.evaluate.linear and splits and distributed.rank() == 0:
            with stop.abandoning("while the linear probe was made"):
                judge_at_end(config, Path(run_dir), splits, listener)
        return path


def labelled_splits(config: Config) -> tuple[Source, Source] | None:
    """The splits of `evaluate.data`, or none where no evaluation is asked for.

    Raises:
        UsageError: the data has no labelled train/ and val/.
    """
    if not config.evaluate.every and not config.evaluate.linear:
        return None
    path = config.evaluate.data or config.data.path
    try:
        with asked(f"cannot open {shown(path)}"):
            return data.open_splits(path, config.model.in_chans, config.data.max_pixels)
    except UsageError as error:
        asks, off = (
            ("evaluate.every asks for k-NN during training", "--evaluate.every 0")
            if config.evaluate.every
            else ("evaluate.linear asks for a probe at the end", "--evaluate.linear null")
        )
        raise UsageError(
            f"{asks}, which needs labels: {error}. "
            f"Name labelled data with --evaluate.data, or set {off}"
        ) from None


def evaluator_of(config: Config, splits: tuple[Source, Source] | None) -> Evaluator | None:
    """k-NN for the trainer, or none where `evaluate.every` is 0."""
    if not config.evaluate.every or splits is None:
        return None
    return knn_callback(*splits, limit=config.evaluate.limit)


def judge_at_end(
    config: Config, run: Path, splits: tuple[Source, Source], listener: Listener
) -> None:
    """The linear probe of the backbone in `run`: a row of results.json and one of the metrics.

    A run that was killed before or during this comes back to it; one that has its row is left
    alone. If it fails, a notice says so and the run is whole without it.
    """
    try:
        backbone = checkpoint.load_backbone(run)
        facts: dict = backbone.weights  # type: ignore[assignment]
        file = run / "results.json"
        mine = [r for r in results.load(file) if r.checkpoint == facts["sha256"]]
        row = next((r for r in mine if AT_END in r.settings), None)
        if row is None:
            listener.notice("scoring the frozen features by a linear probe ...")
            backbone.to(resolve_device(config.runtime.device))
            limit = config.evaluate.limit
            found = linear_at_end(backbone, *splits, str(config.evaluate.linear), limit)
            name = f"teacher, iteration {facts['iteration']}"
            (row,) = results.signed([found], facts["sha256"], name)
            results.append(file, [row])
        _log(config, run, facts["iteration"], row, listener)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        listener.notice(
            f"the linear probe at the end failed: {error}. The run is whole; "
            f"`xdino linear {run} --data DATA` scores it"
        )


def _log(config: Config, run: Path, iteration: int, row: results.Row, listener: Listener) -> None:
    """The row's numbers in metrics.jsonl and on the run's wandb page, once."""
    epoch = 0
    for told in RunDirectory(run).rows():
        if "linear_top1" in told and told["iteration"] == iteration:
            return
        epoch = told.get("epoch", epoch)
    scores = {"linear_top1": row.top1, "linear_top5": row.top5}
    numbers = {"iteration": iteration, "epoch": epoch, **scores}
    runtime = config.runtime
    tree = configuration.to_tree(config)
    log = MetricsLog(run, iteration, runtime.wandb, runtime.wandb_project, tree)
    try:
        log.write(numbers)
    finally:
        log.close()
    listener.step(numbers)
