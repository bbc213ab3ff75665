"""Backbones whose features are known beforehand: the colour of an image and of its patches."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xdino.backbone import Backbone, Spec, whole_patches


class Colours(Backbone):
    """The mean colour of an image, [B, 3]."""

    embed_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.spec = Spec("colours", 3, {}, 32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class PatchColours(Colours):
    """The same, and of its whole 8 x 8 patches."""

    patch_size, has_patch_tokens = 8, True

    def fitting(self, images: Tensor) -> Tensor:
        return whole_patches(images, 8)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = self.fitting(images)
        return images.mean((2, 3)), F.avg_pool2d(images, 8).permute(0, 2, 3, 1)


def colour(degrees: float) -> np.ndarray:
    """uint8 [3]: red and green at an angle, so that cosines between colours are known."""
    angle = math.radians(degrees)
    return np.array([200 * math.cos(angle), 200 * math.sin(angle), 0]).round().astype(np.uint8)


def flat(degrees: float, height: int = 32, width: int = 40) -> np.ndarray:
    return np.broadcast_to(colour(degrees), (height, width, 3)).copy()


@pytest.fixture
def colours() -> Colours:
    return Colours()


@pytest.fixture
def patch_colours() -> PatchColours:
    return PatchColours()


@pytest.fixture
def paint():
    """paint(degrees, height, width) -> an image of one colour."""
    return flat


@pytest.fixture(scope="session")
def small_xcit(tmp_path_factory):
    """A weights file of a tiny XCiT, patch 8."""
    from xdino.backbones import BackboneSpec
    from xdino.checkpoint import save_backbone

    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    spec = BackboneSpec("xcit_nano_12_p8", shape=shape)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(path, spec.build(), spec, role="teacher", iteration=7)
    return path
