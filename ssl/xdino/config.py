"""The configuration of a run: frozen, strict, and the only place where defaults live.

A recipe is a YAML file with the sections below; whatever it leaves out has the default written here,
which is the published trainer's unless a comment says otherwise. Every mistake in a recipe or on the
command line is reported at once, each with the nearest valid name.

All sections but `runtime` decide what is learned. `runtime` holds what may change when a run is
continued: where it runs, how often it logs and saves.
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

from xdino.errors import UsageError, nearest
from xdino.images import MAX_PIXELS
from xdino.nonfinite import valid_policy

STRICT = ConfigDict(extra="forbid")
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]


def _duration(value: object) -> object:
    """Numbers of epochs stay numbers; "3.33%" is a share of the run."""
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?\s*%|\d+(\.\d+)?", value):
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
    in_chans: Positive | None = None  # None: as many as the data set has
    patch_size: Literal[4, 8, 16] | None = None
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    eta: Annotated[float, Field(gt=0)] | None = None  # LayerScale at the start
    tokens_norm: bool | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the student only


@dataclass(frozen=True, config=STRICT)
class Head:
    """The projection head. Many prototypes suit large data; hundreds to thousands, small data."""

    prototypes: Annotated[int, Field(ge=2)] = 65536
    hidden_dim: Positive = 2048
    bottleneck_dim: Positive = 256
    layers: Positive = 3
    norm_last_layer: bool = True  # False does better for small networks, True is steadier
    use_bn: bool = False


@dataclass(frozen=True, config=STRICT)
class Loss:
    """Temperatures and centre. A teacher above 0.07 is usually unstable; warm it up from 0.04."""

    student_temp: Annotated[float, Field(gt=0)] = 0.1
    warmup_teacher_temp: Annotated[float, Field(gt=0)] = 0.04
    teacher_temp: Annotated[float, Field(gt=0)] = 0.04
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

    global_size: Positive = 224
    global_scale: Scale = (0.4, 1.0)
    global_blur: tuple[Share, Share] = (1.0, 0.1)
    global_solarize: tuple[Share, Share] = (0.0, 0.2)
    local_count: Annotated[int, Field(ge=0)] = 8
    local_size: Positive = 96
    local_scale: Scale = (0.05, 0.4)
    local_blur: Share = 0.5
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale: Share = 0.2
    mean: tuple[float, ...] | None = None  # None: ImageNet's (its luma for one channel)
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None


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
    global_size: Positive = 112
    local_size: Positive = 48


@dataclass(frozen=True, config=STRICT)
class Data:
    """`path`: a folder (flat, nested, or with train/), a text list of files, a tar file or a folder
    of them, `fashion_mnist` or `fashion_mnist_sample`."""

    path: str = ""
    max_bad_share: Share = (
        0.05  # unreadable images are skipped up to this share, then the run stops
    )
    max_pixels: Positive = MAX_PIXELS  # of an image; a larger one counts as unreadable


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
    freeze_last_layer: Annotated[int, Field(ge=0)] = 1  # epochs


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

    every: Annotated[int, Field(ge=0)] = 0  # epochs between k-NN evaluations; 0 for never
    linear: Literal["logistic", "grid"] | None = (
        None  # the probe at the end; "grid" wants many images
    )
    data: str | None = None  # labelled train/ and val/; None: data.path
    limit: Positive = 10_000  # images of each split at most, the same ones every time
    input_size: Positive | None = None  # None: crops.global_size
    resize: Positive | None = (
        None  # shorter side before the centre crop; None: input_size * 256 / 224
    )


@dataclass(frozen=True, config=STRICT)
class Runtime:
    """What does not change results."""

    device: str = "auto"  # auto, cpu, cuda
    workers: Annotated[int, Field(ge=0)] = 8
    prefetch: Positive = 3  # micro-batches made ahead
    # Keep the blocks' inputs only and compute the rest again: less memory, more time.
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of both backbones: minutes at the start, once a crop size
    # Fused Triton kernels: "auto" where they work, which a check at the start finds out.
    kernels: Literal["auto", "plain", "fused"] = "auto"
    log_every: Positive = 10  # iterations
    checkpoint_every: Positive = 500  # iterations; the end of an epoch is always saved
    keep_every: Annotated[int, Field(ge=0)] = (
        20  # epochs between checkpoints that are kept; 0: none
    )
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
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'|(\d+)", error["ctx"]["expected"])
        return f"{key} cannot be {value!r}: {nearest(str(value), [a or b for a, b in choices])}"
    if kind == "dataclass_type":
        return f"{key} is a section and needs keys below it, got {value!r}"
    return f"{key}: {error['msg'].removeprefix('Value error, ').lower()}, got {value!r}"


def parse(tree: Mapping[str, Any], where: str = "the configuration") -> Config:
    """A nested mapping -> a checked configuration.

    Raises:
        UsageError: every unknown key and invalid value, in one message.
    """
    try:
        config = _ADAPTER.validate_python({k: {} if v is None else v for k, v in tree.items()})
    except ValidationError as error:
        # One sentence a key: a union reports each of its members.
        sentences = dict.fromkeys(_sentence(e) for e in error.errors())
        raise UsageError(f"{where}: " + "; ".join(sentences)) from None
    problems = list(_contradictions(config))
    if problems:
        raise UsageError(f"{where}: " + "; ".join(problems))
    return config


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
    for key in ("global_size", "local_size"):
        early, late = getattr(config.curriculum, key), getattr(config.crops, key)
        if config.curriculum.share > 0 and early > late:
            yield (
                f"curriculum.{key} is {early}, larger than crops.{key}, {late}: the curriculum "
                "begins with small crops"
            )
    if (config.crops.mean is None) != (config.crops.std is None):
        yield "crops.mean and crops.std must be given together"


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
    path = Path(name)
    if not (path.suffix in (".yaml", ".yml") or path.is_file()):
        if name not in recipes():
            raise UsageError(f'no recipe is called "{name}": {nearest(name, recipes())}')
        path = recipes_dir() / f"{name}.yaml"
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not all(
        value is None or isinstance(value, dict) for value in tree.values()
    ):
        raise UsageError(f"{path} must hold sections ({', '.join(SECTIONS)}) with keys below them")
    for key, value in (overrides or {}).items():
        section, _, leaf = key.partition(".")
        below = tree.get(section) or {}
        tree[section] = {**below, leaf: yaml.safe_load(value)} if leaf else value
    return parse(tree, str(name))


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The whole configuration as plain types."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def differing_keys(a: Config, b: Config) -> list[str]:
    """Dotted keys whose values differ, `runtime` left out because it does not change results."""
    left, right = to_tree(a), to_tree(b)
    return [
        f"{section}.{key} ({left[section][key]} against {right[section][key]})"
        for section in left
        if section != "runtime"
        for key in left[section]
        if left[section][key] != right[section][key]
    ]
