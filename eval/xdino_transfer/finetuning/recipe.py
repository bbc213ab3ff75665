"""The sections and keys of a recipe for `xdino finetune`, and the only place of their defaults.

A default is the published one for ImageNet (XCiT's main.py, which is DeiT's) unless the text below it
says otherwise. See `xdino.config.schema`, which pretraining's keys come from.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from xdino.config import RunConfig, Runtime, in_epochs, schema
from xdino.config.schema import STRICT, Count, Epochs, NotNegative, Pixels, Positive, Scale, Share
from xdino.nonfinite import valid_policy

ARCH = "xcit_small_12_p16"  # from scratch, where no other is named


@dataclass(frozen=True, config=STRICT)
class Model(schema.Model):
    """The network: an XCiT by its published name or any of timm's, with a linear head on its feature.

    null means: as the weights that it starts from have it, else as the name says.
    """

    arch: str | None = None  # type: ignore[assignment]
    """Its name, as in pretraining; null: that of the weights, and xcit_small_12_p16 from scratch."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Probability that a block is left out; published: 0.05 for S12, 0.1 S24, 0.15 M24, 0 T12."""
    head_scale: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Factor of the new head's initial weights. From self-supervised weights 0.001 keeps the features
    whole while the head finds its way."""
    frozen: Count = 0
    """Number of blocks that rest with the stem, from the images on; as many as there are (XCiT's class
    attention counts) train the head alone."""


@dataclass(frozen=True, config=STRICT)
class View:
    """How a training image is shown."""

    size: Pixels | None = None
    """Side of the images in pixels, in training and in scoring; null: that of the weights, else 224."""
    scale: Scale = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop has. Sizes up to 32 pixels are shifted
    by 4 pixels instead."""
    flip: Share = 0.5
    """Probability of a horizontal flip; 0 where left and right differ."""
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's spelling; null for none."""
    erasing: Share = 0.25
    """Probability that a box of the image becomes noise; 0 for none."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of times that an image comes in a row, cut differently; an epoch then sees as many times
    fewer images. Needs 256 images; 1 for none."""
    mean: tuple[Annotated[float, Field(ge=-1e4, le=1e4)], ...] | None = None
    """Subtracted from pixels in 0 to 1, a value a channel; null: the weights', else ImageNet's."""
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] | None = None
    """Pixels are divided by it afterwards, a value a channel; goes with mean."""


@dataclass(frozen=True, config=STRICT)
class Mixup:
    """Mixed images and soft targets: batch and batch reversed, so a batch must be even."""

    mixup: NotNegative = 0.8
    """Strength of mixup (arXiv 1710.09412), its Beta distribution's alpha; 0 for none."""
    cutmix: NotNegative = 1.0
    """Strength of CutMix (arXiv 1905.04899), alpha as well; 0 for none."""
    probability: Share = 1.0
    """Probability that a batch is mixed at all."""
    switch: Share = 0.5
    """Probability that CutMix is taken, where both are on."""
    smoothing: Share = 0.1
    """Share of a target that is spread over all classes."""


@dataclass(frozen=True, config=STRICT)
class Distillation:
    """A teacher that is asked about the same mixed images (DeiT, arXiv 2012.12877)."""

    kind: Literal["none", "soft", "hard"] = "none"
    """hard: the teacher's first choice is a label; soft: its probabilities are."""
    teacher: str | None = None
    """A run or file with a classifier of the same classes; timm:NAME for weights that timm downloads."""
    arch: str | None = None
    """The teacher's architecture, where its file does not say."""
    alpha: Share = 0.5
    """Share of the loss that is the teacher's."""
    tau: Annotated[float, Field(gt=0, le=1e4)] = 1.0
    """Temperature of soft distillation."""


@dataclass(frozen=True, config=STRICT)
class Data(schema.Data):
    """Labelled images with train/ and val/ (or test/): what is learned from, and what scores it."""

    path: str = ""
    """A folder with a folder a class in train/ and val/ or test/, tars; CIFAR's, Flowers', Cars' or
    iNaturalist's own layout; fashion_mnist or fashion_mnist_sample."""
    category: str = "name"
    """Of iNaturalist: the rank that is told apart, such as genus."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training images of every class that is learned from."""
    images_a_class: Positive | None = None
    """Number of images of every class that is learned from; null for all."""
    subset_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Number that says which images those are; smaller parts lie inside larger ones."""


@dataclass(frozen=True, config=STRICT)
class Optim:
    """The optimiser and its learning rate. Also as optimizer: or optimiser:."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Which one; sgd has Nesterov's momentum of 0.9."""
    lr: NotNegative = 5e-4
    """Learning rate for a total batch of 512: it scales with the batch."""
    schedule: Literal["published", "smooth", "constant"] = "published"
    """published: timm's cosine, a value an epoch, the first one twice; smooth: a value a step, which
    suits runs of few epochs."""
    warmup_epochs: Epochs = 5.0
    """Epochs of linear warm-up, or a share of the run such as 10%."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the start of the published warm-up; does not scale."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end; does not scale."""
    weight_decay: NotNegative = 0.05
    """Factor of weight decay; biases, norms and the class token have none."""
    clip_grad: NotNegative = 0.0
    """Largest norm of all gradients together; 0 for no limit."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from a block to the one below it; 0.65 to 0.9 are usual, 1 for none."""
    backbone_factor: NotNegative = 1.0
    """Factor of the learning rate of all but the head."""


@dataclass(frozen=True, config=STRICT)
class Train:
    """How long, and on how many images: a total batch is batch_size x accumulate x processes."""

    epochs: Positive = 400
    """Number of epochs."""
    batch_size: Positive = 128
    """Images a process and micro-batch; even where images are mixed."""
    accumulate: Positive = 1
    """Micro-batches an optimisation step: more where memory is short."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of the network, as in pretraining; published is fp16."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Number that all random numbers follow from."""
    init: str | None = None
    """Weights to start from, a file or run; also as --init; null: from scratch. Continuing a run needs
    none."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99996
    """Share of itself that a moving average of the weights keeps a step; 0 for no average."""
    nonfinite: Annotated[str, AfterValidator(valid_policy)] = "stop"
    """What becomes of a step whose numbers are not finite: stop, "skip N" (at most N in a row) or
    "rollback FACTOR" (to the last saved state, the learning rate times the factor)."""

    @property
    def extended(self) -> tuple[int, ...]:
        """Epochs behind those: a fine-tuned run is not extended."""
        return ()

    @property
    def continue_from(self) -> None:
        """Another trainer's checkpoint goes on in pretraining only."""

    @property
    def all_epochs(self) -> int:
        return self.epochs


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """Top-1 and top-5 on the val images while training, and at the end."""

    every: Count = 1
    """Epochs between scores, with one before the first step; 0: at the end only."""
    full_crop: bool = True
    """Whether the shorter side is resized to the size itself (as published); else to 256/224 of it."""
    weights: Literal["model", "average"] = "model"
    """What is scored, kept as best and exported; average: the moving one (train.ema)."""
    batch_size: Positive = 128
    """Images at a time."""


FREE = frozenset(
    (
        "train.init",
        "train.nonfinite",
        "data.path",
        "data.max_bad_share",
        "distillation.teacher",
        "evaluate.every",
        "evaluate.batch_size",
    )
)


@dataclass(frozen=True, config=STRICT)
class FineTuning(RunConfig):
    """Fine-tuning, and supervised training from scratch."""

    kind: ClassVar[str] = "finetune"
    free: ClassVar[frozenset[str]] = FREE

    model: Model = Model()
    view: View = View()
    mixup: Mixup = Mixup()
    distillation: Distillation = Distillation()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    @property
    def mixes(self) -> bool:
        return self.mixup.probability > 0 and (self.mixup.mixup > 0 or self.mixup.cutmix > 0)

    def contradictions(self) -> Iterable[str]:
        epochs, warmup = self.train.epochs, self.optim.warmup_epochs
        if self.optim.schedule != "constant" and in_epochs(warmup, epochs) > epochs:
            yield (
                f"optim.warmup_epochs is {warmup}, longer than the run of {epochs} epochs "
                '(train.epochs): shorten it or give a share such as "10%"'
            )
        if self.view.scale[0] > self.view.scale[1]:
            yield f"view.scale must rise, got {self.view.scale[0]} to {self.view.scale[1]}"
        if (self.view.mean is None) != (self.view.std is None):
            yield "view.mean and view.std must be given together"
        if self.mixes and self.train.batch_size % 2:
            yield (
                f"train.batch_size is {self.train.batch_size}, and mixup and CutMix pair the images "
                "of a batch: make it even, or set mixup.probability 0"
            )
        if self.data.fraction < 1 and self.data.images_a_class is not None:
            yield "data.fraction and data.images_a_class both choose images: give one"
        yield from self._of_other_networks()

    def _of_other_networks(self) -> Iterable[str]:
        kind, teacher = self.distillation.kind, self.distillation.teacher
        if kind != "none" and teacher is None:
            yield (
                f"distillation.kind is {kind}, and there is no teacher: name one with "
                "--distillation.teacher"
            )
        if kind == "none" and teacher is not None:
            yield "distillation.teacher is given, and distillation.kind is none: soft or hard?"
        if self.evaluate.weights == "average" and not self.train.ema:
            yield "evaluate.weights is average, and train.ema 0 keeps none"
        if self.runtime.kernels == "fused":
            yield "runtime.kernels fused is for pretraining: leave it out"

    def images(self) -> str:
        """Which of the training images are learned from, in words."""
        if self.data.images_a_class is not None:
            return f"{self.data.images_a_class:,} a class"
        return "all" if self.data.fraction == 1 else f"{100 * self.data.fraction:g} %"
