"""The sections and keys of a recipe for `xdino detect`, and the only place of their defaults.

A default is the published one for COCO (XCiT's detection configurations, on mmdetection 2.11) unless the
text below it says otherwise. See `xdino.config.schema`, which pretraining's keys come from.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from xdino.config import Runtime
from xdino.config.schema import STRICT, Epochs, Pixels, Positive, Share, Width
from xdino_transfer.dense_training import recipe
from xdino_transfer.dense_training.recipe import FREE, DenseConfig, Model
from xdino_transfer.detection.views import BEFORE_CROP, CROP, LONGER, SIDES

Sides = tuple[Pixels, ...]


@dataclass(frozen=True, config=STRICT)
class Heads:
    """What finds objects in the four levels: a pyramid network, proposals, heads for boxes and masks."""

    width: Width = 256
    """Width of the pyramid network's levels, in numbers."""
    hidden: Width = 1024
    """Width of the two layers that tell classes and boxes, in numbers."""
    mask_width: Width = 256
    """Width of the convolutions that draw masks, in numbers."""
    anchors: Positive = 256
    """Number of anchors of an image that proposals are learned from, at most half of them on objects."""
    candidates: Positive = 2000
    """Number of proposals a level that are looked at while training, the best ones."""
    proposals: Positive = 1000
    """Number of proposals an image that remain, while training and in tests."""
    regions: Positive = 512
    """Number of proposals of an image that boxes and masks are learned from, at most a quarter of
    them on objects."""


@dataclass(frozen=True, config=STRICT)
class View:
    """How an image is shown: resized as a whole, or cut first and resized then."""

    sides: Sides = SIDES
    """Shorter sides in pixels, one of which is drawn."""
    longer: Pixels = LONGER
    """Longer side in pixels, at most; in tests, too."""
    crop_chance: Share = 0.5
    """Probability that an image is cut before."""
    before_crop: Sides = BEFORE_CROP
    """Shorter sides in pixels that it has when it is cut, one of which is drawn."""
    crop: tuple[Pixels, Pixels] = CROP
    """Smallest and largest side of what is cut out, in pixels."""
    flip: Share = 0.5
    """Probability of a horizontal flip; 0 where left and right differ."""
    test_side: Pixels = 800
    """Shorter side in pixels, in tests."""
    mean: tuple[Annotated[float, Field(ge=-1e4, le=1e4)], ...] | None = None
    """Subtracted from pixels in 0 to 1, a value a channel; null: the weights', else ImageNet's."""
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] | None = None
    """Pixels are divided by it afterwards, a value a channel; goes with mean."""


@dataclass(frozen=True, config=STRICT)
class Data(recipe.Data):
    """Images with boxes, and masks where there are any: what is learned from, and what scores it."""

    path: str = ""
    """A folder of COCO's layout (annotations/ and train2017/), with _annotations.coco.json beside the
    images of train/ and valid/, or of Pascal VOC's; not where the next four name files."""
    train_json: str | None = None
    """A JSON file of COCO's kind to learn from, instead of data.path."""
    train_images: str | None = None
    """The folder of its images."""
    val_json: str | None = None
    """Another one, of the same classes, that scores."""
    val_images: str | None = None
    """The folder of its images."""

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.train_json, self.train_images, self.val_json, self.val_images

    @property
    def named(self) -> bool:
        return bool(self.path) or all(self.files)


@dataclass(frozen=True, config=STRICT)
class Optim(recipe.Optim):
    """AdamW, betas 0.9 and 0.999. Weight decay spares what has "norm" in its name, and only that."""

    drops: tuple[Epochs, ...] = (27.0, 33.0)
    """Epochs after which the learning rate falls, or shares of the run such as 75%,92%."""
    drop_factor: Share = 0.1
    """Factor of the learning rate each time."""
    warmup_ratio: Share = 0.001
    """Factor of the learning rate at the start of the warm-up."""


@dataclass(frozen=True, config=STRICT)
class Train(recipe.Train):
    """How long, and on how many images: a total batch is batch_size x accumulate x processes."""

    epochs: Positive | None = 36
    """Number of epochs; null where train.iterations says how long."""


@dataclass(frozen=True, config=STRICT)
class Evaluate(recipe.Evaluate):
    """Average precision on the val images while training, and at the end; whole images, one at a time."""


@dataclass(frozen=True, config=STRICT)
class Detection(DenseConfig):
    """Training of a detector, a Mask R-CNN on an XCiT."""

    kind: ClassVar[str] = "detect"
    free: ClassVar[frozenset[str]] = FREE | {
        "data.train_json", "data.train_images", "data.val_json", "data.val_images",
    }  # fmt: skip

    model: Model = Model()
    heads: Heads = Heads()
    view: View = View()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    def contradictions(self) -> Iterable[str]:
        yield from super().contradictions()
        v, d = self.view, self.data
        for key, sides in (("sides", v.sides), ("before_crop", v.before_crop)):
            if not sides and (key == "sides" or v.crop_chance):
                yield f"view.{key} names no side: give one or more, in pixels"
        if v.crop[0] > v.crop[1]:
            yield f"view.crop must rise, got {v.crop[0]} to {v.crop[1]}"
        if (v.mean is None) != (v.std is None):
            yield "view.mean and view.std must be given together"
        if any(d.files) and not all(d.files):
            yield (
                "data.train_json, data.train_images, data.val_json and data.val_images go together: "
                "give all four, or a folder as data.path"
            )
        if all(d.files) and d.path:
            yield f"data.path {d.path} and data.train_json both say what to learn from: give one"
        if self.optim.drops and self.train.epochs is not None:
            yield from self._late_drops()

    def _late_drops(self) -> Iterable[str]:
        for drop in self.optim.drops:
            if isinstance(drop, int | float) and drop >= (self.train.epochs or 0):
                yield (
                    f"optim.drops has {drop:g}, and the run is over after {self.train.epochs} epochs "
                    '(train.epochs): shorten it, or give shares such as "75%,92%"'
                )
                return
