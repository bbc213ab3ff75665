"""The sections and keys of a recipe for `xdino segment`, and the only place of their defaults.

A default is the published one for ADE20K with Semantic FPN (XCiT's semantic_segmentation folder, on
mmsegmentation 0.11) unless the text below it says otherwise.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from xdino.config import Runtime
from xdino.config.schema import STRICT, NotNegative, Pixels, Positive, Share, Width
from xdino_transfer.dense_training import recipe as shared
from xdino_transfer.dense_training.recipe import DenseConfig, Steps

Factors = Annotated[float, Field(gt=0, le=100)]


@dataclass(frozen=True, config=STRICT)
class Model(shared.Model):
    """The network: the four levels of an XCiT's pyramid, and a head on them.

    null means: as the weights that it starts from have it, else as the name says.
    """

    head: Literal["semantic_fpn", "upernet", "linear_map"] | None = None
    """What stands on the levels; linear_map reads the last patch tokens of a frozen backbone (DINOv3's
    protocol). null: semantic_fpn, and linear_map where the backbone is frozen."""
    channels: Width | None = None
    """Width of the head, in numbers; null: as published, 128 of Semantic FPN and 512 of UperNet."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that a channel is left out before the last layer."""

    @property
    def stands(self) -> str:
        """The head's name."""
        return self.head or ("linear_map" if self.frozen else "semantic_fpn")


@dataclass(frozen=True, config=STRICT)
class View:
    """How pictures are shown: in training fitted into longer x shorter times a factor, and cropped; in a
    test whole, fitted into longer x shorter."""

    crop: Pixels = 512
    """Side of the crops in pixels; smaller pictures are filled up without labels."""
    longer: Pixels = 2048
    """What the longer side is fitted into, in pixels."""
    shorter: Pixels = 512
    """What the shorter side is fitted into, in pixels; small pictures are made as large."""
    scale: tuple[Factors, Factors] = (0.5, 2.0)
    """Smallest and largest factor of both in training."""
    most_of_one: Share = 0.75
    """Largest share of a crop's labelled pixels that one class may have, where ten tries find one."""
    flip: Share = 0.5
    """Probability of a horizontal flip; 0 where left and right differ."""
    colour: bool = True
    """Whether brightness, contrast, saturation and hue are changed."""
    mean: tuple[Annotated[float, Field(ge=-1e4, le=1e4)], ...] | None = None
    """Subtracted from pixels in 0 to 1, a value a channel; null: the weights', else ImageNet's."""
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] | None = None
    """Pixels are divided by it afterwards, a value a channel; goes with mean."""


@dataclass(frozen=True, config=STRICT)
class Data(shared.Data):
    """Pictures with a class for every pixel: what is learned from, and what scores it."""

    path: str = ""
    """A folder with images/{train,val}, masks/{train,val} and classes.txt; ADE20K's
    ADEChallengeData2016; or Pascal VOC's JPEGImages and SegmentationClass."""
    zero_is_void: bool = False
    """Whether label 0 of images/ and masks/ means none, and classes begin at 1. ADE20K's does anyway."""


@dataclass(frozen=True, config=STRICT)
class Optim(shared.Optim):
    """AdamW, betas 0.9 and 0.999. Weight decay spares what has "norm" in its name, and only that."""

    lr: NotNegative = 6e-5
    """Learning rate for a total batch of 16: it scales with the batch."""
    power: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Strength of the fall: the rate is lr x (1 - share of the run) to this power."""
    warmup: Steps = 1500.0
    """Iterations of linear warm-up, or a share of the run such as 10%."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end; does not scale."""
    weight_decay: NotNegative = 0.01
    """Factor of weight decay; BatchNorms, biases and LayerScale are decayed, as published."""


@dataclass(frozen=True, config=STRICT)
class Train(shared.Train):
    """How long, and on how many images: a total batch is batch_size x accumulate x processes."""

    iterations: Positive | None = 80_000
    """Number of iterations; null where train.epochs says how long. Published: 160,000 for UperNet."""


@dataclass(frozen=True, config=STRICT)
class Evaluate(shared.Evaluate):
    """mIoU, mAcc and aAcc on the val pictures while training, and at the end; whole, one at a time."""

    scales: tuple[Factors, ...] = (1.0,)
    """Factors of longer x shorter at which a picture is shown, several with commas; their probabilities
    are averaged. Published beside the numbers: 0.5,0.75,1,1.25,1.5,1.75 with flip."""
    flip: bool = False
    """Whether each is shown mirrored, too."""


@dataclass(frozen=True, config=STRICT)
class Segmentation(DenseConfig):
    """A class for every pixel."""

    kind: ClassVar[str] = "segment"
    free: ClassVar[frozenset[str]] = shared.FREE | {"evaluate.scales", "evaluate.flip"}

    model: Model = Model()
    view: View = View()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    def contradictions(self) -> Iterable[str]:
        yield from super().contradictions()
        if self.model.head == "linear_map" and not self.model.frozen:
            yield (
                "model.head linear_map reads a frozen backbone, and model.frozen is false: set it true, "
                "or take semantic_fpn or upernet"
            )
        if self.view.scale[0] > self.view.scale[1]:
            yield f"view.scale must rise, got {self.view.scale[0]} to {self.view.scale[1]}"
        if (self.view.mean is None) != (self.view.std is None):
            yield "view.mean and view.std must be given together"
        if self.view.shorter > self.view.longer:
            yield (
                f"view.shorter is {self.view.shorter}, more than view.longer, {self.view.longer}: "
                "the shorter side is the smaller one"
            )
        if not self.evaluate.scales:
            yield "evaluate.scales names no factor: 1 shows a picture once"
