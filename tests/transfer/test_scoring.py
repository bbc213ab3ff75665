"""Scores equal those of the published evaluation on the same images, to the digit; predictions."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.utils import accuracy
from torchvision import transforms

from xdino.backbones import BackboneSpec
from xdino.data import open_source
from xdino.errors import UsageError
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.predicting import predict, write
from xdino_transfer.classification.scoring import published_transform, score

SPEC = BackboneSpec(
    "xcit_nano_12_p8", shape={"embed_dim": 16, "depth": 1, "num_heads": 2}, input_size=48
)
NAMES = tuple(f"class{i}" for i in range(7))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        for i in range(6):
            (tmp_path / name).mkdir(exist_ok=True)
            size = rng.integers(40, 90, 2)
            pixels = rng.integers(0, 256, (*size, 3)) // 2 + 18 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def classifier() -> Classifier:
    model = Classifier(SPEC.build(), SPEC, NAMES, head_scale=20.0).eval()
    torch.nn.init.normal_(model.head.bias)
    return model


def published(classifier: Classifier, folder, full_crop: bool) -> tuple[float, float]:
    """main.py's build_transform(is_train=False) and engine.py's evaluate, batch by batch."""
    side = SPEC.input_size
    resize = int((1.0 if full_crop else 256 / 224) * side)
    transform = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    sums, seen = [0.0, 0.0], 0
    paths = [(label, p) for label, n in enumerate(NAMES) for p in sorted((folder / n).iterdir())]
    for start in range(0, len(paths), 16):
        batch = paths[start : start + 16]
        images = torch.stack([transform(Image.open(path)) for _, path in batch])
        target = torch.tensor([label for label, _ in batch])
        with torch.no_grad():
            found = accuracy(classifier(images), target, topk=(1, 5))
        sums = [total + value.item() * len(batch) for total, value in zip(sums, found, strict=True)]
        seen += len(batch)
    return sums[0] / seen, sums[1] / seen


@pytest.mark.parametrize("full_crop", [True, False])
def test_the_published_evaluation_to_the_digit(full_crop, classifier, folder):
    source = open_source(str(folder), labelled=True)
    (row,) = score(classifier, source, published_transform(SPEC, full_crop), 100, batch_size=8)
    top1, top5 = published(classifier, folder, full_crop)
    assert (row.top1, row.top5) == (pytest.approx(top1, abs=1e-4), pytest.approx(top5, abs=1e-4))
    assert 0 < row.top1 < row.top5
    assert (row.protocol, row.val_size, row.train_size) == ("fine-tuned classification", 42, 100)
    assert row.settings == {"classes": 7, "arch": "xcit_nano_12_p8"}
    assert f"shorter side {48 if full_crop else 54} (PIL bicubic), centre crop 48" in row.transform
    assert row.notes == []


def test_sizes_are_rounded_as_published():
    spec = BackboneSpec("xcit_nano_12_p8", input_size=384)
    assert published_transform(spec).resize == 384
    assert published_transform(spec, full_crop=False).resize == 438


def test_classes_are_found_by_name(classifier, folder):
    for path in (folder / NAMES[2]).iterdir():
        path.unlink()
    (folder / NAMES[2]).rmdir()
    source = open_source(str(folder), labelled=True)
    (row,) = score(classifier, source, published_transform(SPEC))
    assert row.notes == ["the data has 6 of the head's 7 classes"]
    with torch.no_grad():  # always says class5
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(torch.eye(7)[5])
    (row,) = score(classifier, source, published_transform(SPEC))
    assert row.top1 == pytest.approx(100 / 6)


def test_images_that_cannot_be_read_are_noted(classifier, folder):
    (folder / NAMES[0] / "0.png").write_bytes(b"\x89PNG")
    source = open_source(str(folder), labelled=True)
    (row,) = score(classifier, source, published_transform(SPEC))
    assert row.notes == [f"1 images of {folder} could not be read"]
    assert row.val_size == 41


def test_other_heads_are_refused(classifier, folder):
    transform = published_transform(SPEC)
    with pytest.raises(UsageError, match="has no classes to score against"):
        score(classifier, open_source(str(folder)), transform)
    source = open_source(str(folder), labelled=True)
    nameless = Classifier(SPEC.build(), SPEC, 1000)
    with pytest.raises(UsageError, match=r"knows 1,000 classes without names and .* has 7"):
        score(nameless, source, transform)
    other = Classifier(SPEC.build(), SPEC, (*NAMES[:5], "x", "y"))
    with pytest.raises(UsageError, match=r"does not know 2 of the 7 classes of .*: class5, class6"):
        score(other, source, transform)


def test_predictions_need_no_labels(classifier, folder, tmp_path):
    (folder / NAMES[0] / "0.png").write_bytes(b"\x89PNG")
    transform = published_transform(SPEC)
    predictions, skipped = predict(classifier, open_source(str(folder)), transform, top=3)
    assert len(predictions) == 41
    assert [name for name, _ in skipped] == [str(folder / NAMES[0] / "0.png")]
    (row,) = score(classifier, open_source(str(folder), labelled=True), transform)
    right = sum(p.classes[0] == p.image.split("/")[-2] for p in predictions)
    assert row.top1 == pytest.approx(100 * right / 41)
    for prediction in predictions:
        assert len(prediction.classes) == 3
        assert 1 > prediction.probabilities[0] >= prediction.probabilities[2] > 0
    write(tmp_path / "p.csv", predictions)
    with open(tmp_path / "p.csv", newline="") as file:
        lines = [*csv.DictReader(file)]
    assert len(lines) == 3 * 41
    assert lines[0].keys() == {"image", "rank", "class", "probability"}
    assert lines[1]["class"] == predictions[0].classes[1]
    write(tmp_path / "p.json", predictions)
    told = json.loads((tmp_path / "p.json").read_text())
    assert told[5]["image"] == predictions[5].image
    assert told[5]["classes"][0] == {
        "name": predictions[5].classes[0],
        "probability": predictions[5].probabilities[0],
    }
    with pytest.raises(UsageError, match=r"a \.csv or a \.json file, not to p\.txt"):
        write(tmp_path / "p.txt", predictions)


def test_classes_without_names_are_called_by_number(folder):
    nameless = Classifier(SPEC.build(), SPEC, 9)
    predictions, _ = predict(nameless, open_source(str(folder)), published_transform(SPEC), top=20)
    assert sorted(predictions[0].classes) == [str(i) for i in range(9)]
    assert sum(predictions[0].probabilities) == pytest.approx(1, abs=1e-5)
