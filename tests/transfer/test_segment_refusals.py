"""What `xdino segment` refuses in a sentence before anything is written, and what it takes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xdino import checkpoint, config
from xdino.backbones import BackboneSpec
from xdino.plan import feasibility
from xdino_eval import results
from xdino_transfer.dense_files import read_dense
from xdino_transfer.dense_training.segmenting.plan import make_plan, rates_of
from xdino_transfer.dense_training.segmenting.recipe import Model, Segmentation, View
from xdino_transfer.segmentation.maps import VOC_CLASSES, open_maps

TINY = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": 16, "model.depth": 4, "model.num_heads": 2,
    "model.channels": 8, "view.crop": 32, "view.longer": 64, "view.shorter": 32,
    "train.batch_size": 4, "train.epochs": 1, "runtime.device": "cpu", "runtime.workers": 0,
    "runtime.report": "false", "train.precision": "fp32", "runtime.log_every": 1,
    "optim.warmup": 0,
}  # fmt: skip


def picture(path: Path, size: tuple[int, int] = (32, 40), **told: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.stem)).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, **told)


def mask(path: Path, size: tuple[int, int] = (32, 40), labels: tuple[int, ...] = (0, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.resize(np.repeat(np.array(labels, np.uint8), 7), size)
    Image.fromarray(values).save(path)


@pytest.fixture
def data(tmp_path) -> Path:
    root = tmp_path / "data"
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            picture(root / "images" / split / f"{number}.png")
            mask(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("sky\nground\n")
    return root


@pytest.fixture
def segment(xdino, tmp_path):
    """segment(data, key=value, ...) -> (exit code, what was said, the run's folder)."""

    def run(data: Path, *more: object, **keys: object) -> tuple[int, str, Path]:
        given = {**TINY, "data.path": data, **{k.replace("__", "."): v for k, v in keys.items()}}
        pairs = [word for key, value in given.items() for word in (f"--{key}", value)]
        code, _, error = xdino("segment", "segment_small", "--run", tmp_path / "run", *pairs, *more)
        return code, error, tmp_path / "run"

    return run


def refused(found: tuple[int, str, Path], sentence: str, code: int = 2) -> None:
    said, run = found[1], found[2]
    assert found[0] == code, said
    assert sentence in said
    assert "Traceback" not in said
    assert not run.exists()


# Data


def test_a_mask_of_another_size(data, segment):
    mask(data / "masks" / "train" / "3.png", (32, 41))
    found = segment(data)
    refused(found, "3.png has 41 x 32 pixels, and its picture 40 x 32 (upright)")
    assert "1 of the 8 pictures of train of" in found[1]
    assert "(data.max_bad_share allows 5.00%)" in found[1]


def test_labels_beyond_the_classes(data, segment):
    mask(data / "masks" / "val" / "1.png", labels=(0, 1, 7))
    refused(segment(data), "1.png has label 7, and the classes of val of")


def test_a_mask_of_colours_and_one_that_is_a_jpeg(data, segment):
    picture(data / "masks" / "train" / "2.png")
    refused(segment(data), "2.png is a picture of colours (RGB): a mask has one number a pixel")
    (data / "masks" / "train" / "2.png").unlink()
    mask(data / "masks" / "train" / "2.jpg")
    refused(segment(data), "2.jpg is a JPEG, which changes labels: masks are PNG files")


def test_one_class(data, segment):
    (data / "classes.txt").write_text("sky\n")
    refused(segment(data), "names 1 classes, and 2 to 255 can be told apart")
    (data / "classes.txt").write_text("sky\nground\n")
    for number in range(8):
        mask(data / "masks" / "train" / f"{number}.png", labels=(1, 255))
    found = segment(data)
    refused(found, "show only ground: there is nothing to tell apart (255 counts as none: number")


def test_folders_that_hold_nothing_or_too_much(data, segment, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        segment(tmp_path / "empty"), "holds no pictures with masks: expected images/ and masks/"
    )
    refused(segment(tmp_path / "nowhere"), "nowhere")
    refused(segment(""), "data.path is not set: name pictures with masks with --data.path FOLDER")
    for folder in ("JPEGImages", "SegmentationClass"):
        (data / folder).mkdir()
    refused(segment(data), "mixes layouts, so that it is unclear what to read")
    for folder in ("JPEGImages", "SegmentationClass"):
        (data / folder).rmdir()
    shutil.rmtree(data / "images" / "val")
    refused(segment(data), "there is no folder")
    (data / "images" / "val").mkdir()
    refused(segment(data), "holds no picture")
    (data / "classes.txt").unlink()
    refused(segment(data), "classes.txt cannot be read: No such file or directory")


def test_missing_files_beyond_the_share(data, segment):
    (data / "masks" / "train" / "5.png").unlink()
    found = segment(data)
    refused(found, "1 of the 8 pictures of train of")
    assert "5.png" in found[1]


def test_what_is_left_out_is_named_and_the_run_goes_on(data, segment):
    """A missing mask, one of another size and a damaged picture, all within the share."""
    (data / "masks" / "train" / "5.png").unlink()
    mask(data / "masks" / "train" / "3.png", (32, 41))
    (data / "images" / "train" / "6.png").write_bytes(b"no picture")
    mask(data / "masks" / "val" / "1.png", labels=(0, 1, 9))
    code, said, run = segment(data, data__max_bad_share=0.5, train__batch_size=3)
    assert code == 0, said
    row = results.load(run / "results.json")[-1]
    assert (row.val_size, "1 pictures could not be read" in row.notes[0]) == (1, True)
    assert "5.png; they are left out" in said
    assert "3.png has 41 x 32 pixels" in said
    rows = [json.loads(line) for line in (run / "unreadable.jsonl").read_text().splitlines()]
    assert sorted(Path(row["image"]).name for row in rows) == ["3.png", "6.png"]
    assert read_dense(run).facts["images"] == 7


def test_a_mask_that_is_spoilt_later_is_skipped_and_named(data, segment):
    code, said, run = segment(data, train__epochs=1)
    assert code == 0, said
    (data / "classes.txt").write_text("sky\nearth\n")
    (run / "model.safetensors").unlink()
    (run / "backbone.safetensors").unlink()
    code, said, _ = segment(data, train__epochs=1)
    assert (code, "was made with other classes than those of" in said) == (2, True), said
    (data / "classes.txt").write_text("sky\nground\n")
    assert segment(data, train__epochs=1)[0] == 0  # and writes them again
    for number in range(8):
        mask(data / "masks" / "train" / f"{number}.png", (32, 41))
    code, said, _ = segment(data, train__epochs=1)
    assert (code, "left alone" in said) == (2, False), said  # its masks are looked at first
    assert read_dense(run).facts["iteration"] == 2


def test_fewer_pictures_than_a_batch(data, segment):
    refused(segment(data, train__batch_size=9), "a batch takes 9 images")


def test_crops_that_memory_does_not_hold(data, segment, monkeypatch):
    monkeypatch.setattr(feasibility, "free_memory", lambda device: 10**9)
    found = segment(data, view__crop=2048, train__batch_size=8)
    refused(found, "steps of 8 crops of 2048 pixels take about")
    assert "lower view.crop" in found[1]


def test_checkpointed_steps_are_estimated_smaller(data):
    def step(**runtime: object) -> int:
        tree = {key: value for key, value in TINY.items() if not key.startswith("train.")}
        keys = {**tree, "view.crop": 64, "train.batch_size": 4, "data.path": str(data), **runtime}
        return make_plan(config.load("segment_small", keys, Segmentation)).step_bytes

    plain = step()
    assert step(**{"runtime.activation_checkpointing": "true"}) < 0.8 * plain
    assert step(**{"train.batch_size": 8}) > 1.5 * plain


# What is asked for


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"train__iterations": 5}, "both say how long the run is: set the other one null"),
        ({"train__epochs": "null"}, "neither train.epochs nor train.iterations"),
        ({"model__head": "linear_map"}, "reads a frozen backbone, and model.frozen is false"),
        ({"model__head": "semantic_fpm"}, "semantic_fpn"),
        ({"model__norm": "frozen"}, "and from scratch there are none"),
        ({"model__arch": "resnet18"}, "is no XCiT"),
        ({"model__patch_size": 4}, "a pyramid needs patches of 16 or 8 pixels"),
        ({"view__scale": "2,1"}, "view.scale must rise"),
        ({"view__mean": "0.5,0.5,0.5"}, "view.mean and view.std must be given together"),
        ({"view__mean": "0.5", "view__std": "0.5"}, "need one value a channel: 3, got 1 and 1"),
        ({"view__shorter": 65}, "more than view.longer"),
        ({"optim__warmup": 5}, "longer than the run of 2"),
        ({"optim__warmup": "ten"}, "a number of iterations, or a share of the run"),
        ({"data__range": "4095"}, "data.range takes black and white, 0,4095 say"),
        ({"model__in_chans": 4}, "as 4 bands: it has 3 channels, and 4 bands are read of all images"),
        ({"runtime__kernels": "fused"}, "is for pretraining"),
        ({"train__init": "/nowhere.pth"}, "/nowhere.pth"),
        ({"data__max_bad_share": 2}, "data.max_bad_share"),
    ],
)  # fmt: skip
def test_contradictions(data, segment, keys, sentence):
    if keys.get("model__arch") == "resnet18":
        keys = keys | {f"model__{key}": "null" for key in ("embed_dim", "depth", "num_heads")}
    refused(segment(data, **keys), sentence)


def test_weights_of_another_shape(data, segment, tmp_path):
    spec = BackboneSpec("xcit_nano_12_p8", shape={"embed_dim": 32, "depth": 4, "num_heads": 2})
    checkpoint.save_backbone(tmp_path / "w.safetensors", spec.build(), spec)
    found = segment(data, "--init", tmp_path / "w.safetensors")
    refused(found, "model.embed_dim reshapes a network from scratch, and train.init has its own")
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    refused(segment(data, "--init", tmp_path / "w.safetensors"), "w.safetensors", code=1)


# What it takes


def test_the_layouts_of_real_data_sets(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for part, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture(root / "images" / part / f"{stem}.jpg")
        mask(root / "annotations" / part / f"{stem}.png", labels=(0, 1, 150))
    names = [f"{i}\t0.1\t1\t1\t0\tname {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text(
        "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *names])
    )
    for split in ("train", "val"):
        picture(voc / "JPEGImages" / f"{split}.jpg")
        mask(voc / "SegmentationClass" / f"{split}.png", labels=(0, 20, 255))
        (voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{split}\n")
    for path, classes in ((root, 150), (tmp_path / "VOCdevkit", 21)):
        tree = Segmentation(
            model=Model(arch="xcit_nano_12_p16", embed_dim=16, depth=4, num_heads=2, channels=8),
            view=View(crop=32),
        )
        given = replace(
            tree,
            data=replace(tree.data, path=str(path)),
            train=replace(tree.train, batch_size=1),
            runtime=replace(tree.runtime, device="cpu"),
        )
        plan = make_plan(given)
        assert (len(plan.classes), plan.iterations, plan.steps_per_epoch) == (classes, 80_000, 1)
        image, labels = plan.train.annotated(0)
        assert (image.shape, labels.shape) == ((32, 40, 3), (32, 40))
        assert set(np.unique(labels)) == ({0, 149, 255} if classes == 150 else {0, 20, 255})
    assert plan.classes == VOC_CLASSES


def test_published_rates_and_groups():
    tree = Segmentation()
    assert (tree.optim.lr, tree.optim.weight_decay, tree.train.iterations) == (6e-5, 0.01, 80_000)
    rates = rates_of(tree, 80_000, 16)
    assert rates[1500] == pytest.approx(6e-5 * (1 - 1500 / 80_000))
    assert rates[0] == pytest.approx(6e-11)
    assert rates_of(tree, 80_000, 32)[1500] == pytest.approx(2 * rates[1500])


def test_gray_pictures_by_weights_of_one_channel(data, segment, tmp_path):
    spec = BackboneSpec(
        "xcit_nano_12_p8",
        1,
        {"embed_dim": 16, "depth": 4, "num_heads": 2},
        mean=(0.5,),
        std=(0.25,),
    )
    torch.manual_seed(0)
    checkpoint.save_backbone(tmp_path / "w.safetensors", spec.build(), spec, iteration=3)
    for number in range(8):
        path = data / "images" / "train" / f"{number}.png"
        Image.open(path).convert("L").save(path)
    code, said, run = segment(
        data,
        "--init",
        tmp_path / "w.safetensors",
        **{f"model__{key}": "null" for key in ("embed_dim", "depth", "num_heads")},
    )
    assert code == 0, said
    found = read_dense(run)
    assert (found.spec.in_chans, found.mean) == (1, (0.5,))
    assert found.facts["init"].endswith("w.safetensors")
    assert open_maps(str(data))[1].read(0)[0].shape == (32, 40, 3)


def test_a_linear_map_on_a_vision_transformer(data, segment):
    """Whole pictures of any size are shown in whole patches."""
    code, said, run = segment(
        data,
        model__arch="vit_tiny_patch16_224",
        **{f"model__{key}": "null" for key in ("embed_dim", "depth", "num_heads", "channels")},
        model__frozen="true",
        view__longer=50,
        train__iterations=1,
        train__epochs="null",
    )
    assert code == 0, said
    assert results.load(run / "results.json")[-1].val_size == 2
