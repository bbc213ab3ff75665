"""Pretraining in this process, alone or as one of those that a launcher started."""

from pathlib import Path

from xdino import data, distributed
from xdino.config import Config
from xdino.errors import UsageError
from xdino.plan import resolve_device
from xdino.train import Evaluator, pretrain
from xdino_eval.evaluate import knn_callback
from xdino_launch.console import ConsoleListener


def run_pretraining(config: Config, run_dir: str | Path, command: list[str] | None = None) -> Path:
    """`pretrain` with the k-NN evaluator, drawn on the console."""
    device = resolve_device(config.runtime.device)
    joined = distributed.start(device)
    try:
        with ConsoleListener() as listener:
            return pretrain(config, run_dir, evaluator_of(config), listener, command)
    finally:
        if joined:
            distributed.stop()


def evaluator_of(config: Config) -> Evaluator | None:
    """k-NN on the labelled splits of `evaluate.data`, or none where `evaluate.every` is 0.

    Raises:
        UsageError: the data has no labelled train/ and val/.
    """
    if not config.evaluate.every:
        return None
    path = config.evaluate.data or config.data.path
    try:
        train, val = data.open_splits(path, config.model.in_chans, config.data.max_pixels)
    except UsageError as error:
        raise UsageError(
            f"evaluate.every asks for k-NN during training, which needs labels: {error}. "
            "Name labelled data with --evaluate.data, or set --evaluate.every 0"
        ) from None
    return knn_callback(train, val, limit=config.evaluate.limit)
