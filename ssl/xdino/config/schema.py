"""The sections and keys of a configuration, and the only place where their defaults live.

A default is the published trainer's unless a comment says otherwise. All sections but `runtime` and
`evaluate` decide what is learned. `runtime` holds what may change when a run is continued: where it
runs, how often it logs and saves; `FREE` names the other keys that may.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from xdino.nonfinite import valid_policy

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
    """What judges while training, a linear probe at the end, and the size at which all judge."""

    # Epochs between evaluations by `protocols`, with one before the first step; 0 for never.
    every: Count = 0
    # "quality" needs no labels; "grid" wants many images.
    protocols: tuple[Literal["knn", "quality", "logistic", "grid"], ...] = ("knn",)
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
    report: bool = True  # report.html redrawn while training, and a frame of film/ an evaluation
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


#: Sections and their keys: the type of each.
KEYS: dict[str, dict[str, Any]] = {
    section.name: {
        key.name: key.type for key in dataclasses.fields(getattr(Config(), section.name))
    }
    for section in dataclasses.fields(Config)
}

# What may change when a run is continued, besides `runtime`: how it is judged, where its data lie now
# (the images are compared by their fingerprint), what a new run would start from, and what becomes of
# a step that is not finite.
FREE = frozenset(
    ["train.init", "train.nonfinite", "data.path", "data.max_bad_share"]
    + [f"evaluate.{key}" for key in KEYS["evaluate"]]
) - {"evaluate.input_size", "evaluate.resize"}  # these two travel with the weights


def dotted_keys() -> list[str]:
    """Every dotted key there is, "optim.lr" and the rest."""
    return [f"{section}.{key}" for section, keys in KEYS.items() for key in keys]
