"""A tiny run and folders of images, as somebody who writes Python finds them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.checkpoint import save_backbone

SHAPE = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """make_run(path, arch=..., shape=..., channels=3, size=32): a folder with a tiny backbone in it."""

    def make(
        path: Path, arch: str = "xcit_nano_12_p8", shape=SHAPE, channels: int = 3, size: int = 32
    ) -> Path:
        torch.manual_seed(0)
        mean = (0.485, 0.456, 0.406)[:channels]
        spec = BackboneSpec(
            arch,
            channels,
            shape,
            input_size=size,
            resize=size + size // 7,
            mean=mean,
            std=(0.2,) * channels,
        )
        model = spec.build()
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.rand(value.shape) * 0.1)
        facts = {"role": "teacher", "iteration": 7, "data": "sample"}
        save_backbone(path / "backbone.safetensors", model, spec, **facts)
        return path

    return make


@pytest.fixture(scope="session")
def run(make_run, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a run")


def painted(path: Path, number: int, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Path:
    """An image file of `size` (width, height), another for every number."""
    generator = np.random.default_rng(number)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = generator.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return path


@pytest.fixture(scope="session")
def paint() -> Callable[..., Path]:
    """paint(path, number, mode="RGB", size=(48, 40)): an image file."""
    return painted


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A flat folder with a space in its name: three colour images, a grey one."""
    root = tmp_path_factory.mktemp("data") / "my photos"
    for number in range(3):
        painted(root / f"{number}.png", number)
    painted(root / "grey one.png", 3, "L", (20, 64))
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """train/ and val/ with two class folders each: 2 x 3 and 2 x 2 images."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                seed = 100 * count + 10 * (label == "dog") + number
                painted(root / split / label / f"{number}.png", seed)
    return root
