"""The sections and keys of a configuration, and the only place where their defaults live.

A default is the published trainer's unless the text below it says otherwise. All sections but
`runtime` and `evaluate` decide what is learned. `runtime` holds what may change when a run is
continued: where it runs, how often it logs and saves; `FREE` names the other keys that may.

The text below a key says what it is, in which unit, and what to try: `keys` reads it from here for
`xdino pretrain --help`, `--print-config` and docs/settings.md.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from xdino.config.bands import MOST, asked_bands, completed
from xdino.nonfinite import valid_policy
from xdino.values import device

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
Level = Annotated[float, Field(ge=-1e30, le=1e30)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]

Device = Annotated[str, AfterValidator(device)]


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
    """The backbone: an XCiT by its published name, or any timm model by name.

    null means: as the name says. The other values reshape an XCiT.
    """

    arch: str = "xcit_small_12_p16"
    """Its name: xcit_ with nano_12, tiny_12, tiny_24, small_12, small_24, medium_24 or large_24 and _p16,
    _p8 or _p4; or any of timm's names, of which vit_small_patch16_224.dino is DINO's own ViT."""
    in_chans: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """Channels: 1 for grey, 3 for colour, up to 16 for bands of a sensor; null: as the data have it."""
    patch_size: Literal[4, 8, 16] | None = None
    """Side of a patch in pixels. Smaller ones see more and cost more."""
    embed_dim: Width | None = None
    """Width of a token, in numbers; a multiple of num_heads."""
    depth: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of XCA blocks, before the two of class attention."""
    num_heads: Width | None = None
    """Number of heads of each attention."""
    eta: Annotated[float, Field(gt=0, le=1e4)] | None = None
    """Factor of LayerScale at the start; small for deep networks."""
    tokens_norm: bool | None = None
    """Whether class attention normalises all tokens, not the class token alone."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that a block of the student is left out; the teacher keeps all."""


@dataclass(frozen=True, config=STRICT)
class Head:
    """The projection head. Many prototypes suit large data; hundreds to thousands, small data.

    Of objectives without prototypes it ends at the bottleneck: `prototypes` and `norm_last_layer` have
    no part then, and `bottleneck_dim` is the width of what is compared.
    """

    prototypes: Annotated[int, Field(ge=2, le=2**28)] = 65536
    """Number of outputs, K."""
    hidden_dim: Width = 2048
    """Width of the hidden layers, in numbers."""
    bottleneck_dim: Width = 256
    """Width before the last layer, in numbers."""
    layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of layers up to the bottleneck."""
    norm_last_layer: bool = True
    """Whether the prototypes keep length 1: false does better for small networks, true is steadier."""
    use_bn: bool = False
    """Whether hidden layers have BatchNorm: helps where a run has few steps."""


@dataclass(frozen=True, config=STRICT)
class Loss:
    """The objective, its temperatures and its centre. A teacher above 0.07 is usually unstable; warm
    it up from 0.04. Keys of an objective or of targets that were not chosen are ignored."""

    objective: Literal["dino", "simdino", "sigreg"] = "dino"
    """dino; or without prototypes, temperatures and centre: simdino (a coding rate, arXiv 2502.10385) or
    sigreg (embeddings towards a Gaussian, LeJEPA, arXiv 2511.08544; wants head.use_bn)."""
    targets: Literal["centre", "sinkhorn"] = "centre"
    """DINO's targets: a moving centre, or sinkhorn over each batch (SwAV, arXiv 2006.09882; DINOv2)."""

    student_temp: Temperature = 0.1
    """Temperature of the student's softmax: its logits are divided by it."""
    warmup_teacher_temp: Temperature = 0.04
    """Temperature of the teacher's softmax at the start; lower it if the loss does not fall."""
    teacher_temp: Temperature = 0.04
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temp_epochs: Epochs = 0.0
    """Epochs between the two, or a share of the run such as 10%; changes once an epoch."""
    centre_momentum: Share = 0.9
    """Share of the old centre that a step keeps. Also as center_momentum."""
    sinkhorn_iterations: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of times that Sinkhorn-Knopp makes rows and columns sum to one."""
    koleo: NotNegative = 0.0
    """Factor of KoLeo (arXiv 1806.03198) beside any objective; DINOv2 has 0.1."""
    coding_rate_eps: Temperature = 0.05
    """simdino: the square of the precision, a factor, that the coding rate counts in; smaller
    is steadier."""
    coding_rate_weight: NotNegative | None = None
    """simdino: factor of the coding rate; null: the published (d + n) / (d n), with d the bottleneck's
    width and n images a micro-batch of all processes."""
    sigreg_weight: Share = 0.05
    """sigreg: its share of the loss, lambda; the rest is that of the views' agreement."""
    sigreg_slices: Annotated[int, Field(ge=1, le=2**16)] = 256
    """sigreg: number of random directions a step."""


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """The teacher: a moving average of the student, its momentum on a cosine from start to end."""

    momentum: Share = 0.996
    """Share of the old teacher a step keeps, at the start. Small batches want more: 0.9995 at 256."""
    momentum_end: Share = 1.0
    """The same share at the end of the run."""


@dataclass(frozen=True, config=STRICT)
class Crops:
    """Multi-crop and its photometric part, strengths as in torchvision's ColorJitter."""

    global_size: Pixels = 224
    """Side of the two global crops in pixels."""
    global_scale: Scale = (0.4, 1.0)
    """Their smallest and largest share of the image's area. With 8 local crops 0.3,1.0 is usual."""
    global_blur: tuple[Share, Share] = (1.0, 0.1)
    """Probability of blur, of the first and of the second."""
    global_solarize: tuple[Share, Share] = (0.0, 0.2)
    """Probability of solarization, of the first and of the second."""
    local_count: Annotated[int, Field(ge=0, le=1000)] = 8
    """Number of local crops, which only the student sees; 0 for none."""
    local_size: Pixels = 96
    """Side of the local crops in pixels."""
    local_scale: Scale = (0.05, 0.4)
    """Their smallest and largest share of the image's area."""
    local_blur: Share = 0.5
    """Probability of blur, of each local crop."""
    flip: Share = 0.5
    """Probability of a horizontal flip; 0 where left and right differ."""
    jitter: Share = 0.8
    """Probability of colour jitter, whose strengths are the next four."""
    brightness: Share = 0.4
    """Strength of jitter in brightness: a factor from 1 - 0.4 to 1 + 0.4."""
    contrast: Share = 0.4
    """Strength of jitter in contrast, as a factor."""
    saturation: Share = 0.2
    """Strength of jitter in saturation, as a factor."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Strength of jitter in hue, in turns of the colour circle."""
    grayscale: Share = 0.2
    """Probability that a crop loses its colours. Also as greyscale."""
    mean: tuple[Annotated[float, Field(ge=-1e4, le=1e4)], ...] | None = None
    """Subtracted from pixels in 0 to 1, a value a channel; null: ImageNet's (of grey, its luma)."""
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] | None = None
    """Pixels are divided by it afterwards, a value a channel; goes with mean."""


@dataclass(frozen=True, config=STRICT)
class Curriculum:
    """Small crops for the first part of the run, those of `crops` for the rest; off by default.

    FastDINOv2 (arXiv 2507.03779): half the sizes for 75 % of the run, 1.6 times less time for
    DINOv2 with a ViT-B. Its second part, patches of Gaussian noise in the later crops, serves
    robustness to corruption and is not here.

    BatchNorm (XCiT's stem and its local patch interaction) keeps running statistics of the crops
    it saw, each update counting a tenth: during the small part they are those of small crops, while
    k-NN looks at full-size images through them; some tens of updates after the switch they are
    those of large crops. So numbers from before the switch judge the features with a handicap of
    unknown size, and the number at the end of a run has none.
    """

    share: Share = 0.0
    """Share of the iterations with small crops; 0 for none."""
    global_size: Pixels = 112
    """Side of the global crops in pixels, during that share."""
    local_size: Pixels = 48
    """Side of the local crops in pixels, during that share."""


@dataclass(frozen=True, config=STRICT)
class Data:
    """The images to learn from; no labels needed."""

    path: str = ""
    """A folder (flat, nested, or with train/), a text list of files, a tar file or a folder of them,
    fashion_mnist, fashion_mnist_sample or fashion_mnist_scattered."""
    max_bad_share: Share = 0.05
    """Share of images that may be unreadable: they are skipped; beyond it the run stops."""
    max_pixels: Annotated[int, Field(ge=1, le=2**40)] = MAX_PIXELS
    """Pixels of an image at most; a larger one counts as unreadable."""
    range: tuple[Level, ...] | None = None
    """Numbers of a sensor that are black and white, 0,4095 say: of all bands, or a pair for each; null:
    of photographs as ever, of bands all that integers hold, 0,1 of floats."""
    rgb: tuple[Annotated[int, Field(ge=1, le=MOST)], ...] | None = None
    """Numbers of the red, green and blue band, from 1: 4,3,2 say; [] for none; null: 1,2,3 of three."""


@dataclass(frozen=True, config=STRICT)
class Optim:
    """The optimiser. Also as optimizer: or optimiser:."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """Which one."""
    lr: NotNegative = 5e-4
    """Learning rate at a total batch of 256: it scales with the batch, as lr_scaling says."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """By total batch / 256, or by its square root, which suits Adam (arXiv 2205.10287) and DINOv2."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the end of the cosine; this one does not scale."""
    warmup_epochs: Epochs = 10.0
    """Epochs of linear warm-up of the learning rate, or a share of the run such as 10%."""
    weight_decay: NotNegative = 0.04
    """Factor of weight decay at the start; biases and norms have none."""
    weight_decay_end: NotNegative = 0.4
    """The same factor at the end, on a cosine."""
    clip_grad: NotNegative = 3.0
    """Largest norm of a parameter tensor's gradient; 0 for no limit."""
    freeze_last_layer: Count = 1
    """Epochs at the start in which the prototypes stay as they are."""


@dataclass(frozen=True, config=STRICT)
class Train:
    """How long, and on how many images: a total batch is batch_size x accumulate x processes."""

    epochs: Positive = 100
    """Number of epochs: how often each image is seen, in two global and some local crops."""
    images_per_epoch: Positive | None = None
    """Images of an epoch; null: all. With fewer, states, scores and schedules of very many images go by
    shorter epochs. An epoch goes on where the last one ended: all images come before one comes again."""
    extended: tuple[Positive, ...] = ()
    """Epochs behind those, one extension after the other: pretrain --extend adds to them."""
    batch_size: Positive = 64
    """Images a process and micro-batch."""
    accumulate: Positive = 1
    """Micro-batches an optimisation step: more where memory is short."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of the network. The published trainer's is fp16 with a scaler; auto is bf16, which needs
    none, on CUDA and on processors that are faster in it (AVX512-BF16, AMX: a few products are timed),
    and fp32 elsewhere. A run keeps what it was."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Number that all random numbers follow from."""
    init: str | None = None
    """Weights to start from, a file or run; also as --init. Continuing a run needs none."""
    continue_from: str | None = None
    """A full checkpoint of the published trainer, which goes on here: both networks, centre, moments;
    also as --continue-from."""
    nonfinite: Annotated[str, AfterValidator(valid_policy)] = "stop"
    """What becomes of a step whose numbers are not finite: stop, "skip N" (at most N in a row) or
    "rollback FACTOR" (to the last saved state, the learning rate times the factor)."""

    @property
    def all_epochs(self) -> int:
        """`epochs`, and those that extensions added."""
        return self.epochs + sum(self.extended)


QUALITY_VIEWS = 4
"""Of an image, by which quality judges while training: LiDAR's paper takes 50, too many to repeat."""


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """What judges while training, a linear probe at the end, and the size at which all judge."""

    every: Count = 0
    """Epochs between evaluations by protocols, with one before the first step; 0 for never."""
    protocols: tuple[
        Literal["knn", "quality", "logistic", "grid", "patch-knn", "patch-linear"], ...
    ] = ("knn",)
    """What judges then, several with commas: quality needs no labels (and looks at
    four views of an image), grid wants many images, patch-knn and patch-linear pictures with masks."""
    linear: Literal["logistic", "grid"] | None = None
    """The linear probe at the end; grid wants many images; null for none."""
    data: str | None = None
    """Labelled images with train/ and val/; null: those of data.path."""
    masks: str | None = None
    """Pictures with masks, as xdino patch-probe takes them, for patch-knn and patch-linear; null:
    those of data.path."""
    limit: Positive = 10_000
    """Images of each split at most, the same ones every time."""
    input_size: Pixels | None = None
    """Side of the images that judge, in pixels; null: crops.global_size."""
    resize: Pixels | None = None
    """Their shorter side before the centre crop, in pixels; null: input_size * 256 / 224."""


@dataclass(frozen=True, config=STRICT)
class Runtime:
    """What does not change results: all of it may change when a run is continued."""

    device: Device = "auto"
    """Where it runs: cpu, cuda, cuda:1; auto is CUDA where there is a GPU."""
    workers: Annotated[int, Field(ge=0, le=10_000)] = 8
    """Number of threads that make crops, at most one a core; 0: none beside the loop's own."""
    prefetch: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Micro-batches made ahead."""
    activation_checkpointing: bool = False
    """Keep the blocks' inputs only and compute the rest again: less memory, more time."""
    compile: bool = False
    """torch.compile of both backbones: minutes at the start, once a crop size."""
    cuda_graphs: bool = True
    """xdino pretrain on one GPU: replay a step's passes as a CUDA graph, which spares Python's time."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """xdino pretrain's fused Triton kernels for CUDA; auto: where a check at the start finds them equal
    and faster (some 25 s the first time, while they are compiled)."""
    log_every: Positive = 10
    """Iterations between rows of metrics.jsonl."""
    checkpoint_every: Positive = 500
    """Iterations between saved states; the end of an epoch is always saved."""
    keep_every: Count = 20
    """Epochs between states that are kept; 0 to keep none but the newest."""
    keep_last: Annotated[int, Field(ge=2, le=10_000)] = 2
    """Number of the newest states that are kept; --from-iteration goes back to any that is."""
    report: bool = True
    """Whether report.html is redrawn while training, with a frame of film/ an evaluation."""
    wandb: Literal["off", "online", "offline"] = "off"
    """A page at Weights & Biases. on, true and yes mean online; no and false mean off."""
    wandb_project: str = "xdino"
    """The project that the page belongs to."""
    tensorboard: bool = False
    """Scalars for TensorBoard, in the run's folder tensorboard/ (needs xdino[tensorboard])."""


# What may change when a run is continued, besides `runtime`: how it is judged, where its data lie now
# (the images are compared by their fingerprint), what a new run would start from, and what becomes of
# a step that is not finite.
FREE = frozenset(
    ["train.init", "train.continue_from", "train.extended", "train.nonfinite"]
    + ["data.path", "data.max_bad_share"]
    + [f"evaluate.{key.name}" for key in dataclasses.fields(Evaluate)]
) - {"evaluate.input_size", "evaluate.resize"}  # these two travel with the weights


class RunConfig:
    """What the configuration of every kind of run is: a frozen dataclass of sections.

    The class is the schema that recipes of its kind are read by. Other packages have more of them.
    """

    kind: ClassVar[str]  # at the head of its recipes, and the command that runs them
    free: ClassVar[frozenset[str]]  # as `FREE`
    model: Any
    data: Any  # the sections that the loop and run directories look into
    train: Any
    evaluate: Any
    runtime: Runtime

    def contradictions(self) -> Iterable[str]:
        """A sentence for each pair of values that cannot be together."""
        return ()

    def following(self, before: Self) -> Self:
        """The same, with what the run `before` worked out of its bands and this one leaves open."""
        return completed(self, before)

    @property
    def channels(self) -> int | None:
        """What sources are asked for: plain channels, or `Bands`; None: what there is."""
        return asked_bands(self.model.in_chans, self.data.range, self.data.rgb)


@dataclass(frozen=True, config=STRICT)
class Config(RunConfig):
    """Pretraining."""

    kind: ClassVar[str] = "pretrain"
    free: ClassVar[frozenset[str]] = FREE

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


def keys_of(schema: type[RunConfig]) -> dict[str, dict[str, Any]]:
    """Sections and their keys: the type of each."""
    whole: Any = schema()
    return {
        section.name: {
            key.name: key.type for key in dataclasses.fields(getattr(whole, section.name))
        }
        for section in dataclasses.fields(whole)
    }


#: Of pretraining.
KEYS = keys_of(Config)


def dotted_keys(schema: type[RunConfig] = Config) -> list[str]:
    """Every dotted key there is, "optim.lr" and the rest."""
    return [f"{section}.{key}" for section, keys in keys_of(schema).items() for key in keys]
