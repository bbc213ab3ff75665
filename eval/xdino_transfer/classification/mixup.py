"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) as published: one draw a batch.

Every image is mixed with the one that faces it when the batch is reversed. Label smoothing happens
inside the targets: 1 - s + s / K for the class, s / K for every other.

Letters: B images, K classes, H x W pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from xdino.errors import UsageError
from xdino.runtime.rng import Stream
from xdino_transfer.draws import uniforms


@dataclass(frozen=True)
class Mix:
    """What is done to a batch: `lam` is the part of the image itself. box: of CutMix, else None.

    box: top, bottom, left, right in pixels; what lies inside comes from the other image.
    """

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None


def cutmix(lam: float, centre: tuple[int, int], height: int, width: int) -> Mix:
    """A box of 1 - `lam` of the image around `centre` (down, across), clipped at the image's sides.

    `lam` of what is returned is that of the clipped box. Halves of odd boxes are rounded down on
    both sides, as timm did when the recipe was published.
    """
    sides = (int(side * math.sqrt(1 - lam)) for side in (height, width))
    box: list[int] = []
    for middle, cut, side in zip(centre, sides, (height, width), strict=True):
        box += [max(0, middle - cut // 2), min(side, middle + cut // 2)]
    top, bottom, left, right = box
    area = (bottom - top) * (right - left)
    return Mix(1 - area / (height * width), (top, bottom, left, right))


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """int64 [B] -> float32 [B, K]: one-hot, of which `smoothing` is spread over all classes."""
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """[B, C, H, W] -> the same, each mixed with its opposite."""
    others = images.flip(0)
    if mix.box is None:
        return images if mix.lam == 1 else images * mix.lam + others * (1 - mix.lam)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed


def mix_targets(targets: Tensor, mix: Mix) -> Tensor:
    """float32 [B, K] -> the same, mixed as the images are."""
    return targets * mix.lam + targets.flip(0) * (1 - mix.lam)


@dataclass(frozen=True)
class Mixup:
    """The distribution; the defaults are the published ones. An alpha of 0 switches one of them off.

    probability: of a batch to be mixed at all. switch: of CutMix, where both are on.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    @property
    def mixes(self) -> bool:
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def draw(self, seed: int, iteration: int, part: int, height: int, width: int) -> Mix:
        """What is done to part `part` of a step: the number of a micro-batch among all processes'.

        The published code draws in every process for itself, so parts differ here too.
        """
        place = np.array([[part, iteration, 0]], np.uint64)
        mixed, switched, lam, down, across = uniforms(seed, Stream.MIXING, place, 5)[0].tolist()
        if not self.mixes or mixed >= self.probability:
            return Mix()
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha <= 0 or switched < self.switch)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(betaincinv(alpha, alpha, lam))
        if not cut:
            return Mix(lam)
        return cutmix(lam, (int(down * height), int(across * width)), height, width)

    def __call__(
        self, images: Tensor, labels: Tensor, classes: int, mix: Mix
    ) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels int64 [B] -> mixed images and targets float32 [B, K].

        Raises:
            UsageError: an odd batch, whose middle image would be mixed with itself.
        """
        if self.mixes:
            check_batch(len(images))
        targets = smoothed(labels, classes, self.smoothing)
        return mix_images(images, mix), mix_targets(targets, mix)


def check_batch(batch_size: int) -> None:
    """Raises UsageError for batches that cannot be mixed."""
    if batch_size % 2:
        raise UsageError(
            f"mixup and cutmix pair the images of a batch, so batch_size must be even, got "
            f"{batch_size}; or switch both off (alpha 0)"
        )
