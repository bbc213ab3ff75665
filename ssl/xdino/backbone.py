"""What a backbone is: one type for XCiT, DINO's ViTs and every network of timm.

A backbone maps images to one vector each. It says how images are prepared for it and where its
weights come from; one with patches gives its tokens, and one with a class token what that looks at.

Letters: B images, C channels, H x W pixels (H heads of attention), N patches on a grid (h, w),
P tokens before the patches (the class token first, then registers), D width.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import torch
from torch import Tensor, nn

from xdino.config.bands import Bands, channels_of, told
from xdino.errors import RunFailed, UsageError
from xdino.runtime.device import device_of

if TYPE_CHECKING:
    from xdino.data.given import Given

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# One channel: the luma-weighted sum of ImageNet's means, the average of its standard deviations.
LUMA_MEAN, LUMA_STD = (0.459,), (0.226,)

Intermediate = tuple[Tensor, Tensor]
"""Of one layer: the patch tokens [B, D, h, w], and the tokens before them [B, P, D]."""


def statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation for a number of channels (values in 0..1)."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return LUMA_MEAN * channels, LUMA_STD * channels


@dataclass(frozen=True)
class Preprocessing:
    """How images are shown: the shorter side at `resize` pixels, the central `input_size`
    squared, (pixels in 0..1 - mean) / std."""

    input_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def at(self, size: int | None) -> "Preprocessing":
        """The same for another `input_size`, `resize` in proportion; None for its own.

        Raises:
            UsageError: less than a pixel.
        """
        if size is None:
            return self
        if size < 1:
            raise UsageError(f"size must be 1 pixel or more, got {size}")
        resize = round(size * self.resize / self.input_size)
        return dataclasses.replace(self, input_size=size, resize=resize)


@dataclass(frozen=True)
class Spec:
    """Which network a backbone is and how its images are prepared; travels with its weights.

    Args:
        arch: "xcit_small_12_p16" and the like, "vit_small_patch16_224.dino" and the like (DINO's
            ViTs, see `dino_vit`), or a timm name.
        shape: arguments of XCiT that differ from what the name says.
        input_size, resize: evaluation crop and the shorter side before it, in pixels.
        mean, std: one entry a channel, for images in 0..1.
        bands: how the images are read, where they are a sensor's; None for photographs.
    """

    arch: str
    in_chans: int = 3
    shape: dict[str, Any] = field(default_factory=dict)
    input_size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    bands: Bands | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.in_chans:
                raise UsageError(
                    f"{name} needs one value a channel: {self.in_chans}, got {getattr(self, name)}"
                )

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.input_size, self.resize, self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        return told({**vars(self), "shape": dict(self.shape)})

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        shown = {"mean": tuple(tree["mean"]), "std": tuple(tree["std"])}
        return cls(**{**tree, **shown, "bands": Bands.of(tree)})


@dataclass(frozen=True)
class Origin:
    """Where weights come from: their file, its SHA-256, and what it says of them (iteration, data,
    role and so on). A network that was not loaded has none of it."""

    path: Path = Path()
    sha256: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> str:
        return str(self.facts.get("role", "teacher"))

    @property
    def name(self) -> str:
        """ "teacher, iteration 1234"; of files without it their name, and the role if the student's."""
        if "iteration" in self.facts:
            return f"{self.role}, iteration {self.facts['iteration']}"
        return f"{self.path.name}, student" if self.role == "student" else self.path.name


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and outside every submodule's own mode again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Backbone(nn.Module):
    """Images `[B, C, H, W]` -> one vector each, `[B, embed_dim]`.

    This class is a network without patches; those that have them override what they can do.
    """

    embed_dim: int
    patch_size: int | None = None  # pixels a side; None without patches
    patch_start: float = 0.0  # where the first patch begins, in pixels from the image's edge
    num_prefix_tokens: int = 0  # P, of what `class_attention` and `forward_intermediates` give
    has_patch_tokens: bool = False
    attention_layer: str = "layer"  # what `class_attention` numbers

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        mean, std = statistics(in_chans)
        self.spec = Spec("", in_chans, mean=mean, std=std)
        self.origin = Origin()

    @property
    def kind(self) -> str:
        """The network's name in sentences."""
        return type(self).__name__

    @property
    def preprocessing(self) -> Preprocessing:
        return self.spec.preprocessing

    @property
    def in_chans(self) -> int:
        """How many channels images have; of a sensor's, `Bands`, which say how they are read, too."""
        return channels_of(self.spec.in_chans, self.spec.bands)

    @property
    def input_size(self) -> int:
        return self.spec.input_size

    @property
    def resize(self) -> int:
        return self.spec.resize

    @property
    def mean(self) -> tuple[float, ...]:
        return self.spec.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.spec.std

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training (timm's name, and timm's refusal)."""
        assert not enable, "gradient checkpointing not supported"

    def parts_to_compile(self) -> list[nn.Module]:
        """What torch.compile takes one by one."""
        return [self]

    # --- images as a person has them ------------------------------------------------------------

    @overload
    def embed(
        self,
        images: "Given | Iterable[Given]",
        *,
        patches: Literal[False] = False,
        size: int | None = None,
        batch_size: int = 64,
    ) -> Tensor: ...

    @overload
    def embed(
        self,
        images: "Given | Iterable[Given]",
        *,
        patches: Literal[True],
        size: int | None = None,
        batch_size: int = 64,
    ) -> tuple[Tensor, Tensor]: ...

    def embed(
        self,
        images: "Given | Iterable[Given]",
        *,
        patches: bool = False,
        size: int | None = None,
        batch_size: int = 64,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The features of images, float32 `[N, embed_dim]` on the CPU, a row an image in their order.

        They are what `xdino features` writes and what every evaluation judges: the central square,
        resized and normalised by `preprocessing`, in evaluation mode and without gradients.

        Args:
            images: paths, Pillow's images, arrays `[H, W, C]` or tensors `[C, H, W]`, mixed as you
                like; a batch of one kind; a single one; or a folder, for the images below it. Pixels
                are uint8, or floats from 0 to 1.
            patches: give the patch tokens, too: float32 `[N, h, w, embed_dim]`.
            size: pixels of the square that is shown; None = the backbone's `input_size`.
            batch_size: how many are in the network at a time.

        Raises:
            UsageError: no image, or one that cannot be read (a `ValueError`, which names it); patches
                of a backbone without any, or a size that it does not take.
            RunFailed: a feature is not finite.
        """
        # Decoders come with it, which a network alone has no need of.
        from xdino.data.centre_view import centre_view
        from xdino.data.given import in_batches, one_by_one, pixels_of

        if batch_size < 1:
            raise UsageError(f"batch_size must be 1 or more, got {batch_size}")
        if patches:
            self.require_patches()
        view = self.preprocessing.at(size)

        def square(image: "Given") -> np.ndarray:
            return centre_view(pixels_of(image, self.in_chans), view.resize, view.input_size)

        rows: list[tuple[Tensor, ...]] = []
        with evaluating(self), torch.no_grad(), ThreadPoolExecutor() as pool:
            for batch in in_batches(one_by_one(images), batch_size):
                shown = np.stack(list(pool.map(square, batch)))
                inputs = self._normalised(torch.from_numpy(shown))
                found = self.tokens(self.fitting(inputs)) if patches else (self(inputs),)
                rows.append(tuple(part.float().cpu() for part in found))
        if not rows:
            raise UsageError("there are no images to embed")
        features, *tokens = (torch.cat(parts) for parts in zip(*rows, strict=True))
        if not features.isfinite().all():
            bad = int((~features.isfinite().all(1)).nonzero()[0])
            raise RunFailed(f"the features of image {bad} are not finite: the weights are damaged")
        return (features, tokens[0]) if patches else features

    def attention(
        self, image: "Given", *, size: int | None = None, layer: int | None = None
    ) -> Tensor:
        """What the class token looks at in one image: softmax weights, float32 `[heads, h, w]`.

        The whole image in its own proportions is shown. The weights of a head sum to less than 1:
        those of the class token itself and of registers are left out.

        Args:
            image: a path, an image of Pillow, an array `[H, W, C]` or a tensor `[C, H, W]`.
            size: of the shorter side, in pixels: twice as many give a map twice as fine. None = the
                backbone's `input_size`.
            layer: which, from 1: of an XCiT's class-attention layers, of a vision transformer's
                blocks. None = the last.

        Raises:
            UsageError: as `embed`; no class attention in this backbone, or not this layer.
        """
        from xdino.data.given import pixels_of, single

        numbers = self.attention_layers(None if layer is None else [layer])
        inputs = self.fitting(self.whole(pixels_of(single(image), self.in_chans), size))
        with evaluating(self), torch.no_grad():
            (weights,) = self.class_attention(inputs, numbers[-1:])
        h, w = self.grid(*inputs.shape[2:])
        return weights[0, :, self.num_prefix_tokens :].float().cpu().unflatten(1, (h, w))

    def whole(self, image: np.ndarray, size: int | None = None) -> Tensor:
        """uint8 [H, W, C] -> float32 [1, C, H', W'] on the backbone's device, for maps of the image.

        In its own proportions, the shorter side resized to `size` pixels (bicubic; None = the input
        size). What fills no patch is still there, see `fitting`.

        Raises:
            UsageError: an image, or a `size`, that is smaller than a patch, or a `size` that makes
                it larger than memory holds; a backbone without patches.
        """
        from xdino.data.centre_view import whole_view

        side = self.preprocessing.at(size).input_size
        shown = whole_view(image, side, self.patch_size or 1)
        inputs = self._normalised(torch.from_numpy(shown.copy())[None])
        self.grid(*inputs.shape[2:])  # refuses backbones without one
        return inputs

    def _normalised(self, batch: Tensor) -> Tensor:
        """uint8 [B, H, W, C] on the CPU -> float32 [B, C, H, W] on the backbone's device."""
        from xdino.data.centre_view import normalise

        return normalise(batch.to(device_of(self)), self.mean, self.std)

    # --- patches --------------------------------------------------------------------------------

    def require_patches(self) -> int:
        """The patch size.

        Raises:
            UsageError: the backbone has no patch tokens.
        """
        if not self.has_patch_tokens or self.patch_size is None:
            raise self._without_patches()
        return self.patch_size

    def _without_patches(self) -> UsageError:
        return UsageError(
            f"a {self.kind} has no class attention and no patch tokens: "
            "take an XCiT or a vision transformer"
        )

    def fitting(self, images: Tensor) -> Tensor:
        """`images` [B, C, H, W] without the pixels right and below that there is no patch for.

        Raises:
            UsageError: an image smaller than a patch, or of a size that the backbone does not take.
        """
        return images

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (h, w) of an image of this size in pixels.

        Raises:
            UsageError: the backbone has no patches, or takes images of one size only.
        """
        raise self._without_patches()

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] = 1, norm: bool = True
    ) -> list[Intermediate]:
        """Patch tokens `[B, D, h, w]` and the tokens before them `[B, P, D]` after some blocks.

        Args:
            indices: the last n blocks, or the blocks of these numbers, from 0 (timm's argument).
            norm: take a vision transformer's tokens after its final norm. An XCiT's patches have
                none, and its class token comes after its blocks: P = 0.

        Raises:
            UsageError: the backbone has no patch tokens, or as `fitting`.
        """
        raise self._without_patches()

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` -> the class token `[B, D]` and the patch tokens `[B, h, w, D]`.

        XCiT: the class token after the final norm, and the patch tokens before class attention,
        which are the ones for dense tasks (El-Nouby et al. 2021, sections 3.3 and 4). Vision
        transformers: both after the final norm, as the published evaluations of DINO take them.

        Raises:
            UsageError: no class token or no patch tokens in this backbone, or as `fitting`.
        """
        raise self._without_patches()

    # --- attention ------------------------------------------------------------------------------

    def attention_layers(self, layers: Sequence[int] | None = None) -> list[int]:
        """The layers that `class_attention` reads: `layers`, numbers from 1, or by default all of
        an XCiT's class attention, the last block of a vision transformer.

        Raises:
            UsageError: there is none of this number, or no class attention at all.
        """
        raise self._without_patches()

    def class_attention(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Softmax weights of the class token on all tokens, `[B, H, P + N]`, of each layer.

        Args:
            images: of a size that `fitting` leaves alone. layers: as `attention_layers`.

        Raises:
            UsageError: as `attention_layers`.
        """
        raise self._without_patches()

    def channel_attention(self, images: Tensor) -> list[Tensor]:
        """XCA's matrices of each block, float32 `[B, H, d, d]`: equation 4's softmax(K^T Q / tau).

        Row i says from which channels' values channel i of the output is mixed; rows sum to 1.

        Raises:
            UsageError: the backbone has no XCA.
        """
        raise UsageError(
            f"cross-covariance attention is an XCiT's, and a {self.kind} has none; leave out --xca"
        )


def whole_patches(images: Tensor, patch_size: int) -> Tensor:
    """`images` [B, C, H, W] without the last rows and columns that fill no patch.

    Raises:
        UsageError: nothing is left.
    """
    H, W = images.shape[2:]
    if min(H, W) < patch_size:
        raise UsageError(f"an image of {W} x {H} pixels is smaller than a patch of {patch_size}")
    return images[..., : H // patch_size * patch_size, : W // patch_size * patch_size]


def chosen_layers(layers: Sequence[int] | None, count: int, what: str) -> list[int]:
    """`layers`, if they are numbers from 1 to `count`; [] for None. Raises UsageError otherwise."""
    for number in layers or ():
        if not 1 <= number <= count:
            raise UsageError(f"there is no {what} {number}: choose one from 1 to {count}")
    return list(layers or ())
