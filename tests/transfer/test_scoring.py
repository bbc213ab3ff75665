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
from xdino.errors import RunFailed, UsageError
from xdino_eval.extraction import Options
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.labels import display_names, match, synsets
from xdino_transfer.classification.predicting import predict, predict_frames, write
from xdino_transfer.classification.scoring import cropped, published_transform, score

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
    options = Options(published_transform(SPEC, full_crop), batch_size=8)
    (row,) = score(classifier, source, options, 100)
    top1, top5 = published(classifier, folder, full_crop)
    assert (row.top1, row.top5) == (pytest.approx(top1, abs=1e-4), pytest.approx(top5, abs=1e-4))
    assert 0 < row.top1 < row.top5
    assert (row.protocol, row.val_size, row.train_size) == ("classification", 42, 100)
    assert row.settings == {"classes": 7, "arch": "xcit_nano_12_p8", "labels": "by name"}
    assert f"shorter side {48 if full_crop else 54} (PIL bicubic), centre crop 48" in row.transform
    assert row.notes == []


def test_sizes_are_rounded_as_published():
    spec = BackboneSpec("xcit_nano_12_p8", input_size=384)
    assert published_transform(spec).resize == 384
    assert published_transform(spec, full_crop=False).resize == 438
    assert cropped(spec, 0.875, 224).resize == 256
    assert cropped(spec, 0.9, 224).resize == 248, "timm rounds down, too"
    small = BackboneSpec("xcit_nano_12_p8", input_size=32)
    assert published_transform(small, full_crop=False).resize == 32, "as published, of CIFAR"
    for ratio in (0.0, 1.1, -1.0):
        with pytest.raises(UsageError, match="ratio must be above 0 and at most 1"):
            cropped(spec, ratio)


def test_classes_are_found_by_name(classifier, folder):
    for path in (folder / NAMES[2]).iterdir():
        path.unlink()
    (folder / NAMES[2]).rmdir()
    source = open_source(str(folder), labelled=True)
    (row,) = score(classifier, source, Options())
    assert row.notes == ["the data has 6 of the head's 7 classes, and lacks class2"]
    with torch.no_grad():  # always says class5
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(torch.eye(7)[5])
    (row,) = score(classifier, source, Options())
    assert row.top1 == pytest.approx(100 / 6)


def test_images_that_cannot_be_read_are_noted(classifier, folder):
    (folder / NAMES[0] / "0.png").write_bytes(b"\x89PNG")
    source = open_source(str(folder), labelled=True)
    told: list[str] = []
    (row,) = score(classifier, source, Options(notice=told.append))
    assert row.notes == [f"1 images of {folder} could not be read"]
    assert row.val_size == 41
    assert "skipped" in told[0]
    assert "0.png" in told[0]
    for number in range(1, 5):
        (folder / NAMES[1] / f"{number}.png").write_bytes(b"")
    source = open_source(str(folder), labelled=True)
    with pytest.raises(RunFailed, match=r"of the 42 images .* and --max-bad-share allows 5\.00%"):
        score(classifier, source, Options())
    (row,) = score(classifier, source, Options(batch_size=5), max_bad_share=0.2)
    assert row.val_size == 37


def test_one_unreadable_image_never_stops_a_few(classifier, folder):
    for path in [p for n in NAMES for p in (folder / n).iterdir() if p.stem not in "01"]:
        path.unlink()
    (folder / NAMES[3] / "1.png").write_bytes(b"")
    source = open_source(str(folder), labelled=True)
    assert score(classifier, source, Options())[0].val_size == 13
    for name in NAMES:
        (folder / name / "0.png").write_bytes(b"")
        (folder / name / "1.png").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"no image of .* could be read; the first:"):
        score(classifier, open_source(str(folder), labelled=True), Options(), max_bad_share=1)


def test_other_heads_are_refused(classifier, folder):
    with pytest.raises(UsageError, match="has no classes to score against"):
        score(classifier, open_source(str(folder)), Options())
    source = open_source(str(folder), labelled=True)
    nameless = Classifier(SPEC.build(), SPEC, 1000)
    with pytest.raises(UsageError, match=r"knows 1,000 classes without names and .* has 7"):
        score(nameless, source, Options())
    other = Classifier(SPEC.build(), SPEC, (*NAMES[:5], "x", "y"))
    told = r"does not know 2 of the 7 classes of .*: class5, class6; only the head has x, y"
    with pytest.raises(UsageError, match=told):
        score(other, source, Options())


class Named:
    """As much of a source as `match` looks at."""

    def __init__(self, *classes: str) -> None:
        self.name, self.classes, self.labels = "DATA", classes, np.arange(len(classes))


def test_classes_without_names_are_matched_by_synset_or_by_position():
    some = synsets()[7], synsets()[3], synsets()[999]
    found = match(None, 1000, Named(*some))
    assert (found.numbers.tolist(), found.how) == ([7, 3, 999], "by synset")
    assert "has 3 of the head's 1,000 classes, and lacks n01440764" in found.notes[0]
    found = match(None, 3, Named("c", "a", "b"))
    assert (found.numbers.tolist(), found.how) == ([0, 1, 2], "by position")
    assert "in the order of the data's, from c to b" in found.notes[0]
    strangers = Named(*(f"c{i}" for i in range(1000)))
    assert match(None, 1000, strangers).how == "by position"
    assert match(("a", "a"), 2, Named("a", "a")).numbers.tolist() == [0, 1]
    with pytest.raises(UsageError, match="the head calls two of its classes a"):
        match(("a", "a", "b"), 3, Named("b", "a"))
    with pytest.raises(UsageError, match="DATA has one class, a: any head would be right"):
        match(("a", "b"), 2, Named("a"))


def test_imagenets_classes_are_told_in_words():
    names = display_names(None, 1000)
    assert (names[0], len(names)) == ("n01440764 tench", 1000)
    assert synsets() == tuple(sorted(synsets()))


def test_predictions_need_no_labels(classifier, folder, tmp_path):
    (folder / NAMES[0] / "0.png").write_bytes(b"\x89PNG")
    told: list[str] = []
    options = Options(batch_size=16, notice=told.append)
    predictions = predict(classifier, open_source(str(folder)), options, top=3)
    assert len(predictions) == 41
    assert [line.split(": ")[0] for line in told] == [f"skipped {folder / NAMES[0] / '0.png'}"]
    (row,) = score(classifier, open_source(str(folder), labelled=True), options)
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
    predictions = predict(nameless, open_source(str(folder)), Options(), top=20)
    assert sorted(predictions[0].classes) == [str(i) for i in range(9)]
    assert sum(predictions[0].probabilities) == pytest.approx(1, abs=1e-5)


def test_frames_are_looked_at_as_images_are(classifier, folder):
    source = open_source(str(folder))
    frames = [(f"frame {i}", source.read(i)) for i in range(5)]
    found = [*predict_frames(classifier, iter(frames), Options(batch_size=2), top=2)]
    images = predict(classifier, source, Options(), top=2)
    assert [p.image for p in found] == [name for name, _ in frames]
    for one, other in zip(found, images, strict=False):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert not [*predict_frames(classifier, iter(()), Options())]
