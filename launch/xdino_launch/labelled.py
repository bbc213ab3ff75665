"""Training with labels in this process: classifiers, segmenters and detectors.

Apart from pretraining (`local`), which starts sooner without what these import.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdino import train
from xdino.job import Evaluator, Listener
from xdino.run_directory import RunDirectory
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino.runtime.stopping import StopSignal
from xdino_launch.console import ConsoleListener
from xdino_launch.local import of_all, write_row
from xdino_launch.report.live import Watcher
from xdino_transfer.classification.files import MODEL_FILE
from xdino_transfer.dense_training.detecting.job import DetectionJob
from xdino_transfer.dense_training.detecting.judging import DetectionJudge
from xdino_transfer.dense_training.detecting.recipe import Detection
from xdino_transfer.dense_training.job import DenseJob
from xdino_transfer.dense_training.judging import DenseJudge
from xdino_transfer.dense_training.segmenting.job import SegmentationJob
from xdino_transfer.dense_training.segmenting.judging import SegmentationJudge
from xdino_transfer.dense_training.segmenting.recipe import Segmentation
from xdino_transfer.finetuning.job import ClassificationJob
from xdino_transfer.finetuning.judging import Judge
from xdino_transfer.finetuning.recipe import FineTuning


def run_finetuning(config: FineTuning, *told: Any) -> Path:
    """Train a classifier, see `run_labelled`."""
    return run_labelled(ClassificationJob(config), Judge, *told)


def run_segmentation(config: Segmentation, *told: Any) -> Path:
    """Train a segmenter, see `run_labelled`."""
    return run_labelled(SegmentationJob(config), SegmentationJudge, *told)


def run_detection(config: Detection, *told: Any) -> Path:
    """Train a detector, see `run_labelled`."""
    return run_labelled(DetectionJob(config), DetectionJudge, *told)


def run_labelled(
    job: ClassificationJob | DenseJob[Any],
    judging: Callable[[Any, Path, Callable[[str], None]], Judge | DenseJudge],
    run_dir: str | Path,
    command: list[str] | None = None,
    stop: StopSignal | None = None,
    from_iteration: int | None = None,
) -> Path:
    """Train what learns with labels in `run_dir` or continue it there, scored as its configuration asks.

    Args:
        judging: a job, its folder and who is told of what is odd -> what scores it.
        from_iteration: as `train.run`.

    Returns:
        The path of the whole network.
    """
    run, config = Path(run_dir), job.config
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        with stop.abandoning("while its processes met"):
            if distributed.start(resolve_device(config.runtime.device)):
                stack.callback(distributed.stop)
        listener = stack.enter_context(ConsoleListener())
        judge = judging(job, run, listener.notice)
        with Watcher(config, run, listener, None) as watcher:
            evaluator: Evaluator | None = None
            if config.evaluate.every:
                evaluator = of_all(judge)
            train.run(job, run, evaluator, watcher, command, stop, None, from_iteration)
            if distributed.rank() == 0:
                with stop.abandoning("while the last network was scored"):
                    _score_at_end(job, judge, run, watcher)
                watcher.conclude()
        return run / MODEL_FILE


def _score_at_end(
    job: ClassificationJob | DenseJob[Any],
    judge: Judge | DenseJudge,
    run: Path,
    listener: Listener,
) -> None:
    """The row of the last network in results.json; a run that was killed before comes back to it."""
    try:
        scores = judge.conclude()
        if scores is not None and not RunDirectory(run).evaluated(job.iterations):
            epoch = math.ceil(job.iterations / job.steps_per_epoch)
            told = {"iteration": job.iterations, "epoch": epoch, **scores}
            write_row(job.config, run, told, listener)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        listener.notice(f"the score at the end failed: {error}. The run is whole without it")
