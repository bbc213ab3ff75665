"""A run small enough to be made many times: 20 images of 24 pixels, 3 steps an epoch."""

import numpy as np
import pytest
from PIL import Image

from xdino import config


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(20):
        coarse = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def tiny(images):
    """tiny(**overrides) -> a configuration; keys with "__" for the dot."""

    def make(**overrides) -> config.Config:
        tree = {
            "model": {"arch": "xcit_nano_12_p8", "embed_dim": 32, "depth": 1, "num_heads": 2},
            "head": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 8},
            "crops": {"global_size": 24, "local_size": 16, "local_count": 2},
            "data": {"path": str(images)},
            "optim": {"warmup_epochs": 1},
            "train": {"epochs": 2, "batch_size": 6},
            "runtime": {"device": "cpu", "workers": 2, "log_every": 1, "keep_every": 0},
        }
        for key, value in overrides.items():
            section, leaf = key.split("__")
            tree.setdefault(section, {})[leaf] = value
        return config.parse(tree)

    return make
