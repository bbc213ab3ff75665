"""A full checkpoint of the published trainer goes on here: `train.continue_from`.

Student, teacher, centre and the optimiser's moments become the learner's, and its completed epochs
the iteration to go on from, counted by this run's own steps an epoch. The schedules are this
configuration's; where the checkpoint was trained with other settings, a sentence says so.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xdino import checkpoint, optim, weight_names
from xdino.checkpoint import FullCheckpoint
from xdino.config import Config, Head, in_epochs
from xdino.errors import RunFailed, UsageError
from xdino.learner import Learner
from xdino.plan.plan import Plan
from xdino.student_teacher import MultiCropNetwork

GAIN = "head.last_layer.weight_g"  # trained where head.norm_last_layer is false
#: What each optimiser keeps of a parameter, under its published name and under ours.
MOMENTS = {
    "adamw": {"step": "step", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "sgd": {"momentum_buffer": "momentum_buffer"},
    "lars": {"mu": "momentum_buffer"},
}


@dataclass(frozen=True)
class Begun:
    """`iteration`: completed steps, as this run counts them. `notices`: what a person should know.
    `sha256`: of the file."""

    iteration: int
    notices: tuple[str, ...]
    sha256: str


def continue_published(plan: Plan, learner: Learner) -> Begun:
    """Give the learner what the checkpoint that `train.continue_from` names holds.

    Raises:
        UsageError: it does not fit the configuration; the message names the keys that would.
        RunFailed: it is damaged.
    """
    config = plan.config
    assert config.train.continue_from is not None
    found = checkpoint.read_full(config.train.continue_from)
    begins_at = found.epoch * plan.steps_per_epoch
    if begins_at >= plan.iterations:
        raise UsageError(
            f"{found.path} was trained for {found.epoch} epochs, and this run ends after "
            f"{config.train.all_epochs}: raise train.epochs, or add epochs behind its schedules "
            "with --train.extended N"
        )
    _check_head(found, config.head)
    for role in ("student", "teacher"):
        _check_network(found, role, getattr(learner, role), config.model.arch)
    state = learner.state_dict()
    state |= {"student": found.student, "teacher": found.teacher}
    if "centre" in state:  # targets may do without
        state["centre"] = found.centre
    state["optimiser"] = {
        **state["optimiser"],
        "state": _moments(found, learner.student, config.optim.name),
    }
    if found.scaler is not None and learner.stepping.scaler.is_enabled():
        state["scaler"] = found.scaler
    try:
        learner.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise RunFailed(f"{found.path} is damaged: {error}") from error
    digest = checkpoint.sha256(found.path)
    return Begun(begins_at, tuple(_notices(found, plan, begins_at)), digest)


# --- does it fit ---


def _check_head(found: FullCheckpoint, head: Head) -> None:
    """Raises UsageError where the file's head is another, with the options that make ours alike."""
    own = {n.removeprefix("head."): v for n, v in found.student.items() if n.startswith("head.")}
    layers = [v for n, v in own.items() if n.startswith("mlp.") and n.endswith("weight")]
    layers = [v for v in layers if v.ndim == 2]
    last = own.get("last_layer.weight_v")
    if not layers or last is None or last.ndim != 2:
        raise UsageError(f"{found.path} has no DINO head in its student")
    theirs = {
        "prototypes": last.shape[0],
        "bottleneck_dim": last.shape[1],
        "layers": len(layers),
        "use_bn": any(name.endswith("running_mean") for name in own),
    }
    if len(layers) > 1:
        theirs["hidden_dim"] = layers[0].shape[0]
    _alike(found, {k: v for k, v in theirs.items() if v != getattr(head, k)}, head)


def _alike(found: FullCheckpoint, differing: Mapping[str, Any], head: Head) -> None:
    if differing:
        options = " ".join(f"--head.{k} {str(v).lower()}" for k, v in differing.items())
        here = ", ".join(f"{key} {getattr(head, key)}" for key in differing)
        raise UsageError(f"{found.path} has another head than this run ({here}): {options}")


def _check_network(found: FullCheckpoint, role: str, network: MultiCropNetwork, arch: str) -> None:
    """Raises UsageError where a network of the file is another than ours."""
    tensors: dict[str, Tensor] = getattr(found, role)
    problems = weight_names.differences(tensors, network)
    if not problems:
        return
    own = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    if not weight_names.differences(own, network.backbone):
        advice = "its head is another than this run's (sections head and loss)"
    elif (fits := weight_names.fitting(own)) == arch:
        advice = "it is of images of other channels: see model.in_chans"
    elif fits is not None:
        advice = f"it fits --model.arch {fits}"
    else:
        advice = weight_names.advice(own).replace("--arch", "--model.arch")
    raise UsageError(f"{found.path} does not fit {arch}: {role}'s tensors {problems}; {advice}")


# --- the optimiser ---


def _moments(
    found: FullCheckpoint, student: MultiCropNetwork, name: str
) -> dict[int, dict[str, Any]]:
    """What the optimiser `name` keeps, by our numbers of the parameters.

    A file numbers them as its own network lists them, the decayed before the others; that order is
    the one in which its student's tensors stand.
    """
    keys = MOMENTS[name]
    held = {key for own in found.moments.values() for key in own}
    if held and held != set(keys):
        kind = next((kind for kind, names in MOMENTS.items() if held == set(names)), None)
        advice = f"--optim.name {kind}" if kind else "no optimiser of this project keeps such"
        raise UsageError(
            f"{found.path} holds another optimiser's moments ({', '.join(sorted(held))}) than "
            f"{name}'s: {advice}"
        )
    numbers = [number for group in found.groups for number in group]
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    if abs(len(numbers) - len(trained)) == 1 and (len(numbers) > len(trained)) == (
        GAIN not in trained
    ):
        value = str(GAIN in trained).lower()
        raise UsageError(
            f"{found.path} was trained with another last layer: --head.norm_last_layer {value}"
        )
    decayed, plain = ([id(p) for p in group["params"]] for group in _groups(student))
    theirs = [trained[n] for n in found.student if n in trained]
    order = [p for p in theirs if id(p) in set(decayed)] + [
        p for p in theirs if id(p) in set(plain)
    ]
    if [len(group) for group in found.groups] != [len(decayed), len(plain)]:
        raise RunFailed(
            f"{found.path} is damaged: its optimizer is of {len(numbers)} parameters, its student "
            f"has {len(trained)}"
        )
    ours = {p: number for number, p in enumerate([*decayed, *plain])}
    moved: dict[int, dict[str, Any]] = {}
    for number, p in zip(numbers, order, strict=True):
        own = found.moments.get(number, {})
        if any(v.shape != p.shape for k, v in own.items() if k != "step"):
            raise RunFailed(
                f"{found.path} is damaged: its optimizer's moments have other shapes than its student"
            )
        if own:
            moved[ours[id(p)]] = {keys[key]: value for key, value in own.items()}
    return moved


def _groups(student: MultiCropNetwork) -> list[dict[str, Any]]:
    return optim.parameter_groups(student)


# --- what differs ---

_Get = Callable[[Config], Any]
#: The published trainer's arguments, our keys of the same meaning, and their values.
SETTINGS: dict[str, tuple[str, _Get]] = {
    "epochs": ("train.epochs", lambda c: c.train.epochs),
    "lr": ("optim.lr", lambda c: c.optim.lr),
    "min_lr": ("optim.min_lr", lambda c: c.optim.min_lr),
    "warmup_epochs": (
        "optim.warmup_epochs",
        lambda c: in_epochs(c.optim.warmup_epochs, c.train.epochs),
    ),
    "weight_decay": ("optim.weight_decay", lambda c: c.optim.weight_decay),
    "weight_decay_end": ("optim.weight_decay_end", lambda c: c.optim.weight_decay_end),
    "clip_grad": ("optim.clip_grad", lambda c: c.optim.clip_grad),
    "freeze_last_layer": ("optim.freeze_last_layer", lambda c: c.optim.freeze_last_layer),
    "momentum_teacher": ("teacher.momentum", lambda c: c.teacher.momentum),
    "warmup_teacher_temp": ("loss.warmup_teacher_temp", lambda c: c.loss.warmup_teacher_temp),
    "teacher_temp": ("loss.teacher_temp", lambda c: c.loss.teacher_temp),
    "warmup_teacher_temp_epochs": (
        "loss.warmup_teacher_temp_epochs",
        lambda c: in_epochs(c.loss.warmup_teacher_temp_epochs, c.train.epochs),
    ),
    "drop_path_rate": ("model.drop_path", lambda c: c.model.drop_path),
    "global_crops_scale": ("crops.global_scale", lambda c: c.crops.global_scale),
    "local_crops_scale": ("crops.local_scale", lambda c: c.crops.local_scale),
    "local_crops_number": ("crops.local_count", lambda c: c.crops.local_count),
}


def _notices(found: FullCheckpoint, plan: Plan, begins_at: int) -> Iterator[str]:
    yield (
        f"going on from {found.path}: student, teacher, centre and optimiser after {found.epoch} "
        f"epochs, which are {begins_at:,} iterations here"
    )
    made = {int(own["step"]) for own in found.moments.values() if "step" in own}
    if made and max(made) != begins_at:
        yield (
            f"there these epochs were {max(made):,} iterations: its data or batches were of another "
            "size, and the schedules go by epochs"
        )
    differing = []
    for argument, (key, value_of) in SETTINGS.items():
        if argument in found.args:
            theirs, ours = _comparable(found.args[argument]), _comparable(value_of(plan.config))
            if theirs != ours:
                differing.append(f"{key} {_shown(theirs)} (here {_shown(ours)})")
    batch, world = found.args.get("batch_size_per_gpu"), found.args.get("world_size", 1)
    if isinstance(batch, int) and isinstance(world, int) and batch * world != plan.total_batch:
        differing.append(f"images a step {batch * world} (here {plan.total_batch})")
    if differing:
        yield f"it was trained with other settings, and these go on: {', '.join(differing)}"


def _comparable(value: Any) -> Any:
    """Numbers as floats to six digits, pairs as tuples: as they stand in an argument."""
    if isinstance(value, list | tuple):
        return tuple(_comparable(each) for each in value)
    if isinstance(value, int | float) or hasattr(value, "item"):
        return float(f"{float(value):.6g}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else f"{value!r:.40}"
