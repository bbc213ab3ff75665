"""Full checkpoints of the published trainer (facebookresearch/dino, main_dino.py), to go on from.

Such a file is a dict of `student` (DistributedDataParallel, hence `module.` before every name),
`teacher` (with or without), `optimizer`, `epoch` (completed ones), `args` (an argparse.Namespace),
`dino_loss` (the centre, spelt center) and, where it ran in fp16, `fp16_scaler`. It holds no state of
random numbers: those that follow come from the seed of whoever goes on.

Letters: K prototypes.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdino.checkpoint.plain import load_plain, reading
from xdino.checkpoint.weights import is_network
from xdino.errors import RunFailed, UsageError, asked

PARTS = ("student", "teacher", "optimizer", "epoch", "dino_loss")


@dataclass(frozen=True)
class FullCheckpoint:
    """What a published trainer saved.

    student, teacher: tensors as `backbone.*` and `head.*`, in the order that the file has them.
    centre: `[1, K]`. moments: what the optimiser keeps of each parameter, by its number. groups: the
    numbers of the parameters that are decayed, and of those that are not. args: as given to it.
    """

    path: Path
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    centre: Tensor
    moments: dict[int, dict[str, Any]]
    groups: tuple[list[int], list[int]]
    scaler: dict[str, Any] | None
    epoch: int
    args: dict[str, Any]


def read_full(path: str | Path) -> FullCheckpoint:
    """Read a full checkpoint; nothing in it runs.

    Raises:
        UsageError: nothing there, or a file of something else (weights alone, a run's own state).
        RunFailed: it is damaged, or holds values that are not finite.
    """
    with asked(f"cannot read {path}"):
        path = Path(path).expanduser()
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder, and a full checkpoint is a file; a run that began here goes on "
                f"by --run {path}"
            )
        if not path.is_file():
            raise UsageError(f"there is no checkpoint {path}")
        with open(path, "rb") as opened:
            start = opened.read(64)
    if start[8:9] == b"{":  # safetensors
        raise UsageError(_lacking(path, PARTS))
    with reading(path):
        tree = load_plain(path)
        if isinstance(tree, dict) and isinstance(tree.get("learner"), dict):
            raise UsageError(
                f"{path} is the state of a run that began here: continue that run by --run"
            )
        parts = tree if isinstance(tree, dict) else {}
        missing = [name for name in PARTS if name not in parts]
        if missing:
            raise UsageError(_lacking(path, missing))
        return _checked(path, parts)


def _lacking(path: Path, missing: Iterable[str]) -> str:
    return (
        f"{path} is no full checkpoint of the published trainer, it lacks {', '.join(missing)}: "
        f"weights alone begin a run by --init {path}"
    )


def _checked(path: Path, tree: dict[str, Any]) -> FullCheckpoint:
    size, epoch, loss = path.stat().st_size, tree["epoch"], tree["dino_loss"]
    networks = {role: _network(role, tree[role], size) for role in ("student", "teacher")}
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < 2**31:
        raise RunFailed(f"it is damaged: it has no epoch {epoch!r:.40}")
    if not is_network(loss, size) or loss.keys() != {"center"}:
        raise RunFailed("it is damaged: its dino_loss is no centre")
    moments, groups = _moments(tree["optimizer"], size)
    values = {f"{role}'s {n}": v for role, own in networks.items() for n, v in own.items()}
    values |= {"centre": loss["center"]}
    for number, own in moments.items():
        values |= {f"optimiser's {key} {number}": value for key, value in own.items()}
    spoilt = [n for n, v in values.items() if isinstance(v, Tensor) and not v.isfinite().all()]
    if spoilt:
        raise RunFailed(
            f"it holds values that are not finite (the {spoilt[0]}): use an earlier checkpoint"
        )
    args, scaler = tree.get("args"), tree.get("fp16_scaler")
    return FullCheckpoint(
        path,
        networks["student"],
        networks["teacher"],
        loss["center"].float().view(1, -1),
        moments,
        groups,
        scaler if isinstance(scaler, dict) and scaler else None,
        epoch,
        dict(vars(args)) if isinstance(args, argparse.Namespace) else {},
    )


def _network(role: str, tree: Any, size: int) -> dict[str, Tensor]:
    if not is_network(tree, size):
        raise RunFailed(f"it is damaged: its {role} is no network")
    own = {name.removeprefix("module."): value for name, value in tree.items()}
    strange = [name for name in own if not name.startswith(("backbone.", "head."))]
    if strange or len(own) < len(tree):
        raise UsageError(
            f"its {role} is none of the published trainer's: {strange[:1] or 'a name is there twice'}"
            " instead of backbone.* and head.*"
        )
    return own


def _moments(tree: Any, size: int) -> tuple[dict[int, dict[str, Any]], tuple[list[int], list[int]]]:
    """What the optimiser keeps of each parameter, and the numbers of its two groups."""
    try:
        first, second = (list(group["params"]) for group in tree["param_groups"])
        state = {
            number: {key: _value(key, value) for key, value in own.items() if value is not None}
            for number, own in tree["state"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunFailed("it is damaged: its optimizer is none of two groups") from None
    numbers = [*first, *second]
    if not all(type(n) is int for n in numbers) or not state.keys() <= set(numbers):
        raise RunFailed("it is damaged: its optimizer keeps moments of no parameter")
    kept = {f"{n} {key}": value for n, own in state.items() for key, value in own.items()}
    if kept and not is_network(kept, size):
        raise RunFailed("it is damaged: its optimizer keeps what are no moments")
    return state, (first, second)


def _value(key: str, value: Any) -> Any:
    """Steps are numbers in files of older versions of torch."""
    return torch.tensor(float(value)) if key == "step" else value
