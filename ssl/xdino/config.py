"""The configuration of a run: frozen, strict, and the only place where defaults live.

A recipe is a YAML file with the sections below; whatever it leaves out has the default written here,
which is the published trainer's unless a comment says otherwise. Every mistake in a recipe or on the
command line is reported at once, each with the nearest valid name.

Texts, in a recipe as on the command line, are read by the type of their key (see `values`).

All sections but `runtime` and `evaluate` decide what is learned. `runtime` holds what may change when
a run is continued: where it runs, how often it logs and saves; `FREE` names the other keys that may.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from xdino import values
from xdino.errors import UsageError, asked, nearest
from xdino.nonfinite import valid_policy
from xdino.values import shown

#: Largest image that is decoded, in pixels: Pillow's own limit against decompression bombs.
MAX_PIXELS = 178_956_970

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]
# Upper bounds keep what nobody means from being tried; what fits into memory, the plan finds out.
Positive = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Width = Annotated[int, Field(ge=1, le=2**17)]
Pixels = Annotated[int, Field(ge=1, le=2**13)]
NotNegative = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]


def _duration(value: object) -> object:
    """Numbers of epochs stay numbers; "3.33%" is a share of the run."""
    fits = re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*%", value) if isinstance(value, str) else True
    if not fits or (isinstance(value, int | float) and value < 0):
        raise ValueError('give a number of epochs, or a share of the run such as "10%"')
    return value


Epochs = Annotated[float | str, BeforeValidator(_duration)]


def in_epochs(duration: float | str, epochs: int) -> float:
    """A duration in epochs, whichever way it was written.

    >>> in_epochs("10%", 300)
    30.0
    """
    if isinstance(duration, str) and duration.endswith("%"):
        return float(duration[:-1]) / 100 * epochs
    return float(duration)


@dataclass(frozen=True, config=STRICT)
class Model:
    """The backbone: an XCiT by its published name (patch 16, 8 or 4), or any timm model by name.

    `None` means: as the name says. The other values reshape an XCiT.
    """

    arch: str = "xcit_small_12_p16"
    in_chans: Literal[1, 3] | None = None  # grey or colour; None: as the data set has it
    patch_size: Literal[4, 8, 16] | None = None
    embed_dim: Width | None = None
    depth: Annotated[int, Field(ge=1, le=1000)] | None = None
    num_heads: Width | None = None
    eta: Annotated[float, Field(gt=0, le=1e4)] | None = None  # LayerScale at the start
    tokens_norm: bool | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the student only


@dataclass(frozen=True, config=STRICT)
class Head:
    """The projection head. Many prototypes suit large data; hundreds to thousands, small data."""

    prototypes: Annotated[int, Field(ge=2, le=2**28)] = 65536
    hidden_dim: Width = 2048
    bottleneck_dim: Width = 256
    layers: Annotated[int, Field(ge=1, le=100)] = 3
    norm_last_layer: bool = True  # False does better for small networks, True is steadier
    use_bn: bool = False


@dataclass(frozen=True, config=STRICT)
class Loss:
    """Temperatures and centre. A teacher above 0.07 is usually unstable; warm it up from 0.04."""

    student_temp: Temperature = 0.1
    warmup_teacher_temp: Temperature = 0.04
    teacher_temp: Temperature = 0.04
    warmup_teacher_temp_epochs: Epochs = 0.0  # a table of one value an epoch
    centre_momentum: Share = 0.9


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """Momentum of the moving average, cosine to its end. Small batches want it higher (0.9995 at 256)."""

    momentum: Share = 0.996
    momentum_end: Share = 1.0


@dataclass(frozen=True, config=STRICT)
class Crops:
    """Multi-crop and its photometric part; scales are shares of the image's area, the rest
    probabilities and strengths as in torchvision's ColorJitter."""

    global_size: Pixels = 224
    global_scale: Scale = (0.4, 1.0)
    global_blur: tuple[Share, Share] = (1.0, 0.1)
    global_solarize: tuple[Share, Share] = (0.0, 0.2)
    local_count: Annotated[int, Field(ge=0, le=1000)] = 8
    local_size: Pixels = 96
    local_scale: Scale = (0.05, 0.4)
    local_blur: Share = 0.5
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale: Share = 0.2
    mean: tuple[Annotated[float, Field(ge=-1e4, le=1e4)], ...] | None = (
        None  # None: ImageNet's (its luma for one channel)
    )
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] | None = None


@dataclass(frozen=True, config=STRICT)
class Curriculum:
    """Small crops for the first `share` of the iterations, those of `crops` for the rest.

    FastDINOv2 (arXiv 2507.03779): half the sizes for 75 % of the run, 1.6 times less time for
    DINOv2 with a ViT-B. Its second part, patches of Gaussian noise in the later crops, serves
    robustness to corruption and is not here. Off unless `share` is above 0.

    BatchNorm (XCiT's stem and its local patch interaction) keeps running statistics of the crops
    it saw, each update counting a tenth: during the small part they are those of small crops, while
    k-NN looks at full-size images through them; some tens of updates after the switch they are
    those of large crops. So numbers from before the switch judge the features with a handicap of
    unknown size, and the number at the end of a run has none.
    """

    share: Share = 0.0
    global_size: Pixels = 112
    local_size: Pixels = 48


@dataclass(frozen=True, config=STRICT)
class Data:
    """`path`: a folder (flat, nested, or with train/), a text list of files, a tar file or a folder
    of them, `fashion_mnist` or `fashion_mnist_sample`."""

    path: str = ""
    max_bad_share: Share = (
        0.05  # unreadable images are skipped up to this share, then the run stops
    )
    max_pixels: Annotated[int, Field(ge=1, le=2**40)] = (
        MAX_PIXELS  # of an image; a larger one counts as unreadable
    )


@dataclass(frozen=True, config=STRICT)
class Optim:
    """`lr` is for a total batch of 256 and scales linearly with it; `min_lr` does not scale."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: NotNegative = 5e-4
    min_lr: NotNegative = 1e-6
    warmup_epochs: Epochs = 10.0
    weight_decay: NotNegative = 0.04
    weight_decay_end: NotNegative = 0.4
    clip_grad: NotNegative = 3.0  # per parameter tensor; 0 for none
    freeze_last_layer: Count = 1  # epochs


@dataclass(frozen=True, config=STRICT)
class Train:
    """The total batch is batch_size x accumulate x number of processes."""

    epochs: Positive = 100
    batch_size: Positive = 64  # images a process and micro-batch
    accumulate: Positive = 1  # micro-batches an optimisation step
    # The published trainer uses fp16 with a scaler; "auto" is bf16 on CUDA, which needs none, and
    # fp32 on the CPU.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init: str | None = None  # weights to start from; continuing a run needs none
    # What to do about a step whose numbers are not finite: "stop", "skip N" (at most N in a row),
    # "rollback FACTOR" (to the last saved state, the learning rate times the factor; see `nonfinite`).
    nonfinite: Annotated[str, AfterValidator(valid_policy)] = "stop"


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """k-NN while training, a linear probe at the end, and the size at which both judge."""

    every: Count = 0  # epochs between k-NN evaluations; 0 for never
    linear: Literal["logistic", "grid"] | None = (
        None  # the probe at the end; "grid" wants many images
    )
    data: str | None = None  # labelled train/ and val/; None: data.path
    limit: Positive = 10_000  # images of each split at most, the same ones every time
    input_size: Pixels | None = None  # None: crops.global_size
    resize: Pixels | None = (
        None  # shorter side before the centre crop; None: input_size * 256 / 224
    )


@dataclass(frozen=True, config=STRICT)
class Runtime:
    """What does not change results."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1
    workers: Annotated[int, Field(ge=0, le=10_000)] = 8
    prefetch: Annotated[int, Field(ge=1, le=10_000)] = 3  # micro-batches made ahead
    # Keep the blocks' inputs only and compute the rest again: less memory, more time.
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of both backbones: minutes at the start, once a crop size
    # Fused Triton kernels: "auto" where a check at the start finds them equal and faster.
    kernels: Literal["auto", "plain", "fused"] = "plain"
    log_every: Positive = 10  # iterations
    checkpoint_every: Positive = 500  # iterations; the end of an epoch is always saved
    keep_every: Count = 20  # epochs between checkpoints that are kept; 0: none
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "xdino"


@dataclass(frozen=True, config=STRICT)
class Config:
    model: Model = Model()
    head: Head = Head()
    loss: Loss = Loss()
    teacher: Teacher = Teacher()
    crops: Crops = Crops()
    curriculum: Curriculum = Curriculum()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()


_ADAPTER = TypeAdapter(Config)
SECTIONS = {field.name: field.type for field in dataclasses.fields(Config)}


def dotted_keys() -> list[str]:
    """Every dotted key there is, "optim.lr" and the rest."""
    return [
        f"{name}.{field.name}"
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)  # type: ignore[arg-type]
    ]


def _suggest(location: tuple[Any, ...]) -> str:
    """The nearest valid name for an unknown key: in its section, or the same key elsewhere."""
    if len(location) == 1:
        section, _, leaf = spelt(str(location[0])).partition(".")
        if f"{section}.{leaf}" in dotted_keys():
            return f"write {leaf} below {section}:"
        return nearest(str(location[0]), SECTIONS)
    section, leaf = str(location[0]), str(location[-1])
    elsewhere = [key for key in dotted_keys() if key.split(".")[1] == leaf]
    if elsewhere:
        return f'did you mean "{elsewhere[0]}"?'
    return nearest(
        leaf, [key.split(".")[1] for key in dotted_keys() if key.startswith(section + ".")]
    )


def _sentence(error: Any) -> str:
    location = tuple(part for part in error["loc"] if isinstance(part, str | int))
    key = ".".join(str(part) for part in location[:2])
    kind, value = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} is not a known key: {_suggest(location)}"
    if kind == "dataclass_type":
        return f"{key} is a section and needs keys below it, got {shown(value)}"
    return f"{key}: {error['msg'].removeprefix('Value error, ').lower()}, got {shown(value)}"


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


def _resolved(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Texts read by the types of their keys, and a sentence for each that cannot be."""
    resolved: dict[str, Any] = {}
    problems = []
    for given, below in tree.items():
        section = spelt(str(given))
        if section in resolved:
            problems.append(f"{section} is given twice, once as {given}")
            continue
        resolved[section] = {} if below is None else below
        if section not in SECTIONS or not isinstance(below, Mapping):
            continue
        kinds = {field.name: field.type for field in dataclasses.fields(SECTIONS[section])}  # type: ignore[arg-type]
        leaves: dict[str, Any] = {}
        seen: dict[str, str] = {}
        for leaf, value in below.items():
            key = spelt(str(leaf))
            if key in seen:
                problems.append(f"{section}.{key} is given twice, as {seen[key]} and {leaf}")
                continue
            seen[key] = str(leaf)
            try:
                leaves[key] = values.read(kinds[key], value) if key in kinds else value
            except ValueError as error:
                comma = "" if str(error).startswith("cannot") else ":"
                problems.append(f"{section}.{key}{comma} {error}")
        resolved[section] = leaves
    return resolved, problems


def parse(tree: Mapping[str, Any], where: str = "the configuration") -> Config:
    """A nested mapping -> a checked configuration. Texts are read by the types of their keys.

    Raises:
        UsageError: every unknown key and invalid value, in one message.
    """
    resolved, problems = _resolved(tree)
    try:
        config = _ADAPTER.validate_python(resolved)
    except ValidationError as error:
        # One sentence a key: a union reports each of its members.
        problems += dict.fromkeys(_sentence(e) for e in error.errors())
    else:
        if not problems:
            problems = list(_contradictions(config))
            if not problems:
                return config
    raise UsageError(f"{where}: " + "; ".join(problems))


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


def recipes_dir() -> Path:
    """Where recipes live: inside the installed wheel, or the checkout's `configs/`."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def recipes() -> list[str]:
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load(name: str, overrides: Mapping[str, str] | None = None) -> Config:
    """A recipe's name or a YAML path, with dotted overrides ("optim.lr" -> "1e-3") on top.

    Raises:
        UsageError: no such recipe or file, not YAML, or anything `parse` objects to.
    """
    tree = _recipe(name)
    for given, value in (overrides or {}).items():
        key, _, leaf = spelt(given).partition(".")
        section = next((known for known in tree if spelt(known) == key), key)
        below = tree.get(section) or {}
        if not isinstance(below, dict):
            continue  # a text where keys belong: `parse` says so
        kept = {old: text for old, text in below.items() if spelt(old) != leaf}
        tree[section] = kept | {leaf: value} if leaf else value
    return parse(tree, str(name))


def _recipe(name: str) -> dict[str, Any]:
    """The sections of a recipe or a file, as texts."""
    path = Path(name)
    with asked(f"cannot read {shown(name)}"):
        is_file = path.suffix in (".yaml", ".yml") or path.is_file()
        held = path / "config.yaml"
        hint = f"; the run in it has {held}" if not is_file and held.is_file() else ""
    if not is_file:
        if name.startswith("--"):
            raise UsageError(f"name a recipe before the options, got {name}")
        if name not in recipes():
            raise UsageError(
                f"no recipe is called {shown(name)}: {nearest(name, recipes())}{hint}"
                if not hint
                else f"{name} is a folder{hint}"
            )
        path = recipes_dir() / f"{name}.yaml"
    return values.read_recipe(path)


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The whole configuration as plain types."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_tree(config), sort_keys=False)


# What may change when a run is continued, besides `runtime`: how it is judged, where its data lie now
# (the images are compared by their fingerprint), what a new run would start from, and what becomes of
# a step that is not finite.
FREE = frozenset(
    ["train.init", "train.nonfinite", "data.path", "data.max_bad_share"]
    + [f"evaluate.{field.name}" for field in dataclasses.fields(Evaluate)]
) - {"evaluate.input_size", "evaluate.resize"}  # these two travel with the weights


def differing_keys(a: Config, b: Config) -> list[str]:
    """Dotted keys whose values differ, but for those that may change when a run is continued."""
    left, right = to_tree(a), to_tree(b)
    return [
        f"{section}.{key} ({left[section][key]} against {right[section][key]})"
        for section in left
        if section != "runtime"
        for key in left[section]
        if left[section][key] != right[section][key] and f"{section}.{key}" not in FREE
    ]
