"""Stand-ins for a data source and for a small frozen network."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xdino.backbone import Backbone, Spec
from xdino.data.decode import UnreadableImage
from xdino.data.sources import Source


class Images(Source):
    """Images in memory; those in `bad` cannot be read."""

    def __init__(self, images: list[np.ndarray], labels=None, bad=(), name="stand-in") -> None:
        super().__init__(name, images[0].shape[2], labels)
        self.images, self.bad = images, set(bad)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise UnreadableImage("truncated")
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def _content(self) -> Iterator[bytes]:
        yield self.name.encode()


SPEC = Spec("frozen", 3, {}, 24, 28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Frozen(Backbone):
    """A convolution with BatchNorm and a linear layer: [B, 3, s, s] -> [B, 8]."""

    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.spec = SPEC
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.BatchNorm2d(6), nn.GELU())
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.drop(self.stem(images).mean((2, 3))))


@pytest.fixture
def frozen() -> Frozen:
    network = Frozen()
    network.stem[1].running_mean.normal_()
    return network.eval()


@pytest.fixture
def make_source() -> Callable[..., Images]:
    """make_source(count, bad=(...), classes=2): images whose colour tells their class."""

    def make(count: int, bad=(), classes: int = 2, labelled: bool = True, seed: int = 0) -> Images:
        rng = np.random.default_rng(seed)
        labels = np.arange(count, dtype=np.int64) % classes
        images = []
        for label in labels:
            height, width = rng.integers(26, 48, 2)
            noise = rng.integers(0, 120, (height, width, 3))
            noise[..., label % 3] += 110
            images.append(noise.astype(np.uint8))
        return Images(images, labels if labelled else None, bad)

    return make


@pytest.fixture
def rng_untouched(frozen: Frozen) -> Iterator[None]:
    """Fails the test that drew from torch's or numpy's global generator.

    `frozen` is made first: its weights are drawn from them.
    """
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
