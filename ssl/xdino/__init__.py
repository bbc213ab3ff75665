"""Pretraining of image backbones without labels: XCiT (arXiv 2106.09681) by DINO (arXiv 2104.14294).

    import xdino

    model = xdino.pretrain("photos", run="runs/photos", epochs=20)
    model = xdino.load("runs/photos")     # later; or a published DINO, XCiT or timm file
    features = model.embed("photos")      # [N, D]: paths, arrays, tensors or Pillow's images
    maps = model.attention("cat.jpg")     # [heads, h, w]

`import xdino_eval` judges features. torch is imported by the first call, not by `import xdino`.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdino.backbone import Backbone
    from xdino.config import Config
    from xdino.job import Evaluator, Listener

__all__ = ["__version__", "load", "pretrain"]
__version__ = "0.2.0"


def load(
    weights: str | os.PathLike[str], arch: str | None = None, role: str = "teacher"
) -> "Backbone":
    """The frozen backbone of a run directory or of a weights file.

    Args:
        weights: a run directory, a file of ours, or a published DINO, XCiT or timm file.
        arch: the network's name, for files that do not say: "xcit_small_12_p16", "vit_small", ...
        role: "teacher" or "student", where there are both.

    Returns:
        A network in evaluation mode on the CPU (`.to("cuda")` moves it): `model(batch)` maps
        normalised images `[B, C, H, W]` to `[B, embed_dim]`, `model.embed(images)` takes images as
        they are, `model.attention(image)` shows what it looks at.

    Raises:
        ValueError: nothing there, no such architecture, or tensors that do not fit it.
        xdino.errors.RunFailed: a damaged file.
    """
    from xdino.checkpoint import load_backbone

    return load_backbone(os.fspath(weights), arch, role)


def pretrain(
    data: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    config: "str | os.PathLike[str] | Config | None" = None,
    minutes: float | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluator: "Evaluator | None" = None,
    quiet: bool = False,
) -> "Backbone":
    """Pretrain on images without labels, or continue the run that lies in `run`.

    As `xdino pretrain CONFIG --run RUN --data.path DATA`, but for what judges while it trains, which
    is `evaluator`'s. A finished run is loaded and left alone.

    Args:
        data: a folder of images, a tar file or a folder of them, or a text list of paths.
        run: the run's folder. It may be there, if it holds the same run, unfinished or finished.
        config: a recipe's name (`xdino.config.recipes()`), a YAML file, or a configuration; None =
            "small_data", or with `minutes` what fits the images, the machine and the time.
        minutes: how long all of it may take, in place of `config` and `epochs`.
        epochs: passes over the images; None = as the recipe says.
        settings: keys of the configuration on top, `{"optim.lr": 1e-3, "train.batch_size": 32}`.
        evaluator: given the teacher every `evaluate.every` epochs; its numbers go to metrics.jsonl.
            `xdino_eval.during_training.callback` makes one.
        quiet: print no progress on standard error.

    Returns:
        The pretrained backbone, the teacher, as `load` gives it.

    Raises:
        ValueError: it cannot be done as asked; nothing was written.
        xdino.errors.RunFailed: the world intervened: a disk, a loss that is not finite.
        xdino.errors.Stopped: an interrupt, after the state was saved: the same call continues.
    """
    import contextlib

    from xdino.job import LinesListener, Listener
    from xdino.pretraining import pretrain as run_to_its_end
    from xdino.runtime import distributed
    from xdino.runtime.device import resolve_device

    on_top = _on_top(data, epochs, settings or {})
    chosen = None if minutes is not None else _configuration(config or "small_data", on_top)
    device = on_top.get("runtime.device", "auto") if chosen is None else chosen.runtime.device
    if minutes is not None and not (config is None and epochs is None):
        raise ValueError("minutes choose the recipe and its length: leave out config and epochs")
    listener = Listener() if quiet else LinesListener()
    with contextlib.ExitStack() as stack:
        if distributed.start(resolve_device(str(device))):
            stack.callback(distributed.stop)
        if chosen is None:
            assert minutes is not None
            chosen = _timed(run, minutes, on_top, listener)
        if evaluator is None and (chosen.evaluate.every or chosen.evaluate.linear):
            listener.notice("scores along the way need evaluator=: there are none")
        run_to_its_end(chosen, os.fspath(run), evaluator, listener)
        distributed.barrier()
    return load(run)


def _on_top(
    data: str | os.PathLike[str], epochs: int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Dotted keys and what they are to be, as `xdino.config.load` takes them."""
    from xdino import config as configuration
    from xdino.errors import UsageError, nearest

    on_top = {**settings, "data.path": os.fspath(data)}
    for key in on_top:
        if "." not in key:
            known = configuration.dotted_keys()
            near = next((name for name in known if name.endswith(f".{key}")), None)
            hint = f'did you mean "{near}"?' if near else nearest(key, known)
            raise UsageError(f'settings are called section.key, got "{key}": {hint}')
    return on_top if epochs is None else on_top | {"train.epochs": epochs}


def _configuration(
    config: "str | os.PathLike[str] | Config", on_top: Mapping[str, Any]
) -> "Config":
    from xdino import config as configuration

    named = config if isinstance(config, configuration.Config) else os.fspath(config)
    return configuration.load(named, on_top)


def _timed(
    run: str | os.PathLike[str], minutes: float, on_top: Mapping[str, Any], listener: "Listener"
) -> "Config":
    """What a run was begun with; of a new one the recipe for so many minutes."""
    import time
    from pathlib import Path

    from xdino.config.keys import written
    from xdino.forecast.choosing import Asked, Choosing
    from xdino.run_directory import CONFIG_FILE
    from xdino.runtime.device import resolve_device

    began, folder = time.monotonic(), Path(run)
    if (folder / CONFIG_FILE).is_file():
        return _configuration(folder / CONFIG_FILE, on_top)
    wanted = Asked(minutes, None, {key: written(value) for key, value in on_top.items()})
    device = resolve_device(wanted.given.get("runtime.device", "auto"))
    return Choosing(wanted, folder, device, began, listener.notice).recipe().config
