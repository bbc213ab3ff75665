"""`xdino linear --protocol grid`: options, refusals, and what is left beside the results."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_launch.cli import xdino


@pytest.fixture
def weights(tmp_path) -> Path:
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    spec = BackboneSpec("xcit_nano_12_p8", shape=shape, input_size=24, resize=28)
    checkpoint.save_backbone(tmp_path / "w.safetensors", spec.build(), spec)
    return tmp_path / "w.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Dark and bright images, 40 to train on and 8 to judge."""
    rng = np.random.default_rng(0)
    for number in range(48):
        split = "train" if number < 40 else "val"
        name = "dark" if number % 2 else "bright"
        (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (32, 32, 3)) + 160 * (name == "bright")
        path = tmp_path / "data" / split / name / f"{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "data"


def linear(weights: Path, folder: Path, *options: str) -> list[dict]:
    """The rows that the command prints."""
    arguments = ["linear", str(weights), "--data", str(folder), "--epochs", "2", "--json"]
    result = CliRunner().invoke(xdino, [*arguments, *options], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize("protocol", ["grid", "grid-features"])
def test_grid_writes_one_row_with_the_whole_grid(weights, folder, tmp_path, protocol):
    out = tmp_path / "out" / "results.json"
    (row,) = linear(
        *(weights, folder, "--protocol", protocol, "--out", str(out)),
        *("--lrs", "0.01,1", "--wds", "0,0.001", "--features", "class,patches,both"),
    )
    assert json.loads(out.read_text()) == [row]
    assert row["settings"]["lrs"] == [0.01, 1.0]
    assert len(row["settings"]["holdout_top1_of_grid"]) == 12
    assert (row["train_size"], row["settings"]["holdout_size"], row["val_size"]) == (36, 4, 8)
    assert [path.name for path in out.parent.iterdir()] == ["results.json"], "no state is left"


def test_grid_of_thirteen_by_default(weights, folder):
    (row,) = linear(weights, folder, "--protocol", "grid-features")
    assert len(row["settings"]["lrs"]) == 13
    assert row["settings"]["features_tried"] == ["class"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--protocol", "sgd", "--lrs", "1"), "--lrs belongs to --protocol grid"),
        (("--features", "both"), "--features belongs to --protocol grid"),
        (("--protocol", "grid", "--features", "patch"), 'did you mean "patches"'),
        (("--protocol", "grid", "--lrs", "1,x"), "--lrs takes numbers"),
        (("--protocol", "grid-features", "--wds", "-1"), "weight decays must be 0 or more"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        linear(Path("w"), Path("d"), *options)
