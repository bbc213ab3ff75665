"""What `xdino detect` refuses in a sentence before anything is written; what it takes, and says so."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.checkpoint import save_backbone
from xdino.plan import feasibility
from xdino_eval import results
from xdino_transfer.dense_files import read_dense
from xdino_transfer.detection.layouts.opening import BESIDE

TINY = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": 16, "model.depth": 4, "model.num_heads": 2,
    "view.sides": 48, "view.longer": 64, "view.before_crop": 48, "view.crop": "32,48",
    "view.test_side": 48, "heads.width": 16, "heads.hidden": 16, "heads.mask_width": 8,
    "heads.anchors": 32, "heads.candidates": 60, "heads.proposals": 30, "heads.regions": 16,
    "train.epochs": 1, "train.batch_size": 2, "train.precision": "fp32", "runtime.device": "cpu",
    "runtime.workers": 0, "runtime.report": "false", "evaluate.every": 0, "optim.lr": 1e-3,
}  # fmt: skip
SQUARE = [[4.0, 4, 24, 4, 24, 24, 4, 24]]


@pytest.fixture(scope="module")
def made(tmp_path_factory, detection_data) -> Path:
    return detection_data.make(tmp_path_factory.mktemp("made"), 4, 2, (40, 48))


@pytest.fixture
def coco(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "coco"))


@pytest.fixture
def detect(xdino, tmp_path):
    """detect(data, ..., key=value) -> (exit code, what was said, the run's folder)."""

    def run(data: Path | None, *more: object, **keys: object) -> tuple[int, str, Path]:
        given = {**TINY, **({} if data is None else {"data.path": data})}
        given |= {key.replace("__", "."): value for key, value in keys.items()}
        pairs = [word for key, value in given.items() for word in (f"--{key}", value)]
        folder = tmp_path / "run"
        code, _, error = xdino("detect", "detect_small", "--run", folder, *pairs, *more)
        return code, error, folder

    return run


def refused(found: tuple[int, str, Path], words: str) -> None:
    code, error, folder = found
    assert code == 2, error
    assert words in error
    assert not folder.exists()


def changed(data: Path, split: str = "train", **change: object) -> None:
    """Other values for the first annotation of a split."""
    path = data / "annotations" / f"instances_{split}2017.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0].update(change)
    path.write_text(json.dumps(tree))


def test_where_no_annotated_images_are(detect, coco, tmp_path):
    refused(
        detect(None), "data.path is not set: name a folder of annotated images with --data.path"
    )
    refused(detect(tmp_path / "coc"), "coco")
    refused(detect(coco / "train2017"), "holds no annotated pictures: expected annotations/")
    (coco / "train").mkdir()
    (coco / "train" / BESIDE).write_text("{}")
    refused(
        detect(coco),
        "unclear what to read: annotations/instances_train*.json and train/_annotations.coco.json",
    )
    (coco / "train" / BESIDE).unlink()
    (coco / "annotations" / "instances_val2017.json").unlink()
    refused(detect(coco), "has annotations of train and none of val")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": 4}, "has category 4, and there are 3, 7, 90"),
        ({"image_id": 77}, "is on image 77, which is not listed"),
        ({"segmentation": {"size": [48, 40], "counts": [1920]}}, "its mask is of 40 x 48 pixels and"),
        ({"segmentation": {"size": [40, 48], "counts": [5]}}, "do not add up to its image"),
        ({"segmentation": {"size": [40, 48], "counts": "?~"}}, "do not add up to its image"),
        ({"bbox": [1, 2, 3]}, "it has one of another kind (annotation 1 of the file's)"),
        ({"bbox": [1, 2, 3, "wide"]}, "where an entry is expected it has"),
        ({"bbox": None}, "where an entry is expected it has"),
    ],
)  # fmt: skip
def test_annotations_that_contradict_themselves(change, said, detect, coco):
    changed(coco, **change)
    refused(detect(coco), said)


def test_annotations_are_no_json(detect, coco):
    path = coco / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:100])
    refused(detect(coco), "is no JSON file, or cut short")


def test_nothing_to_learn_from_or_to_find(detect, coco):
    for split, said in (
        ("val", "has no object to be found, so that nothing can be scored"),
        ("train", "has no picture with an object to learn from"),
    ):
        path = coco / "annotations" / f"instances_{split}2017.json"
        kept = path.read_text()
        path.write_text(json.dumps({**json.loads(kept), "annotations": []}))
        refused(detect(coco), said)
        path.write_text(json.dumps({**json.loads(kept), "categories": [], "annotations": []}))
        refused(detect(coco), "names no class of objects")
        path.write_text(kept)
    path = coco / "annotations" / "instances_val2017.json"
    tree = json.loads(path.read_text())
    tree["categories"][0]["name"] = "skirt"
    path.write_text(json.dumps(tree))
    refused(detect(coco), "only in train: trouser; only in val: skirt")
    shutil.rmtree(coco / "val2017")
    refused(detect(coco), "are expected in")


def test_what_is_left_out_is_said_and_the_rest_is_learned_from(detect, coco):
    """Boxes outside, without an area, polygons of two points, pictures without objects; missing and
    damaged ones up to the share."""
    path = coco / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    first = tree["images"][0]
    size = {"height": first["height"], "width": first["width"]}
    for number in (90, 91, 92, 93, 94):
        tree["images"].append({"id": number, "file_name": f"{number}.jpg", **size})
        if number < 93:
            shutil.copy(
                coco / "train2017" / first["file_name"], coco / "train2017" / f"{number}.jpg"
            )
    (coco / "train2017" / "94.jpg").write_bytes(b"no picture")
    Image.new("RGB", (24, 24)).save(coco / "train2017" / "92.jpg")
    tree["images"][-3] |= {"height": 24, "width": 24}
    row = {"image_id": 90, "category_id": 3, "area": 400, "iscrowd": 0, "segmentation": SQUARE}
    rows = [
        {**row, "id": 901, "bbox": [100, 4, 20, 20]},
        {**row, "id": 902, "bbox": [4, 4, 0, 20]},
        {**row, "id": 903, "bbox": [4, 4, 20, 20], "segmentation": [[4, 4, 24, 24]]},
        {**row, "id": 904, "bbox": [4, 4, 20, 20], "image_id": 94},
        {**row, "id": 905, "bbox": [4, 4, 20, 20], "image_id": 92},
    ]
    tree["annotations"] += rows
    path.write_text(json.dumps(tree))
    refused(detect(coco), "1 of the 9 pictures of")
    code, error, run = detect(coco, data__max_bad_share=0.2, train__epochs=2)
    assert code == 0, error
    for said in (
        "93.jpg; they are left out",
        "2 objects have boxes without an area, or outside of their picture, and are left out (first: "
        "annotation 901)",
        "1 objects have polygons of fewer than three points only",
        "2 of 8 pictures have no object to learn from, or a side below 32 pixels, and are left out",
        "learning to detect from scratch on 6 images",
        "skipped 1 unreadable images",
        "94.jpg (",
    ):
        assert said in error, said
    (bad,) = (json.loads(line) for line in (run / "unreadable.jsonl").read_text().splitlines())
    assert bad["image"].endswith("94.jpg")


def test_damaged_images_beyond_the_share_stop_the_run(detect, coco):
    for number in (1, 2):
        (coco / "train2017" / f"{number:012}.jpg").write_bytes(b"no picture")
    code, error, run = detect(coco)
    assert code == 1
    assert "2 of 4 images of" in error or "1 of 4 images of" in error
    assert "data.max_bad_share allows 5.00%" in error
    assert run.exists()


def test_one_class_and_json_files_by_their_names(detect, coco, tmp_path, xdino):
    """Moved, and continued from where they lie now; val without a picture that is damaged."""
    for split in ("train", "val"):
        path = coco / "annotations" / f"instances_{split}2017.json"
        tree = json.loads(path.read_text())
        for row in tree["annotations"]:
            row["category_id"] = 3
        tree["categories"] = tree["categories"][:1]
        path.write_text(json.dumps(tree))
    (coco / "val2017" / f"{2:012}.jpg").write_bytes(b"no picture")
    files = {
        f"data__{split}_{what}": coco / place
        for split in ("train", "val")
        for what, place in (
            ("json", f"annotations/instances_{split}2017.json"), ("images", f"{split}2017"),
        )
    }  # fmt: skip
    refused(detect(coco, **files), "both say what to learn from: give one")
    half = {key: value for key, value in files.items() if "val" not in key}
    refused(detect(None, **half), "go together: give all four")
    wrong = {**files, "data__val_json": coco / "none.json"}
    refused(detect(None, **wrong), "there is no file")
    wrong = {**files, "data__val_images": coco / "none"}
    refused(detect(None, **wrong), "there is no folder")
    code, error, run = detect(None, **files, evaluate__every=1)
    assert code == 0, error
    (row,) = [r for r in results.load(run / "results.json") if r.settings["weights"] == "last"]
    assert (row.settings["classes"], row.val_size) == (1, 1)
    assert "1 pictures could not be read" in row.notes[0]
    assert (run / "per_class.csv").read_text().startswith("class,objects,box AP,mask AP\ntrouser,")
    assert (run / "metrics.jsonl").read_text().count("val_box_ap50") == 2
    # One of the files scores it as well, in the words that are told at the end.
    told = (
        f"xdino score {run} --data {files['data__val_json']} --images {files['data__val_images']}"
    )
    assert f"  {told}\n" in error
    code, out, error = xdino(*told.split()[1:], "--json")
    assert code == 0, error
    assert json.loads(out)[0]["metrics"] == row.metrics
    code, _, error = xdino(*told.split()[1:-2])
    assert code == 2
    assert "--images FOLDER says where they are" in error
    shutil.move(coco, tmp_path / "moved")
    moved = {key: tmp_path / "moved" / value.relative_to(coco) for key, value in files.items()}
    code, error, _ = detect(None, **moved, evaluate__every=1)
    assert code == 0, error
    assert "left alone" in error


def test_vocs_layout_is_learned_from(detect, tmp_path):
    """Boxes alone: they stand for the masks, which is said."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for stem in ("a", "b", "c"):
        pixels = np.random.default_rng(ord(stem)).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{stem}.jpg")
        box = "<xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax>"
        (folder / "Annotations" / f"{stem}.xml").write_text(
            "<annotation><size><width>48</width><height>40</height></size><object><name>dog</name>"
            f"<bndbox>{box}</bndbox></object></annotation>"
        )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("c\n")
    code, error, run = detect(tmp_path / "VOCdevkit")
    assert code == 0, error
    assert "no object has an outline: masks are learned, and scored, as boxes" in error
    lines = (run / "per_class.csv").read_text().splitlines()
    assert len(lines) == 21  # VOC's twenty classes
    assert lines[12].startswith("dog,1,")


def test_recipes_that_contradict_themselves(detect, coco):
    found = detect(
        coco, view__crop="40,20", view__mean="0.5,0.5,0.5", optim__drops="27,33", view__sides="[]"
    )
    for said in (
        "view.crop must rise, got 40 to 20",
        "view.mean and view.std must be given together",
        "optim.drops has 27, and the run is over after 1 epochs",
        "view.sides names no side",
    ):
        refused(found, said)
    refused(detect(coco, optim__warmup=500), "longer than the run of 3: shorten it or give a share")
    refused(detect(coco, train__batch_size=5), "a batch takes 5 images")
    refused(detect(coco, view__mean="0.5", view__std="0.5"), "need one value a channel: 3, got 1")
    refused(detect(coco, train__epochs="null"), "neither train.epochs nor train.iterations says")
    refused(detect(coco, runtime__kernels="fused"), "leave it out")


def test_networks_that_have_no_levels(detect, coco, tmp_path):
    none = dict.fromkeys(("model__embed_dim", "model__depth", "model__num_heads"), "null")
    refused(detect(coco, model__arch="xcit_nano_12_p4"), "patches of 16 or 8 pixels")
    refused(detect(coco, model__arch="vit_tiny_patch16_224", **none), "is no XCiT")
    refused(detect(coco, model__norm="frozen"), "from scratch there are none")
    refused(detect(coco, model__in_chans=4), "as 4 bands: it has 3 channels, and 4 bands are read")
    refused(detect(coco, "--init", tmp_path / "none"), "none")
    spec = BackboneSpec(
        "xcit_nano_12_p8", 1, {"embed_dim": 16, "depth": 4, "num_heads": 2}, 32, 32, (0.5,), (0.5,)
    )
    save_backbone(tmp_path / "grey.safetensors", spec.build(), spec)
    grey = {"model__arch": "null", **none}
    code, error, run = detect(coco, "--init", tmp_path / "grey.safetensors", **grey)
    assert code == 0, error  # pictures are read as it takes them
    found = read_dense(run)
    assert (found.channels, found.mean) == (1, (0.5,))


def test_without_pycocotools_the_extra_is_named(detect, coco, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    refused(detect(coco), "pip install 'xdino[dense]'")


def test_a_step_without_room_is_refused(detect, coco, monkeypatch):
    monkeypatch.setattr(feasibility, "free_memory", lambda device: 100_000)
    refused(detect(coco), "steps of 2 images of up to 64 x 64 pixels take about")
