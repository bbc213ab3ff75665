"""`xdino score` and `xdino predict` of segmenters and detectors, as a person types them."""

import contextlib
import csv
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from annotated_pictures import NAMES, annotated
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.checkpoint import save_backbone
from xdino_eval.results import load
from xdino_transfer import fpn
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import write_classifier
from xdino_transfer.dense_files import read_dense, write_dense
from xdino_transfer.detection import detector
from xdino_transfer.detection.published import to_published
from xdino_transfer.detection.roi import RegionSettings
from xdino_transfer.detection.views import Views
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import segmenter
from xdino_transfer.segmentation import views as segmentation_views

SPEC = BackboneSpec("xcit_nano_12_p16", shape={"embed_dim": 32, "depth": 4, "num_heads": 2})


def pyramid() -> Pyramid:
    return Pyramid(SPEC.build())


def always(model, best: int):
    """Give every pixel the same class."""
    head = model.decode_head.conv_seg
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.nn.functional.one_hot(torch.tensor(best), len(head.bias)).float()
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    annotated(root)
    torch.manual_seed(0)
    model = always(segmenter.build(pyramid(), "semantic_fpn", 3, 8), 0)
    views = segmentation_views.TestViews(SPEC.mean, SPEC.std, 256, 64)
    facts = {"iteration": 7, "init": "scratch"}
    write_dense(root / "seg/model.safetensors", model, facts, spec=SPEC, classes=NAMES, views=views)
    torch.save(
        {"meta": {"epoch": 1}, "state_dict": fpn.to_published(model.state_dict())}, root / "seg.pth"
    )
    boxes = detector.build(
        pyramid(), 2, detector.Shape(8, 16, 8), None, RegionSettings(score=0.2, most=9)
    )
    write_dense(
        root / "det/model.safetensors",
        boxes,
        {"category_ids": [7, 9]},
        spec=SPEC,
        classes=("cat", "dog"),
        views=Views(SPEC.mean, SPEC.std, longer=256, test_side=64),
    )
    torch.save(
        {
            "meta": {"CLASSES": ("Cat", "dog")},
            "state_dict": to_published(boxes.state_dict()),
            "optimizer": {"param_groups": []},
        },
        root / "det.pth",
    )
    classifier = Classifier(SPEC.build(), SPEC, ("sky", "sea"))
    write_classifier(root / "tuned" / "model.safetensors", classifier, {"iteration": 1})
    save_backbone(root / "bare" / "backbone.safetensors", SPEC.build(), SPEC)
    for i in range(3):
        path = root / "photos" / ("deep" if i else "") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((90 + i, 130, 3), 60 * i, np.uint8)).save(path)
    (root / "photos" / "film.avi").write_bytes(b"RIFF")
    (root / "broken").mkdir()
    for i in range(3):
        whole = (root / "maps" / "images" / "val" / f"{i}.png").read_bytes()
        (root / "broken" / f"{i}.png").write_bytes(whole[: 70 if i == 1 else None])
    (root / "empty").mkdir()
    for folder in ("Annotations", "JPEGImages"):
        (root / "voc" / folder).mkdir(parents=True)
    (root / "file.txt").write_text("nothing")
    (root / "movie").mkdir()
    frames = [Image.new("RGB", (66, 50), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(root / "movie" / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    return root


@pytest.fixture
def there(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "80")
    return world


def test_a_segmenter_is_scored(xdino, there):
    code, out, error = xdino("score", "seg", "--data", "maps")
    assert code == 0, error
    assert "mIoU" in out
    assert error == "per class: seg/per_class.csv\n"
    (row,) = load("seg/results.json")
    assert (row.protocol, row.val_size, row.train_size) == ("semantic segmentation", 3, 2)
    assert row.settings == {"classes": 3, "scales": [1.0], "flip": False, "init": "scratch"}
    assert row.transform == "fitted into 256 x 64"
    assert (row.features, len(row.checkpoint)) == ("segmenter, iteration 7", 64)
    # Every pixel is called sky, which holds two thirds and a ninth of the labelled ones.
    sky = (20 * 56 * 3 + 20 * 28) / (20 * 56 * 3 + 20 * 28 * 3)
    assert row.metrics["aAcc"] == pytest.approx(100 * sky)
    assert row.metrics["mIoU"] == pytest.approx(100 * sky / 3)
    with open("seg/per_class.csv", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [line["class"] for line in table] == [*NAMES]
    assert [line["IoU"] for line in table] == [f"{100 * sky:.4f}", "0.0000", "0.0000"]
    code, out, error = xdino(
        "score", "seg.pth", "--data", "maps", "--split", "train", "--scales", "0.5,1", "--flip",
        "--shorter-side", "32", "--out", "else/r.json", "--json",
    )  # fmt: skip
    assert code == 0, error
    (told,) = json.loads(out)
    assert told["settings"] == {"classes": 3, "scales": [0.5, 1.0], "flip": True}
    assert told["notes"] == ["classes by place: the file names none, the data has sky, sea, sand"]
    assert told["transform"] == "fitted into 128 x 32"
    assert (told["val_size"], told["features"]) == (2, "seg.pth")
    assert Path("else/per_class.csv").is_file()


def test_labels_are_counted_as_the_run_counted_them(xdino, there):
    network = read_dense("seg").network
    write_dense(there / "ones/model.safetensors", network, {"zero_is_void": True}, spec=SPEC,
                classes=NAMES)  # fmt: skip
    shutil.copytree("maps", "from_one")
    for path in Path("from_one/masks").rglob("*.png"):
        labels = np.asarray(Image.open(path))
        Image.fromarray((labels + 1).astype(np.uint8)).save(path)  # 255, for none, becomes 0
    zero, one = (
        xdino("score", which, "--data", data, "--shorter-side", "64", "--json")
        for which, data in (("seg", "maps"), ("ones", "from_one"))
    )
    assert (zero[0], one[0]) == (0, 0), one[2]
    assert json.loads(zero[1])[0]["metrics"] == json.loads(one[1])[0]["metrics"]


def test_a_detector_is_scored(xdino, there):
    code, out, error = xdino("score", "det", "--data", "boxes", "--json")
    assert code == 0, error
    (row,) = json.loads(out)
    assert row["protocol"] == "detection"
    assert {"box AP", "mask AP50"} <= row["metrics"].keys()
    with open("det/per_class.csv", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [line["class"] for line in table] == ["cat", "dog"]
    assert table[1] == {"class": "dog", "objects": "0", "box AP": "", "mask AP": ""}
    code, out, error = xdino(
        "score", "det.pth", "--data", "boxes", "--json", "--shorter-side", "64"
    )
    assert code == 0, error
    (row,) = json.loads(out)
    assert row["notes"] == [
        'classes by place: 1 of 2 are spelt otherwise in the data (first: "Cat", "cat")'
    ]


def test_a_segmenter_s_pictures(xdino, there):
    code, out, error = xdino("predict", "seg", "photos", "--out", "s")
    assert code == 0, error
    made = ["s/0-overlay.png", "s/deep-1-overlay.png", "s/deep-2-overlay.png"]
    assert out.splitlines() == [*made, "s/classes.txt", "s/predictions.json"]
    assert "looking at 130 x 90 pixels whole: about " in error
    assert error.count("looking at") == 1  # not of each size
    assert "1 file of" in error
    assert "left out, for want of the suffix of an image that can be read: .avi (1)" in error
    assert error.splitlines()[-1] == "3 pictures: sky 100.0 %"
    told = json.loads(Path("s/predictions.json").read_text())
    assert [entry["image"] for entry in told] == ["0.jpg", "deep/1.jpg", "deep/2.jpg"]
    assert told[2] == {
        "image": "deep/2.jpg", "width": 130, "height": 92, "mask": "masks/deep-2.png",
        "classes": [{"name": "sky", "number": 0, "share": 1.0}],
    }  # fmt: skip
    with Image.open("s/masks/deep-2.png") as mask:
        assert (mask.mode, mask.size) == ("P", (130, 92))
        assert not np.asarray(mask).any()
    assert Path("s/classes.txt").read_text().split() == [*NAMES]
    # Once more, in tiles, into the same folder: nothing of ours is taken for a photograph.
    code, _, error = xdino(
        "predict", "seg", "photos/0.jpg", "--out", "s", "--tile", "128", "--json"
    )
    assert code == 0
    assert "in 2 tiles of 128 x 90, about" in error
    code, out, error = xdino(
        "predict", "seg", "photos", "--json", "--shorter-side", "300", "--tile", "160"
    )
    assert code == 0, error
    assert "seen at 433 x 300 in 12 tiles of 48 x 48" in error
    assert "mask" not in json.loads(out)[0]


def test_a_detector_s_pictures(xdino, there):
    code, out, error = xdino(
        "predict", "det", "photos/0.jpg", "broken", "--out", "d", "--threshold", "0.3"
    )
    assert code == 0, error
    assert "skipped" in error
    assert "broken/1.png cannot be read" in error.replace("\n", " ")
    assert out.splitlines()[-1] == "d/predictions.json"
    tree = json.loads(Path("d/predictions.json").read_text())
    assert [image["file_name"] for image in tree["images"]] == ["photos/0.jpg", "0.png", "2.png"]
    assert [category["id"] for category in tree["categories"]] == [7, 9]
    assert tree["annotations"]
    assert all(row["score"] > 0.3 and row["category_id"] in (7, 9) for row in tree["annotations"])
    from pycocotools.coco import COCO

    coco = COCO("d/predictions.json")
    row = tree["annotations"][0]
    assert coco.annToMask(coco.anns[row["id"]]).sum() == row["area"]
    code, _, error = xdino("predict", "det", "photos/0.jpg", "--threshold", "1", "--json")
    assert error.splitlines()[-1] == "1 picture: nothing was found"


def test_every_frame_of_a_film(xdino, there):
    pytest.importorskip("av")
    code, out, error = xdino("predict", "seg", "movie/a.gif", "--out", "film")
    assert code == 0, error
    assert out.splitlines()[0] == "film/a-overlay.mp4"
    told = json.loads(Path("film/predictions.json").read_text())
    assert [entry["image"] for entry in told] == [f"a, frame {i}" for i in (1, 2, 3)]
    assert Path("film/masks/a-000003.png").is_file()


def ade20k(root: Path, *, held_out: str) -> None:
    """Its folders, with three classes, and pictures that nobody labelled."""
    (root / "ADEChallengeData2016").mkdir(parents=True)
    lines = "\n".join(f"{i}\t0.1\t9\t1\t{name}" for i, name in enumerate(NAMES, 1))
    (root / "ADEChallengeData2016" / "objectInfo150.txt").write_text(f"Idx\tRatio\n{lines}\n")
    for part in ("training", "validation"):
        for folder, pixels in (
            ("images", np.zeros((40, 56, 3))),
            ("annotations", np.eye(40, 56) + 1),
        ):
            path = root / "ADEChallengeData2016" / folder / part / f"ADE_{part}_1.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    for i in range(2):
        path = root / held_out / f"ADE_test_0{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56 + i, 40)).save(path)


def test_masks_are_submitted_in_the_layout_s_own_numbers(xdino, there, tmp_path):
    """1 to 150 for ADE20K, of pictures without masks, too; 0 for the first class elsewhere."""
    code, out, error = xdino("score", "seg", "--data", "maps", "--submission", tmp_path / "plain",
                             "--results", tmp_path / "r.json")  # fmt: skip
    assert code == 0, error
    assert "mIoU" in out
    assert f"to submit: {tmp_path / 'plain'}" in error
    for path in sorted((tmp_path / "plain").iterdir()):
        with Image.open(path) as png, Image.open(Path("maps/images/val", path.name)) as picture:
            assert (png.mode, png.size) == ("L", picture.size)
            assert not np.asarray(png).any()
    assert len([*(tmp_path / "plain").iterdir()]) == 3
    ade20k(tmp_path / "a", held_out="ADEChallengeData2016/images/testing")
    ade20k(tmp_path / "b", held_out="release_test/testing")
    for name, split, stems in (
        ("a", "test", ["ADE_test_00", "ADE_test_01"]),
        ("b", "test", ["ADE_test_00", "ADE_test_01"]),
        ("b", "val", ["ADE_validation_1"]),
    ):
        made = tmp_path / f"{name}-{split}.zip"
        code, out, error = xdino("score", "seg", "--data", tmp_path / name, "--split", split,
                                 "--submission", made, "--results", tmp_path / "r.json")  # fmt: skip
        assert code == 0, error
        assert ("mIoU" in out) == (split == "val")
        with zipfile.ZipFile(made) as archive:
            assert archive.namelist() == [f"{stem}.png" for stem in stems]
            with Image.open(archive.open(f"{stems[-1]}.png")) as png:
                assert (png.mode, png.size) == ("L", (57 if split == "test" else 56, 40))
                assert (np.asarray(png) == 1).all()


def test_detections_are_submitted_as_coco_takes_them(xdino, there, tmp_path):
    from pycocotools.coco import COCO

    made = tmp_path / "new" / "d.json"
    told = ("--submission", made, "--results", tmp_path / "r.json")
    code, out, error = xdino("score", "det", "--data", "boxes", *told)
    assert code == 0, error
    assert "box AP" in out
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO("boxes/annotations/instances_val2017.json").loadRes(str(made)).anns
    assert len(found) > 1
    assert {row["image_id"] for row in found.values()} == {4}
    assert {row["category_id"] for row in found.values()} <= {7, 9}
    # Pictures of which nothing is told: test-dev's lie among those of test.
    shutil.copytree("boxes", tmp_path / "boxes")
    told_of = json.loads((tmp_path / "boxes/annotations/instances_val2017.json").read_text())
    del told_of["annotations"]
    told_of["images"][0]["id"] = 12
    (tmp_path / "boxes/val2017").rename(tmp_path / "boxes/test2017")
    for name in ("test-dev2017", "test2017"):
        (tmp_path / f"boxes/annotations/image_info_{name}.json").write_text(json.dumps(told_of))
    for split in ("test", "test-dev"):
        made.unlink()
        code, out, error = xdino(
            "score", "det", "--data", tmp_path / "boxes", "--split", split, *told
        )
        assert (code, out) == (0, ""), error
        rows = json.loads(made.read_text())
        assert {row["image_id"] for row in rows} == {12}
        assert rows[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    code, out, error = xdino("score", "det", "--data", tmp_path / "boxes", "--split", "test")
    assert code == 2
    assert "has nothing to score against: --submission FILE writes what" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("score det --data boxes --submission d", "is a COCO result file, FILE.json, and not d"),
        ("score seg --data maps --submission s.json", "is a folder or FILE.zip of masks, and not s.json"),
        ("score seg --data maps --submission maps/images/val", "is the folder of the data itself"),
        ("score det --data boxes --submission boxes/annotations/instances_val2017.json",
         "is the file of annotations itself"),
        ("score det --data voc --submission d.json", "in VOC's layout, whose pictures have names and no"),
        ("score det --data boxes --split test", "boxes has no test split: expected annotations/image"),
        ("score seg --data maps --split test --submission s", "there is no folder maps/images/test"),
        ("score seg --data maps --split test-dev", "test-dev is a split of COCO's boxes"),
        ("score tuned --data classes --split test", "--split test is of segmenters and detectors"),
        ("score tuned --data classes --submission d.json", "--submission is of segmenters and detectors"),
        ("score seg --data boxes", "boxes holds no pictures with masks"),
        ("score seg --data classes", "classes holds no pictures with masks"),
        ("score det --data maps", "maps holds no annotated pictures"),
        ("score tuned --data maps", "maps holds pictures with masks, and tuned is a classifier"),
        ("score tuned --data boxes", "boxes holds annotated objects, and tuned is a classifier"),
        ("score bare --data maps", "holds a backbone without a head"),
        ("score seg --data renamed", "knows other classes than val of renamed: sand instead of mud"),
        ("score seg --data turned", "in another order: sea, sky, sand instead of sky, sea, sand"),
        ("score seg --data two", "knows 3 classes (sky, sea, sand), and val of two has 2 classes"),
        ("score seg.pth --data two", "knows 3 classes, and val of two has 2 classes (sky, sea)"),
        ("score seg --data maps --crop-ratio 1",
         "--crop-ratio is of classifiers, and seg holds a segmenter"),
        ("score det --data boxes --flip", "--flip is of segmenters, and det holds a detector"),
        ("score tuned --data classes --scales 1",
         "--scales is of segmenters and detectors, and tuned holds neither"),
        ("score seg --data maps --scales 0", "--scales must be above 0"),
        ("score seg --data maps --arch xcit_small_12_p16", "leave out --arch"),
        ("score seg.pth --data maps --arch xcit_small_12_p16",
         "is not on xcit_small_12_p16: its shapes are those of"),
        ("predict seg photos", "--out DIR is needed for masks and overlays"),
        ("predict seg photos --out file.txt", "--out needs a folder, and file.txt is a file"),
        ("predict seg empty --out s", "empty holds no image"),
        ("predict seg broken/1.png --out s", "broken/1.png cannot be read as an image"),
        ("predict seg photos --out s --top 2", "--top is of classifiers"),
        ("predict seg photos --out s --threshold 0.2", "--threshold is of detectors"),
        ("predict tuned photos --tile 200", "--tile is of segmenters and detectors"),
        ("predict seg photos --out s --memory 0.000001", "give more by --memory"),
        ("predict seg photos --out photos", "--out is the folder of images photos itself"),
        ("predict seg nothing.png --out s", "there is no image, folder or video nothing.png"),
        ("export seg --out seg.onnx --format onnx",
         "seg holds a segmenter: backbones and classifiers are exported"),
        ("knn seg --data classes", "is a network for segmentation, which gives pixels or boxes"),
        ("finetune finetune_small --init det --data.path classes --run f",
         "is a network for detection, not a classifier"),
    ],
)  # fmt: skip
def test_a_slip_is_one_sentence(xdino, there, arguments, sentence):
    for name, classes in {
        "renamed": "sky\nsea\nmud", "turned": "sea\nsky\nsand", "two": "sky\nsea"
    }.items():  # fmt: skip
        if not Path(name).exists():
            Path(name).mkdir()
            for folder in ("images", "masks"):
                (Path(name) / folder).symlink_to(there / "maps" / folder)
            (Path(name) / "classes.txt").write_text(classes)
    code, out, error = xdino(*arguments.split())
    told = error.splitlines()[-1]
    assert (code, out) == (2, ""), error
    assert sentence in told
    assert len([line for line in error.splitlines() if line.startswith("xdino: ")]) == 1
