"""A run small enough to be made many times: 20 images of 24 pixels, 3 steps an epoch, 6 in all."""

from pathlib import Path

import numpy as np
from PIL import Image

from xdino import config


def write_images(folder: Path) -> Path:
    """Twenty images in a new folder."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(20):
        coarse = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24)).save(folder / f"{i:02}.png")
    return folder


def configuration(images: Path, **overrides: object) -> config.Config:
    """Keys of `overrides` with "__" for the dot."""
    tree: dict[str, dict] = {
        "model": {"arch": "xcit_nano_12_p8", "embed_dim": 32, "depth": 1, "num_heads": 2},
        "head": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 8},
        "crops": {"global_size": 24, "local_size": 16, "local_count": 2},
        "data": {"path": str(images)},
        "optim": {"warmup_epochs": 1},
        "train": {"epochs": 2, "batch_size": 6},
        "runtime": {"device": "cpu", "workers": 0, "log_every": 1, "keep_every": 0},
    }
    for key, value in overrides.items():
        section, leaf = key.split("__")
        tree.setdefault(section, {})[leaf] = value
    return config.parse(tree)
