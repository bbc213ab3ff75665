"""`xdino linear --protocol grid`: options, refusals, and what is left beside the results."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_launch.cli import xdino

SHAPE = {"embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def weights(tmp_path) -> Path:
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=24, resize=28)
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


def test_a_kept_probe_is_applied(weights, folder, tmp_path):
    for protocol in ("logistic", "sgd", "sgd-features", "grid", "grid-features"):
        head = tmp_path / f"{protocol}.safetensors"
        extra = ("--features", "class,both") if protocol.startswith("grid") else ()
        (row,) = linear(weights, folder, "--protocol", protocol, "--save-head", str(head), *extra)
        out = tmp_path / "results.json"
        csv = tmp_path / "p.csv"
        use = ("--apply", str(head), "--out", str(out), "--predictions", str(csv))
        (again,) = linear(weights, folder, *use)
        assert (again["top1"], again["top5"]) == (row["top1"], row["top5"])
        assert again["protocol"] == "linear, saved probe"
        assert again["settings"]["trained by"] == row["protocol"]
        assert again["settings"]["probe"] == head.name
        assert again["train_size"] == row["train_size"]
        assert again["notes"] == []
        assert json.loads(out.read_text())[-1] == again
        lines = csv.read_text().splitlines()
        assert len(lines) == 9
        right = [line.split(",")[1] == line.split(",")[3] for line in lines[1:]]
        assert 100 * sum(right) / 8 == row["top1"]
    (on_train,) = linear(weights, folder, "--apply", str(head), "--split", "train")
    assert on_train["val_size"] == 40


def test_predictions_of_images_without_labels(weights, folder, tmp_path):
    head = tmp_path / "h"
    linear(weights, folder, "--save-head", str(head), "--c", "1")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (folder / "val" / "dark").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    (flat / "broken.png").write_bytes(b"")
    csv = tmp_path / "p.csv"
    told = invoke(weights, flat, "--apply", str(head), "--predictions", str(csv))
    assert told.stdout == ""
    assert "skipped" in told.stderr
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    assert rows[0] == ["image", "prediction", "probability", "label"]
    assert [row[1] for row in rows[1:]] == ["dark"] * 4
    assert {row[3] for row in rows[1:]} == {""}
    with pytest.raises(UsageError, match="ask for --predictions"):
        linear(weights, flat, "--apply", str(head))


def test_probes_that_do_not_fit(weights, folder, tmp_path):
    head = tmp_path / "h"
    linear(weights, folder, "--save-head", str(head), "--c", "1")
    spec = BackboneSpec(
        "xcit_nano_12_p8",
        shape={"embed_dim": 32, "depth": 1, "num_heads": 2},
        input_size=24,
        resize=28,
    )
    checkpoint.save_backbone(tmp_path / "wide.safetensors", spec.build(), spec)
    with pytest.raises(UsageError, match="reads 16 numbers an image, and here are 32"):
        linear(tmp_path / "wide.safetensors", folder, "--apply", str(head))
    (folder / "val" / "dark").rename(folder / "val" / "darker")
    with pytest.raises(UsageError, match='was not trained on, the first "darker"; did you mean'):
        linear(weights, folder, "--apply", str(head))
    with pytest.raises(UsageError, match="is not a saved probe"):
        linear(weights, folder, "--apply", str(weights))
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=24, resize=28)
    checkpoint.save_backbone(tmp_path / "other.safetensors", spec.build(), spec)
    (row,) = linear(
        tmp_path / "other.safetensors", folder, "--apply", str(head), "--split", "train"
    )
    assert "trained on features of other weights" in row["notes"][0]


def test_features_of_a_grid_are_kept_too(weights, folder, tmp_path, monkeypatch):
    cache = ("--cache", str(tmp_path / "cache"))
    grid = ("--protocol", "grid-features", "--features", "class,both", *cache)
    first = linear(weights, folder, *grid)
    linear(weights, folder, "--c", "1", *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 4

    def extract(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr("xdino_eval.extraction.extract", extract)
    again = linear(weights, folder, *grid)
    assert {**again[0], "seconds": 0} == {**first[0], "seconds": 0}
    # Several choices are read from one table: both tokens in a row.
    linear(weights, folder, "--protocol", "grid-features", "--features", "both,patches", *cache)
    linear(weights, folder, "--protocol", "grid-features", *cache)  # the class token alone


def invoke(weights: Path, folder: Path, *options: str) -> Result:
    arguments = ["linear", str(weights), "--data", str(folder), "--json", *options]
    return CliRunner().invoke(xdino, arguments, catch_exceptions=False)


def linear(weights: Path, folder: Path, *options: str) -> list[dict]:
    """The rows that the command prints."""
    if "--apply" not in options:
        options = ("--epochs", "2", *options)
    return json.loads(invoke(weights, folder, *options).stdout)


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
        (("--split", "train"), "--split belongs to --apply HEAD"),
        (("--predictions", "p.csv"), "--predictions belongs to --apply HEAD"),
        (("--apply", "h", "--epochs", "2"), "--apply trains nothing: leave out --epochs"),
        (("--apply", "h", "--c", "1"), "--apply trains nothing: leave out --c"),
        (("--apply", "nowhere"), "there is no probe nowhere"),
        (("--protocol", "grid-features", "--wds", "-1"), "weight decays must be 0 or more"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        linear(Path("w"), Path("d"), *options)
