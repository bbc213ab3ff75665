"""Patch tokens as colours: their first three principal components, over all images together.

Shown for DINOv2 (https://arxiv.org/abs/2304.07193, section 7.5 and figure 1): parts of objects that
the network describes alike get one colour, in every image. The tokens pass once by once, so that a
video costs no more memory than a frame: the components come from sums and products, exactly.

Letters: N tokens, D width, h x w patches.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xdino.backbone import Backbone
from xdino_eval.attention.maps import network_input
from xdino_eval.backbone_tokens import Lattice
from xdino_eval.features import evaluating


@dataclass(frozen=True)
class PatchTokens:
    """The patch tokens of one image, float32 [N, D] in reading order, and where they lie."""

    tokens: Tensor
    grid: tuple[int, int]
    lattice: Lattice


def patch_tokens(backbone: Backbone, image: np.ndarray, size: int | None = None) -> PatchTokens:
    """Of uint8 [H, W, C]; `size` and errors as for `attention.class_attention_maps`."""
    inputs, lattice = network_input(backbone, image, size)
    with evaluating(backbone), torch.inference_mode():
        ((maps, _),) = backbone.forward_intermediates(inputs)  # [1, D, h, w]
    h, w = maps.shape[2:]
    return PatchTokens(maps[0].flatten(1).T.float().cpu(), (h, w), lattice)


@dataclass(frozen=True)
class Components:
    """mean: float64 [D]. axes: float64 [D, 3], unit columns, the largest variance first.

    Each axis points where its largest entry is positive, so that equal tokens give equal colours.
    """

    mean: Tensor
    axes: Tensor
    explained: tuple[float, ...]  # shares of the whole variance

    def project(self, found: Tensor) -> np.ndarray:
        """[N, D] -> float32 [N, 3]."""
        return ((found.double() - self.mean) @ self.axes).float().numpy()


class Moments:
    """Sums over tokens from which their principal components follow."""

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._sum = self._products = torch.zeros(0, dtype=torch.float64)

    def add(self, found: Tensor) -> None:
        """Count tokens [N, D] in; none are kept."""
        values = found.double()
        if not len(values):
            return
        if not self.count:
            width = values.shape[1]
            # Sums around a typical token lose no digits where the mean is far from zero.
            self._shift = values.mean(0)
            self._sum = torch.zeros(width, dtype=torch.float64)
            self._products = torch.zeros(width, width, dtype=torch.float64)
        values = values - self._shift
        self.count += len(values)
        self._sum += values.sum(0)
        self._products += values.T @ values

    def components(self) -> Components:
        """The first three.

        Raises:
            ValueError: fewer than four tokens, or fewer than three channels.
        """
        if self.count < 4 or len(self._sum) < 3:
            raise ValueError(f"three components need four tokens or more, got {self.count}")
        mean = self._sum / self.count
        covariance = self._products / self.count - torch.outer(mean, mean)
        variances, axes = torch.linalg.eigh(covariance)  # in ascending order
        axes = axes[:, -3:].flip(1)
        largest = axes.abs().argmax(0)
        axes = axes * axes[largest, torch.arange(3)].sign()
        total = variances.clamp_min(0).sum().clamp_min(1e-30)
        shares = tuple((variances[-3:].flip(0).clamp_min(0) / total).tolist())
        return Components(mean + self._shift, axes, shares)


class Foreground:
    """Which patches belong to objects: those on one side of the first component's mean.

    The background is the side that fills most of the images' borders. `look` at every image first.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        self._border = [0, 0]  # patches on the negative and on the positive side

    def look(self, found: PatchTokens) -> None:
        positive = self._positive(found)
        edge = np.ones(positive.shape, dtype=bool)
        edge[1:-1, 1:-1] = False
        self._border[0] += int((~positive & edge).sum())
        self._border[1] += int((positive & edge).sum())

    def of(self, found: PatchTokens) -> np.ndarray:
        """bool [h, w]."""
        return self._positive(found) == (self._border[1] < self._border[0])

    def _positive(self, found: PatchTokens) -> np.ndarray:
        return (self._components.project(found.tokens)[:, 0] > 0).reshape(found.grid)


@dataclass
class Range:
    """The ends of the colours: per component, the 1st and 99th percentile over all tokens."""

    projected: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        """float [N, 3]; a thinned row of them is kept where there are many."""
        self.projected.append(values[:: max(1, len(values) // 512)])

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(np.concatenate(self.projected), (0.01, 0.99), axis=0)
        return low, np.maximum(high, low + 1e-12)


def rgb(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float [.., 3] -> uint8 [.., 3], `low` black and `high` full, component by component."""
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
