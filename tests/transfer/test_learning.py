"""The published detector and segmenter learn: 16 made pictures by heart, on one thread.

Slow: minutes. The thresholds are those that the same pictures reached with room to spare.
"""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from xdino.data import open_splits
from xdino.xcit import XCiT
from xdino_eval import results
from xdino_transfer import rates
from xdino_transfer.detection import detector
from xdino_transfer.detection.average_precision import results_of, score
from xdino_transfer.detection.matching import Sampler
from xdino_transfer.detection.objects import Objects, Shown
from xdino_transfer.detection.outlines import encoded
from xdino_transfer.detection.roi import RegionSettings
from xdino_transfer.detection.rpn import Kept, RPNSettings
from xdino_transfer.pyramid import Pyramid

SIDE, CLASSES, PICTURES, BATCH = 128, 3, 16, 4
# Fewer anchors, proposals and regions than published, for pictures of a few objects: a quarter the time.
PROPOSALS = RPNSettings(sampler=Sampler(64, 0.5), train=Kept(200, 100), test=Kept(200, 100))
REGIONS = RegionSettings(sampler=Sampler(64, 0.25))


@pytest.fixture(scope="module")
def composites():
    """Garments on noise: images [N, 3, 128, 128], their objects, and labels a pixel [N, 128, 128]."""
    garments, _ = open_splits("fashion_mnist_sample")
    rng = np.random.default_rng(0)
    kinds = [np.flatnonzero(garments.labels == label) for label in (1, 7, 8)]  # trouser, shoe, bag
    images, objects = [], []
    labels = np.zeros((PICTURES, SIDE, SIDE), np.uint8)
    for number in range(PICTURES):
        canvas = torch.from_numpy(rng.normal(0, 0.3, (3, SIDE, SIDE)).astype(np.float32))
        masks, classes = [], []
        for _ in range(rng.integers(2, 4)):
            label, side = int(rng.integers(CLASSES)), int(rng.integers(36, 60))
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
        objects.append(_objects(masks, classes))
    return torch.stack(images), objects, torch.from_numpy(labels)


def _objects(masks, classes):
    boxes = []
    for mask in masks:
        rows, columns = torch.where(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    found = torch.tensor(boxes, dtype=torch.float32)
    return Objects(found, torch.tensor(classes), torch.stack(masks).to(torch.uint8))


def learned(model, losses, steps, lr):
    """Train on random batches; `losses` of the pictures' numbers."""
    optimiser = torch.optim.AdamW(rates.only_norms(model, 0.05), lr=lr)
    schedule = rates.poly(steps, lr, warmup=20, warmup_ratio=0.001)
    rng = np.random.default_rng(1)
    model.train()
    for rate in schedule:
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = losses(rng.choice(PICTURES, BATCH, replace=False).tolist())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def pyramid():
    torch.manual_seed(0)
    return Pyramid(XCiT(8, 64, 4, 4))


@pytest.mark.slow
def test_a_detector_learns(composites):
    images, objects, _ = composites
    shown = [Shown((SIDE, SIDE), (SIDE, SIDE))]
    model = detector.build(pyramid(), CLASSES, detector.Shape(64, 128, 64), PROPOSALS, REGIONS)

    def losses(numbers):
        found = model.losses(images[numbers], shown * BATCH, [objects[i] for i in numbers])
        return torch.stack([*found.values()]).sum()

    learned(model, losses, 350, 1e-3)
    truth, results = {"images": [], "annotations": [], "categories": []}, []
    truth["categories"] = [{"id": k, "name": str(k)} for k in range(CLASSES)]
    for number, own in enumerate(objects):
        truth["images"].append({"id": number, "height": SIDE, "width": SIDE})
        for box, label, mask in zip(
            own.boxes.tolist(), own.labels.tolist(), own.masks, strict=True
        ):
            left, top, right, bottom = box
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encoded(mask.numpy()),
                }
            )
        (found,) = model(images[number : number + 1], shown)
        results += results_of(number, found, range(CLASSES))
    box, mask = (score(truth, results, kind).values for kind in ("box", "mask"))
    print({"box AP": box["AP"], "mask AP": mask["AP"], "mask AP50": mask["AP50"]})
    assert box["AP"] >= 0.65
    assert mask["AP50"] >= 0.75


@pytest.mark.slow
def test_a_segmenter_learns(composites, tmp_path, xdino):
    """Through the command, from a folder of pictures and masks that scores it, too."""
    images, _, labels = composites
    for split in ("train", "val"):
        for number, (image, wanted) in enumerate(zip(images, labels, strict=True)):
            pixels = ((image.clamp(-1, 3) + 1) / 4 * 255).byte().permute(1, 2, 0)
            for folder, shown in (("images", pixels), ("masks", wanted)):
                (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(shown.numpy()).save(tmp_path / folder / split / f"{number}.png")
    (tmp_path / "classes.txt").write_text("ground\ntrouser\nsneaker\nbag\n")
    keys = {
        "data.path": tmp_path, "model.arch": "xcit_nano_12_p8", "model.embed_dim": 48,
        "model.depth": 4, "model.num_heads": 4, "model.channels": 32, "model.dropout": 0,
        "view.crop": SIDE, "view.longer": SIDE, "view.shorter": SIDE, "view.scale": "1,1",
        "view.flip": 0, "view.colour": "false", "optim.lr": 0.04, "optim.warmup": 20,
        "train.batch_size": BATCH, "train.epochs": "null", "train.iterations": 280,
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
    assert row.metrics["mIoU"] >= 70
