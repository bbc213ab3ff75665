"""The images of tests/benchmarks/attention_objects.py: what is scored there is well posed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino_eval.attention.segmentation import find_pairs, score

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "attention_objects.py"


@pytest.fixture(scope="module")
def objects():
    spec = importlib.util.spec_from_file_location("attention_objects", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_objects_are_bright_and_anywhere(objects):
    rng = np.random.default_rng(0)
    made = [objects.make_image(rng) for _ in range(60)]
    for image, truth in made:
        assert 0.05 <= truth.mean() <= 0.35
        assert image[truth].mean() > image[~truth].mean() + 30
    backgrounds = np.array([image[~truth].mean() for image, truth in made])
    assert backgrounds.std() < 8, "the background does not tell images apart"
    where = np.mean([truth for _, truth in made], axis=0)
    assert where.max() < 0.7, "no place holds every object"
    quarters = [part.mean() for half in np.split(where, 2) for part in np.split(half, 2, axis=1)]
    assert min(quarters) > 0.05, "nor is one empty"


def test_brightness_finds_them_and_an_untrained_network_does_not(objects, tmp_path):
    folder = objects.make_folder(tmp_path, 24, seed=0)
    assert Image.open(find_pairs(folder)[0].image).size == (32, 32)
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 4, "tokens_norm": True}
    xcit = BackboneSpec("xcit_nano_12_p4", shape=shape, input_size=32, resize=32).build().eval()
    figures = score(xcit, find_pairs(folder))[0][-1].summary()
    chance = figures["jaccard chance"]
    assert objects.brightness(folder) > 2 * chance
    assert figures["jaccard mean map"] < 2 * chance
