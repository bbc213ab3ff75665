"""Classifiers from Python: a score and predictions, as the commands give them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xdino_transfer
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_eval.extraction import Options
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import read_classifier, write_classifier

SPEC = BackboneSpec(
    "xcit_nano_12_p8",
    shape={"embed_dim": 16, "depth": 1, "num_heads": 2},
    input_size=32,
    resize=32,
)


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = tmp_path / "classes" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (40, 52, 3), np.uint8)).save(path)
    model = Classifier(SPEC.build(), SPEC, ("cat", "dog"), head_scale=50)
    write_classifier(tmp_path / "run" / "model.safetensors", model, {"iteration": 7})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_score_is_the_command_s(xdino, there):
    row = xdino_transfer.score(there / "run", "classes", crop_ratio=0.875)
    code, out, _ = xdino("score", "run", "--data", "classes", "--crop-ratio", "0.875", "--json")
    (told,) = json.loads(out)
    assert code == 0
    assert (row.top1, row.transform, row.checkpoint) == (
        told["top1"],
        told["transform"],
        told["checkpoint"],
    )
    assert (row.train_size, row.val_size) == (6, 4)
    loaded = read_classifier("run")
    assert xdino_transfer.score(loaded, "classes", split="train").val_size == 6
    with pytest.raises(UsageError, match="ratio must be above 0"):
        xdino_transfer.score("run", "classes", crop_ratio=2.0)


def test_predictions_are_the_command_s(xdino, there):
    images = [there / "classes" / "val" / "cat" / "0.png", "classes/train"]
    found = xdino_transfer.predict("run", images, top=1, options=Options(batch_size=2))
    assert len(found) == 7
    code, out, _ = xdino("predict", "run", *images, "--top", "1", "--json")
    told = json.loads(out)
    assert code == 0
    assert [p.image for p in found] == [entry["image"] for entry in told]
    for prediction, entry in zip(found, told, strict=True):
        assert prediction.classes[0] == entry["classes"][0]["name"]
        assert prediction.probabilities[0] == pytest.approx(
            entry["classes"][0]["probability"], abs=1e-5
        )
    (one,) = xdino_transfer.predict("run", "classes/val/cat/0.png")
    assert sum(one.probabilities) == pytest.approx(1, abs=1e-5)


def test_lists_and_named_sets_are_looked_at_too(there):
    Path("list.txt").write_text("classes/val/cat/0.png\nclasses/val/dog/1.png\n")
    assert len(xdino_transfer.predict("run", "list.txt")) == 2
    Path("noname").write_bytes(Path("classes/val/cat/0.png").read_bytes())
    assert xdino_transfer.predict("run", ["noname"])[0].image == "noname"
    with pytest.raises(UsageError, match="nowhere"):
        xdino_transfer.predict("run", "nowhere")
