"""A tree of keys and values -> a checked configuration, and back.

Every mistake is reported at once, each with the nearest valid name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

import yaml
from pydantic import TypeAdapter, ValidationError

from xdino.config.schema import Config, RunConfig, in_epochs, keys_of
from xdino.errors import UsageError, nearest
from xdino.values import read, shown

C = TypeVar("C", bound=RunConfig)
Keys = Mapping[str, Mapping[str, Any]]  # as of `keys_of`

# What others call the same; a recipe or a command may say either.
SPELLINGS = {
    "optimizer": "optim",
    "optimiser": "optim",
    "center_momentum": "centre_momentum",
    "global_solarise": "global_solarize",
    "greyscale": "grayscale",
}


def spelt(key: str) -> str:
    """A dotted key as it is written here.

    >>> spelt("optimizer.lr"), spelt("loss.center_momentum")
    ('optim.lr', 'loss.centre_momentum')
    """
    return ".".join(SPELLINGS.get(part, part) for part in key.split("."))


_adapters: dict[type[RunConfig], TypeAdapter[Any]] = {}


def _adapter(schema: type[RunConfig]) -> TypeAdapter[Any]:
    """Made once: that takes longer than a configuration does."""
    if schema not in _adapters:
        _adapters[schema] = TypeAdapter(schema)
    return _adapters[schema]


@overload
def parse(tree: Mapping[str, Any], where: str = ...) -> Config: ...
@overload
def parse(tree: Mapping[str, Any], where: str, schema: type[C]) -> C: ...
def parse(
    tree: Mapping[str, Any], where: str = "the configuration", schema: type[Any] = Config
) -> Any:
    """A nested mapping -> a checked configuration. Texts are read by the types of their keys.

    Raises:
        UsageError: every unknown key and invalid value, in one message.
    """
    keys = keys_of(schema)
    resolved, problems = _resolved(tree, keys)
    try:
        config = _adapter(schema).validate_python(resolved)
    except ValidationError as error:
        # One sentence a key: a union reports each of its members.
        problems += dict.fromkeys(_sentence(e, keys) for e in error.errors())
    else:
        if not problems:
            own = _contradictions(config) if schema is Config else config.contradictions()
            problems = [*own, *_of_bands(config)]
            if not problems:
                return config
    raise UsageError(f"{where}: " + "; ".join(problems))


def _suggest(location: tuple[Any, ...], keys: Keys) -> str:
    """The nearest valid name for an unknown key: in its section, or the same key elsewhere."""
    section, leaf = str(location[0]), str(location[-1])
    if len(location) == 1:
        known, _, key = spelt(section).partition(".")
        written_flat = key in keys.get(known, {})
        return f"write {key} below {known}:" if written_flat else nearest(section, keys)
    elsewhere = [f"{other}.{leaf}" for other, below in keys.items() if leaf in below]
    return f'did you mean "{elsewhere[0]}"?' if elsewhere else nearest(leaf, keys.get(section, {}))


def _sentence(error: Any, keys: Keys) -> str:
    location = tuple(part for part in error["loc"] if isinstance(part, str | int))
    key = ".".join(str(part) for part in location[:2])
    kind, value = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} is not a known key: {_suggest(location, keys)}"
    if kind == "dataclass_type":
        return f"{key} is a section and needs keys below it, got {shown(value)}"
    return f"{key}: {error['msg'].removeprefix('Value error, ').lower()}, got {shown(value)}"


def _resolved(tree: Mapping[str, Any], keys: Keys) -> tuple[dict[str, Any], list[str]]:
    """Texts read by the types of their keys, and a sentence for each that cannot be."""
    resolved: dict[str, Any] = {}
    problems: list[str] = []
    for given, below in tree.items():
        section = spelt(str(given))
        if section in resolved:
            problems.append(f"{section} is given twice, once as {given}")
        elif section in keys and isinstance(below, Mapping):
            resolved[section] = _resolved_section(section, below, keys[section], problems)
        else:
            resolved[section] = {} if below is None else below
    return resolved, problems


def _resolved_section(
    section: str, below: Mapping[str, Any], kinds: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for leaf, value in below.items():
        key = spelt(str(leaf))
        if key in seen:
            problems.append(f"{section}.{key} is given twice, as {seen[key]} and {leaf}")
            continue
        seen[key] = str(leaf)
        try:
            kind = kinds.get(key)
            leaves[key] = value if kind is None else read(kind, value)
        except ValueError as error:
            comma = "" if str(error).startswith("cannot") else ":"
            problems.append(f"{section}.{key}{comma} {error}")
    return leaves


def _of_the_objective(config: Config) -> Iterable[str]:
    if config.loss.objective != "dino" and config.loss.targets != "centre":
        yield (
            f"loss.targets {config.loss.targets} is for loss.objective dino: {config.loss.objective} "
            "has no prototypes. Leave loss.targets at centre"
        )
    if config.train.continue_from and config.loss.objective != "dino":
        yield (
            f"train.continue_from goes on with DINO's heads and centre, which loss.objective "
            f"{config.loss.objective} has not: leave it at dino, or give the file as train.init"
        )
    if config.train.init and config.train.continue_from:
        yield (
            "train.init and train.continue_from cancel each other: the one begins with weights "
            "alone, the other goes on with all that a full checkpoint holds. Give one"
        )


def _of_bands(config: RunConfig) -> Iterable[str]:
    if not hasattr(config, "model"):
        return
    try:
        _ = config.channels
    except UsageError as error:
        yield str(error)


def _contradictions(config: Config) -> Iterable[str]:
    epochs = config.train.epochs
    for key, duration in (
        ("optim.warmup_epochs", config.optim.warmup_epochs),
        ("loss.warmup_teacher_temp_epochs", config.loss.warmup_teacher_temp_epochs),
    ):
        if in_epochs(duration, epochs) > epochs:
            yield (
                f"{key} is {duration}, longer than the run of {epochs} epochs (train.epochs): "
                'shorten it or give a share such as "10%"'
            )
    yield from _of_the_objective(config)
    for key in ("global_scale", "local_scale"):
        low, high = getattr(config.crops, key)
        if low > high:
            yield f"crops.{key} must rise, got {low} to {high}"
    for section in ("crops", "curriculum"):
        sizes = getattr(config, section)
        used = section == "crops" or config.curriculum.share > 0
        if used and config.crops.local_count and sizes.local_size > sizes.global_size:
            yield (
                f"{section}.local_size is {sizes.local_size}, larger than {section}.global_size, "
                f"{sizes.global_size}: local crops are the small ones"
            )
    for key in ("global_size", "local_size"):
        early, late = getattr(config.curriculum, key), getattr(config.crops, key)
        if config.curriculum.share > 0 and early > late:
            yield (
                f"curriculum.{key} is {early}, larger than crops.{key}, {late}: the curriculum "
                "begins with small crops"
            )
    if (config.crops.mean is None) != (config.crops.std is None):
        yield "crops.mean and crops.std must be given together"
    runtime = config.runtime
    for key in unfused(config):
        if runtime.kernels == "fused":
            yield (
                f"runtime.kernels fused and {key} cancel each other: the fused kernels have their "
                f"own way through the network. Leave {key} off, or set runtime.kernels to plain"
            )
    project = runtime.wandb_project
    if runtime.wandb != "off" and (
        not project or len(project) > 128 or set(project) & set('/\\#?%:"')
    ):
        yield (
            f"runtime.wandb_project cannot be {shown(project)}: wandb takes 1 to 128 characters "
            "without / \\ # ? % : and quotes"
        )


def unfused(config: Config) -> list[str]:
    """The options that were switched on and need the plain path through the network."""
    keys = ("activation_checkpointing", "compile")
    return [f"runtime.{key}" for key in keys if getattr(config.runtime, key)]


# Back into keys and values


def to_tree(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The whole configuration as plain types."""
    return _adapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: RunConfig) -> str:
    return head_of(config) + yaml.safe_dump(to_tree(config), sort_keys=False)


def head_of(config: RunConfig) -> str:
    """The line that a recipe of this kind begins with; pretraining needs none."""
    return "" if config.kind == Config.kind else f"kind: {config.kind}\n"


def differing_keys(a: RunConfig, b: RunConfig, besides: Iterable[str] = ()) -> list[str]:
    """Dotted keys whose values differ, but for those that may change when a run is continued.

    `besides`: others that may.
    """
    free = a.free | {*besides}
    left, right = to_tree(a), to_tree(b)
    return [
        f"{section}.{key} ({left[section][key]} against {right[section][key]})"
        for section in left
        if section != "runtime"
        for key in left[section]
        if left[section][key] != right[section][key] and f"{section}.{key}" not in free
    ]
