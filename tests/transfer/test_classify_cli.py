"""`xdino score` and `xdino predict` as a person types them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.checkpoint import save_backbone
from xdino_eval.results import load
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import write_classifier

SPEC = BackboneSpec(
    "xcit_nano_12_p8",
    shape={"embed_dim": 16, "depth": 1, "num_heads": 2},
    input_size=32,
    resize=32,
)
NAMES = ("cat", "dog", "pig")


def classifier(classes, bias: int = 1) -> Classifier:
    """One that always says the same class."""
    torch.manual_seed(0)
    model = Classifier(SPEC.build(), SPEC, classes).eval()
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[bias] = 3.0
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """classes/ with train/ and val/, run/ with a classifier that says "dog"."""
    root = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in NAMES:
            for i in range(count):
                path = root / "classes" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (40, 52, 3), np.uint8)).save(path)
    facts = {"iteration": 7, "init": "scratch"}
    write_classifier(root / "run" / "model.safetensors", classifier(NAMES), facts)
    save_backbone(root / "backbone" / "backbone.safetensors", SPEC.build(), SPEC)
    return root


@pytest.fixture
def there(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "80")
    return world


def test_a_run_is_scored_and_its_row_is_kept(xdino, there):
    code, out, error = xdino("score", "run", "--data", "classes")
    assert (code, error) == (0, "")
    assert "33.33" in out
    (row,) = load("run/results.json")
    assert (row.protocol, row.top1, row.top5) == ("classification", pytest.approx(100 / 3), 100.0)
    assert (row.train_size, row.val_size, row.data) == (12, 6, "classes")
    assert row.settings["labels"] == "by name"
    assert row.settings["init"] == "scratch"
    assert row.features == "classifier, iteration 7"
    assert len(row.checkpoint) == 64
    assert row.transform.startswith("shorter side 32 (PIL bicubic), centre crop 32")
    code, out, _ = xdino(
        "score", "run/model.safetensors", "--data", "classes", "--split", "train", "--size", "40",
        "--crop-ratio", "0.875", "--results", "else.json", "--json",
    )  # fmt: skip
    (told,) = json.loads(out)
    assert (code, told["val_size"]) == (0, 12)
    assert told["transform"].startswith("shorter side 45 (PIL bicubic), centre crop 40")
    assert load("else.json")[0].val_size == 12
    assert len(load("run/results.json")) == 1


def test_published_and_timms_classifiers_are_scored(xdino, there):
    spec = BackboneSpec("xcit_nano_12_p16")
    model = Classifier(spec.build(), spec, 3)
    state = {f"module.{name}": value for name, value in model.published_state().items()}
    torch.save({"model": state}, "nano.pth")
    code, out, _ = xdino("score", "nano.pth", "--data", "classes", "--size", "64", "--json")
    (row,) = json.loads(out)
    assert (code, row["settings"]["labels"]) == (0, "by position")
    assert "in the order of the data's, from cat to pig" in row["notes"][0]
    assert row["features"] == "nano.pth"
    assert row["transform"].startswith("shorter side 64 (PIL bicubic), centre crop 64")
    theirs = timm.create_model("test_resnet", num_classes=3)
    safetensors.torch.save_file(theirs.state_dict(), "timm.safetensors")
    line = ("score", "timm.safetensors", "--data", "classes", "--json")
    code, _, error = xdino(*line)
    assert code == 2
    assert "--arch" in error
    code, out, _ = xdino(*line, "--arch", "test_resnet.r160_in1k")
    (row,) = json.loads(out)
    cfg = timm.models.get_pretrained_cfg("test_resnet.r160_in1k")
    resize = int(cfg.input_size[-1] / cfg.crop_pct)
    assert (
        f"shorter side {resize} (PIL bicubic), centre crop {cfg.input_size[-1]}" in row["transform"]
    )
    code, out, _ = xdino(*line, "--arch", "test_resnet.r160_in1k", "--full-crop")
    assert "shorter side 160 (PIL bicubic), centre crop 160" in json.loads(out)[0]["transform"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["score", "backbone", "--data", "classes"], "holds a backbone without a head"),
        (["score", "nowhere", "--data", "classes"], "there is no weights file or run directory"),
        (["score", "run", "--data", "clases"], 'did you mean "classes"?'),
        (["score", "run", "--data", "fewer"], "only in train: pig"),
        (["score", "run", "--data", "others"],
         "does not know 1 of the 2 classes of others: cow; only the head has cat, pig"),
        (["score", "run", "--data", "empty"], "class folders without an image: pig"),
        (["score", "run", "--data", "one"], "has 1 class, and telling classes apart needs two"),
        (["score", "run", "--data", "run"], "run holds no image"),
        (["score", "five.safetensors", "--data", "classes"],
         "the head knows 5 classes without names and classes has 3"),
        (["score", "run", "--data", "classes", "--arch", "xcit_small_12_p16"],
         "does not fit xcit_small_12_p16"),
        (["score", "run", "--data", "classes", "--arch", "xcit_smal_12_p16"], "did you mean"),
        (["score", "run", "--data", "classes", "--crop-ratio", "0"], "--crop-ratio"),
        (["score", "run", "--data", "classes", "--crop-ratio", "0.9", "--full-crop"],
         "--full-crop is --crop-ratio 1, and --crop-ratio is 0.9"),
        (["score", "run", "--data", "classes", "--batch-size", "1000000", "--size", "8000"],
         "the images of a batch take about"),
        (["predict", "run", "classes", "--out", "p.txt"], "a .csv or a .json file, not to p.txt"),
        (["predict", "run", "nothing.png"], "there is no image, folder or video nothing.png"),
        (["predict", "run", "run"], "run holds no image"),
        (["predict", "run"], "Missing argument 'IMAGES...'"),
    ],
)  # fmt: skip
def test_a_slip_is_one_sentence(xdino, there, arguments, sentence):
    picture = there / "classes" / "val" / "cat" / "0.png"
    layouts = {"fewer": ("train/cat train/dog train/pig val/cat val/dog"), "others": "dog cow",
               "empty": "train/cat train/pig/ val/cat val/pig", "one": "train/cat val/cat"}  # fmt: skip
    for name, folders in layouts.items():
        for folder in folders.split():
            place = there / name / folder
            place.mkdir(parents=True, exist_ok=True)
            if not folder.endswith("/"):
                (place / "a.png").write_bytes(picture.read_bytes())
    write_classifier(there / "five.safetensors", classifier(5), {})
    code, out, error = xdino(*arguments)
    assert (code, out) == (2, ""), error
    assert sentence in error
    assert error.count("\n") == 1


def test_predictions_are_a_table_json_or_files(xdino, there):
    images = ("classes/val/cat/0.png", "classes/val/dog")
    code, out, error = xdino("predict", "run", *images, "--top", "2")
    assert (code, error) == (0, "")
    assert "classes/val/cat/0.png" in out
    assert "dog" in out.splitlines()[3]
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = xdino("predict", "run", *images, "--json")
    told = json.loads(out)
    assert (code, len(told), len(told[0]["classes"])) == (0, 3, 3)
    assert told[0]["image"] == "classes/val/cat/0.png"
    assert told[0]["classes"][0]["name"] == "dog"
    assert told[0]["classes"][0]["probability"] == pytest.approx(0.9094, abs=1e-3)
    code, out, error = xdino("predict", "run", "classes", "--out", "made")
    assert (code, out.split()) == (0, ["made/predictions.csv", "made/predictions.json"])
    assert error == "18 images: dog 18\n"
    with open("made/predictions.csv", newline="") as file:
        assert len([*csv.DictReader(file)]) == 18 * 3
    code, out, _ = xdino("predict", "run", "classes", "--out", "p.json", "--top", "1")
    assert (code, out) == (0, "p.json\n")
    assert len(json.loads(Path("p.json").read_text())) == 18


def test_a_damaged_image_is_named_and_left_out(xdino, there, tmp_path):
    whole = (there / "classes/val/cat/0.png").read_bytes()
    for name, content in {
        "a.png": whole,
        "b.png": whole[:60],
        "c.png": b"",
        "d.png": whole,
    }.items():
        (tmp_path / name).write_bytes(content)
    code, out, error = xdino("predict", "run", tmp_path / "a.png", tmp_path / "b.png", "--json")
    assert (code, len(json.loads(out))) == (0, 1)
    assert error.startswith(f"skipped {tmp_path / 'b.png'}: ")
    code, out, error = xdino("predict", "run", tmp_path, "--json")
    assert (code, out) == (1, "")
    assert f"2 and maybe more of the 4 images of {tmp_path} cannot be read" in error
    code, out, error = xdino("predict", "run", tmp_path, "--json", "--max-bad-share", "0.5")
    assert (code, len(json.loads(out))) == (0, 2)
    code, out, error = xdino("predict", "run", tmp_path / "c.png")
    assert (code, out) == (1, "")
    assert "no image of" in error


def test_every_frame_of_a_film(xdino, there, tmp_path):
    pytest.importorskip("av")
    frames = [Image.new("RGB", (48, 40), (i * 40, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=100)
    code, out, error = xdino("predict", "run", tmp_path / "film.gif", "--json")
    assert code == 0, error
    told = json.loads(out)
    assert len(told) == 4
    assert told[1]["image"] == f"{tmp_path / 'film.gif'}, frame 2 (0.10 s)"
