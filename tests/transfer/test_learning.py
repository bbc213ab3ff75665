"""The published detector and segmenter learn: 16 made pictures by heart, on one thread.

Slow: minutes. The thresholds are those that the same pictures reached with room to spare.
"""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from xdino.data import open_splits
from xdino_eval import results

SIDE, CLASSES, PICTURES, BATCH = 128, 3, 16, 4


@pytest.fixture(scope="module")
def composites():
    """Garments on noise: images [N, 3, 128, 128], of each its masks and their labels, and labels a pixel
    [N, 128, 128]."""
    garments, _ = open_splits("fashion_mnist_sample")
    rng = np.random.default_rng(0)
    kinds = [np.flatnonzero(garments.labels == label) for label in (1, 7, 8)]  # trouser, shoe, bag
    images, objects = [], []
    labels = np.zeros((PICTURES, SIDE, SIDE), np.uint8)
    for number in range(PICTURES):
        canvas = torch.from_numpy(rng.normal(0, 0.3, (3, SIDE, SIDE)).astype(np.float32))
        masks, classes = [], []
        # Two or three, of different classes: one that is rare is learned late, and by luck.
        for label in rng.permutation(CLASSES)[: rng.integers(2, 4)].tolist():
            side = int(rng.integers(36, 60))
            garment = garments.read(int(rng.choice(kinds[label])))[..., 0]
            small = torch.from_numpy(garment).float()[None, None] / 255
            large = F.interpolate(small, (side, side), mode="bilinear")[0, 0]
            y, x = rng.integers(0, SIDE - side, 2)
            mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
            mask[y : y + side, x : x + side] = large > 0.1
            if not mask.any() or any((mask & other).any() for other in masks):
                continue
            place = canvas[:, y : y + side, x : x + side]
            place[:, large > 0.1] = 1 + 2 * large[large > 0.1]
            masks.append(mask)
            classes.append(label)
            labels[number][mask.numpy()] = label + 1
        images.append(canvas)
        objects.append([(mask.numpy(), label) for mask, label in zip(masks, classes, strict=True)])
    return torch.stack(images), objects, torch.from_numpy(labels)


def as_pixels(image):
    """[3, H, W] -> uint8 [H, W, 3]."""
    return ((image.clamp(-1, 3) + 1) / 4 * 255).byte().permute(1, 2, 0).numpy()


@pytest.mark.slow
def test_a_detector_learns(composites, tmp_path, xdino, detection_data):
    """Through the command, from a file of COCO's kind that scores it, too."""
    images, objects, _ = composites
    rows = [
        {
            "image_id": number, "category_id": label, "bbox": detection_data.box_of(mask),
            "area": int(mask.sum()), "segmentation": detection_data.runs(mask),
        }
        for number, own in enumerate(objects)
        for mask, label in own
    ]  # fmt: skip
    side = {"height": SIDE, "width": SIDE}
    tree = {
        "images": [{"id": n, "file_name": f"{n}.png", **side} for n in range(PICTURES)],
        "annotations": [{"id": n, "iscrowd": 0, **row} for n, row in enumerate(rows)],
        "categories": [{"id": k, "name": str(k)} for k in range(CLASSES)],
    }
    (tmp_path / "told.json").write_text(json.dumps(tree))
    for number, image in enumerate(images):
        Image.fromarray(as_pixels(image)).save(tmp_path / f"{number}.png")
    # Fewer anchors, proposals and regions than published, for pictures of a few objects.
    keys = {
        "data.train_json": tmp_path / "told.json", "data.train_images": tmp_path,
        "data.val_json": tmp_path / "told.json", "data.val_images": tmp_path,
        "model.arch": "xcit_nano_12_p8", "model.embed_dim": 64, "model.depth": 4, "model.num_heads": 4,
        "heads.width": 64, "heads.hidden": 128, "heads.mask_width": 64, "heads.anchors": 64,
        "heads.candidates": 200, "heads.proposals": 100, "heads.regions": 64, "view.sides": SIDE,
        "view.longer": SIDE, "view.crop_chance": 0, "view.flip": 0, "view.test_side": SIDE,
        "optim.lr": 4e-3, "optim.warmup": 20, "train.batch_size": BATCH, "train.epochs": 40,
        "train.precision": "fp32", "evaluate.every": 0, "runtime.device": "cpu", "runtime.workers": 1,
        "runtime.report": "false", "runtime.log_every": 100,
    }  # fmt: skip
    run = tmp_path / "run"
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    began = time.process_time()
    code, _, error = xdino("detect", "detect_small", "--run", run, *words)
    assert code == 0, error
    (row,) = results.load(run / "results.json")
    told = {name: row.metrics[name] for name in ("box AP", "mask AP", "mask AP50")}
    print({**told, "CPU seconds": round(time.process_time() - began, 1)})
    assert row.metrics["box AP"] >= 65
    assert row.metrics["mask AP50"] >= 75


@pytest.mark.slow
def test_a_segmenter_learns(composites, tmp_path, xdino):
    """Through the command, from a folder of pictures and masks that scores it, too."""
    images, _, labels = composites
    for split in ("train", "val"):
        for number, (image, wanted) in enumerate(zip(images, labels, strict=True)):
            for folder, shown in (("images", as_pixels(image)), ("masks", wanted.numpy())):
                (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(shown).save(tmp_path / folder / split / f"{number}.png")
    (tmp_path / "classes.txt").write_text("ground\ntrouser\nsneaker\nbag\n")
    keys = {
        "data.path": tmp_path, "model.arch": "xcit_nano_12_p8", "model.embed_dim": 48,
        "model.depth": 4, "model.num_heads": 4, "model.channels": 32, "model.dropout": 0,
        "view.crop": SIDE, "view.longer": SIDE, "view.shorter": SIDE, "view.scale": "1,1",
        "view.flip": 0, "view.colour": "false", "optim.lr": 0.03, "optim.warmup": 20,
        "train.batch_size": BATCH, "train.epochs": "null", "train.iterations": 300, "optim.clip_grad": 1,
        "train.precision": "fp32", "evaluate.every": 0, "runtime.device": "cpu", "runtime.workers": 1,
        "runtime.report": "false", "runtime.log_every": 100,
    }  # fmt: skip
    run = tmp_path / "run"
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    began = time.process_time()
    code, _, error = xdino("segment", "segment_small", "--run", run, *words)
    assert code == 0, error
    (row,) = results.load(run / "results.json")
    print({"mIoU": row.metrics["mIoU"], "CPU seconds": round(time.process_time() - began, 1)})
    assert row.metrics["mIoU"] >= 80
