"""Training in this process, alone or as one of those that a launcher started.

What trains with labels is imported where it is asked for: pretraining starts a second sooner without.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdino import checkpoint, data, train
from xdino import config as configuration
from xdino.backbone import Backbone
from xdino.config import QUALITY_VIEWS, Config, RunConfig
from xdino.data.sources import Source
from xdino.errors import UsageError, asked
from xdino.forecast.machines import capacity
from xdino.job import Evaluator, Listener, OfAllProcesses
from xdino.metrics import MetricsLog
from xdino.pretraining import Pretraining, Watching
from xdino.run_directory import RunDirectory
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino.runtime.stopping import StopSignal
from xdino.values import shown
from xdino_eval import evaluators, results
from xdino_eval.during_training import BestTeacher, Remembering, callback, numbers
from xdino_eval.evaluators import EVALUATORS, LABEL_FREE, Quality
from xdino_eval.extraction import Options
from xdino_launch.console import ConsoleListener
from xdino_launch.report.live import Watcher
from xdino_transfer.segmentation.while_pretraining import OfMasks, probes

if TYPE_CHECKING:
    from xdino_transfer.dense_training.detecting.recipe import Detection
    from xdino_transfer.dense_training.job import DenseJob
    from xdino_transfer.dense_training.judging import DenseJudge
    from xdino_transfer.dense_training.segmenting.recipe import Segmentation
    from xdino_transfer.finetuning.job import ClassificationJob
    from xdino_transfer.finetuning.judging import Judge
    from xdino_transfer.finetuning.recipe import FineTuning

AT_END = "at the end of pretraining, images of a split at most"  # of a row's settings


def run_pretraining(
    config: Config,
    run_dir: str | Path,
    command: list[str] | None = None,
    stop: StopSignal | None = None,
    extend: int | None = None,
    profile: int = 0,
    from_iteration: int | None = None,
) -> Path:
    """`pretrain` with the evaluations that the configuration asks for, drawn on the console.

    `stop`: who listens to signals already; None to listen from here on. `extend`, `from_iteration`:
    as `train.run`. `profile`: of so many steps a trace.
    """
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        with stop.abandoning("while its processes met"):
            if distributed.start(resolve_device(config.runtime.device)):
                stack.callback(distributed.stop)
        listener = stack.enter_context(ConsoleListener())
        with stop.abandoning("while it was planned"), distributed.heard():
            splits = distributed.together(lambda: evaluated_splits(config))
        first = distributed.rank() == 0
        best = BestTeacher(Path(run_dir), config.evaluate.limit, listener.notice)
        with Watcher(config, Path(run_dir), listener, splits) as watcher:
            patches = patch_probes(config)
            evaluator = evaluator_of(config, splits, best, watcher.look, patches)
            job = Pretraining(config, Watching(profile, capacity))
            train.run(job, run_dir, evaluator, watcher, command, stop, extend, from_iteration)
            if config.evaluate.linear and splits and first:
                with stop.abandoning("while the linear probe was made"):
                    judge_at_end(config, Path(run_dir), splits, watcher)
            if patches and first:
                with stop.abandoning("while patches were probed"):
                    patches_at_end(config, Path(run_dir), patches, watcher)
            if first:
                watcher.conclude()
        return Path(run_dir) / checkpoint.BACKBONE_FILE


def run_finetuning(config: "FineTuning", *told: Any) -> Path:
    """Train a classifier, see `run_labelled`."""
    from xdino_transfer.finetuning.job import ClassificationJob
    from xdino_transfer.finetuning.judging import Judge

    return run_labelled(ClassificationJob(config), Judge, *told)


def run_segmentation(config: "Segmentation", *told: Any) -> Path:
    """Train a segmenter, see `run_labelled`."""
    from xdino_transfer.dense_training.segmenting.job import SegmentationJob
    from xdino_transfer.dense_training.segmenting.judging import SegmentationJudge

    return run_labelled(SegmentationJob(config), SegmentationJudge, *told)


def run_detection(config: "Detection", *told: Any) -> Path:
    """Train a detector, see `run_labelled`."""
    from xdino_transfer.dense_training.detecting.job import DetectionJob
    from xdino_transfer.dense_training.detecting.judging import DetectionJudge

    return run_labelled(DetectionJob(config), DetectionJudge, *told)


def run_labelled(
    job: "ClassificationJob | DenseJob[Any]",
    judging: "Callable[[Any, Path, Callable[[str], None]], Judge | DenseJudge]",
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
    from xdino_transfer.classification.files import MODEL_FILE

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
    job: "ClassificationJob | DenseJob[Any]",
    judge: "Judge | DenseJudge",
    run: Path,
    listener: Listener,
) -> None:
    """The row of the last network in results.json; a run that was killed before comes back to it."""
    try:
        scores = judge.conclude()
        if scores is not None and not RunDirectory(run).evaluated(job.iterations):
            epoch = math.ceil(job.iterations / job.steps_per_epoch)
            told = {"iteration": job.iterations, "epoch": epoch, **scores}
            _write_row(job.config, run, told, listener)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        listener.notice(f"the score at the end failed: {error}. The run is whole without it")


def evaluated_splits(config: Config) -> tuple[Source, Source] | None:
    """The splits of `evaluate.data`, or none where no evaluation is asked for.

    Where nothing that is asked for needs labels, both are the images of training.

    Raises:
        UsageError: the data has no labelled train/ and val/.
    """
    evaluate, channels, largest = config.evaluate, config.channels, config.data.max_pixels
    needy = (
        [name for name in evaluate.protocols if name not in LABEL_FREE] if evaluate.every else []
    )
    if not evaluate.every and not evaluate.linear:
        return None
    path = evaluate.data or config.data.path
    try:
        with asked(f"cannot open {shown(path)}"):
            if needy or evaluate.linear:
                return data.open_splits(path, channels, largest)
            source = data.open_source(path, "train", channels, max_pixels=largest)
            return source, source
    except UsageError as error:
        asks, off = "evaluate.linear asks for a probe at the end", "--evaluate.linear null"
        if needy:
            asks = f"evaluate.every asks for {', '.join(needy)} during training"
            asks, off = asks.replace("knn", "k-NN"), "--evaluate.every 0"
        raise UsageError(
            f"{asks}, which needs labels: {error}. "
            f"Name labelled data with --evaluate.data, or set {off}"
        ) from None


def evaluator_of(
    config: Config,
    splits: tuple[Source, Source] | None,
    best: BestTeacher | None = None,
    after: Callable[[Backbone, Remembering], None] | None = None,
    patches: Mapping[str, OfMasks] | None = None,
) -> Evaluator | None:
    """What judges for the trainer, or none where `evaluate.every` is 0.

    Args:
        best: is shown what k-NN finds. after: as of `callback`. patches: as of `patch_probes`.
    """
    if not config.evaluate.every or splits is None:
        return None
    quality = Quality(config.crops, views=QUALITY_VIEWS)
    probes = patch_probes(config) if patches is None else patches
    known: dict[str, evaluators.Evaluator] = {**EVALUATORS, "quality": quality, **probes}
    chosen = {str(name): known[name] for name in config.evaluate.protocols}
    shared = distributed.world_size() > 1
    options = Options(limit=config.evaluate.limit, shared=shared)
    return of_all(callback(chosen, *splits, options, best, after))


def of_all(evaluator: Evaluator) -> Evaluator:
    """The same on every process, where there are several."""
    return OfAllProcesses(evaluator) if distributed.world_size() > 1 else evaluator


def patch_probes(config: Config) -> dict[str, OfMasks]:
    """Those of `evaluate.protocols` that look at pictures with masks, by name.

    Raises:
        UsageError: there are none.
    """
    evaluate = config.evaluate
    if not evaluate.every:
        return {}
    return probes(evaluate.protocols, evaluate.masks or config.data.path, evaluate.limit)


def patches_at_end(
    config: Config, run: Path, patches: Mapping[str, OfMasks], listener: Listener
) -> None:
    """A row of results.json of each patch probe on the backbone in `run`, once.

    If it fails, a notice says so and the run is whole without it.
    """
    try:
        backbone = checkpoint.load_backbone(run)
        file, sha256 = run / "results.json", backbone.origin.sha256
        backbone.to(resolve_device(config.runtime.device))
        for probe in patches.values():
            mine = [
                r for r in results.load(file) if r.checkpoint == sha256 and AT_END in r.settings
            ]
            if any(row.protocol == probe.probe.method.protocol for row in mine):
                continue
            told = {AT_END: config.evaluate.limit}
            rows = [replace(r, settings=r.settings | told) for r in probe.of(backbone)]
            results.append(file, results.signed(rows, sha256, backbone.origin.name))
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        listener.notice(
            f"the patch probe at the end failed: {error}. The run is whole; "
            f"`xdino patch-probe {run} --data MASKS` scores it"
        )


def judge_at_end(
    config: Config, run: Path, splits: tuple[Source, Source], listener: Listener
) -> None:
    """The linear probe of the backbone in `run`: a row of results.json and one of the metrics.

    A run that was killed before or during this comes back to it; one that has its row is left
    alone. If it fails, a notice says so and the run is whole without it.
    """
    try:
        backbone = checkpoint.load_backbone(run)
        file, limit = run / "results.json", config.evaluate.limit
        mine = [r for r in results.load(file) if r.checkpoint == backbone.origin.sha256]
        row = next((r for r in mine if AT_END in r.settings), None)
        if row is None:
            listener.notice("scoring the frozen features by a linear probe ...")
            backbone.to(resolve_device(config.runtime.device))
            probe = EVALUATORS[str(config.evaluate.linear)]
            (found,) = probe(backbone, *splits, Options(limit=limit))
            row = replace(found, settings={**found.settings, AT_END: limit})
            results.append(file, [row])
        _log(config, run, backbone.origin.facts["iteration"], row, listener)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        listener.notice(
            f"the linear probe at the end failed: {error}. The run is whole; "
            f"`xdino linear {run} --data DATA` scores it"
        )


def _log(config: Config, run: Path, iteration: int, row: results.Row, listener: Listener) -> None:
    """The row's numbers in metrics.jsonl and on the run's pages, once."""
    epoch = 0
    for logged in RunDirectory(run).rows():
        if "linear_top1" in logged and logged["iteration"] == iteration:
            return
        epoch = logged.get("epoch", epoch)
    told = {"iteration": iteration, "epoch": epoch, **numbers("linear", [row])}
    _write_row(config, run, told, listener)


def _write_row(config: RunConfig, run: Path, told: dict[str, Any], listener: Listener) -> None:
    """Numbers of an iteration in metrics.jsonl, and to who listens."""
    runtime = config.runtime
    tree = configuration.to_tree(config)
    mode, project = runtime.wandb, runtime.wandb_project
    log = MetricsLog(run, told["iteration"], mode, project, tree, tensorboard=runtime.tensorboard)
    try:
        log.write(told)
    finally:
        log.close()
    listener.step(told)
