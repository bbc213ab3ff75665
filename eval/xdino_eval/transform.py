"""The one view of an image that a frozen network is judged on: resize, centre crop, normalise.

DINO's evaluations (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 3.2 and the
published `eval_knn.py`) resize the shorter side to 256 with bicubic interpolation, cut the central
224 x 224 pixels and normalise. k-NN figures move by tenths of a per cent with the resampling, so
the pixels are those of torchvision's `Resize` + `CenterCrop` on PIL images, bit for bit
(`xdino.data.centre_view`).

Letters: B images, H x W pixels, C channels, s the side of the crop.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from xdino.backbone import Backbone
from xdino.data.centre_view import centre_view, normalise, resample, resize_shorter

__all__ = ["EvalTransform", "resample", "resize_shorter"]


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `resize` pixels, cut the central `size` x `size`, normalise.

    `mean` and `std` have one entry a channel and are in units of 0..1 pixels.

    Raises:
        ValueError: a size below 1 pixel, or `mean` and `std` that do not match.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.size < 1 or self.resize < 1:
            raise ValueError(f"size and resize must be 1 or more, got {self.size}, {self.resize}")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean and positive std must match, got {self.mean} and {self.std}")

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        size: int | None = None,
        resize: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> "EvalTransform":
        """The transform that `backbone` expects, but for what is given.

        A `size` without a `resize` keeps the backbone's ratio of the two (256 / 224 as a rule).
        """
        own = backbone.preprocessing
        if resize is None:
            resize = own.resize if size is None else round(size * own.resize / own.input_size)
        return cls(
            size=own.input_size if size is None else size,
            resize=resize,
            mean=tuple(own.mean if mean is None else mean),
            std=tuple(own.std if std is None else std),
        )

    def array(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> uint8 [s, s, C]; black where the resized image is smaller than s.

        Raises:
            ValueError: the image's channels are not those of `mean`.
        """
        if image.shape[2] != len(self.mean):
            raise ValueError(f"expected {len(self.mean)} channels, got {image.shape[2]}")
        return centre_view(image, self.resize, self.size)

    def normalise(self, batch: Tensor) -> Tensor:
        """uint8 [B, s, s, C] -> float32 [B, C, s, s] on the same device: (x / 255 - mean) / std."""
        return normalise(batch, self.mean, self.std)

    def describe(self) -> str:
        """One line for a results row."""
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return (
            f"shorter side {self.resize} (PIL bicubic), centre crop {self.size}, "
            f"mean ({mean}), std ({std})"
        )
