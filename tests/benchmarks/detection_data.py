"""Annotated pictures in COCO's layout, made of what is shipped: garments pasted on textures.

    python tests/benchmarks/detection_data.py COCO [--train 200] [--val 50] [--sides 240,320]

COCO/annotations/instances_train2017.json, COCO/train2017/000000000001.jpg and so on, as the real data
set has them: category numbers with gaps, masks as runs of pixels,
pictures upright and across. Every garment is told with its box and its mask; a later one may cover an
earlier one, whose mask is then without what is covered. Train and val show other garments.

The garments are Fashion-MNIST's (MIT), the textures smooth noise. Equal arguments give equal files.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from xdino.data import open_splits

#: Fashion-MNIST's label -> COCO's kind of number, with gaps, and a name.
KINDS = {1: (3, "trouser"), 5: (7, "sandal"), 8: (90, "bag")}


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth coloured noise, uint8 [H, W, 3], not brighter than the middle."""
    layers = np.zeros((height, width, 3))
    for cells in (4, 16, 48):
        coarse = rng.uniform(0, 130, (cells, cells, 3)).astype(np.uint8)
        layers += np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
    return (layers / 3).astype(np.uint8)


def paste(rng, canvas: np.ndarray, garment: np.ndarray, largest: float) -> np.ndarray:
    """Lay a garment uint8 [28, 28] on the canvas, in a colour of its own; its mask bool [H, W]."""
    H, W = canvas.shape[:2]
    side = int(rng.uniform(0.25, largest) * min(H, W))
    large = np.asarray(Image.fromarray(garment).resize((side, side), Image.Resampling.BICUBIC))
    top, left = (int(rng.integers(0, free - side + 1)) for free in (H, W))
    colour = rng.uniform(0.5, 1, 3)
    place = canvas[top : top + side, left : left + side]
    inside = large > 40
    place[inside] = (large[inside][:, None] * colour).clip(30, 255).astype(np.uint8)
    mask = np.zeros((H, W), bool)
    mask[top : top + side, left : left + side] = inside
    return mask


def runs(mask: np.ndarray) -> dict:
    """COCO's list of runs, column by column, beginning with those that are not inside."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0))
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [*mask.shape], "counts": counts}


def box_of(mask: np.ndarray) -> list[float]:
    """COCO's left, top, width and height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def picture(
    rng, garments, height: int, width: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """uint8 [H, W, 3], and (label, mask) of each garment that can still be seen."""
    canvas, found = texture(rng, height, width), []
    for _ in range(rng.integers(1, 4)):
        label = int(rng.choice([*KINDS]))
        numbers = np.flatnonzero(garments.labels == label)
        garment = garments.read(int(rng.choice(numbers)))[..., 0]
        mask = paste(rng, canvas, garment, 0.6)
        found = [(kind, seen & ~mask) for kind, seen in found]
        found.append((label, mask))
    return canvas, [(label, mask) for label, mask in found if mask.sum() >= 40]


def split(root: Path, name: str, count: int, garments, sides: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        shape = sides if number % 3 else sides[::-1]  # a third stands upright
        pixels, objects = picture(rng, garments, *shape)
        file = f"{number:012}.jpg"
        Image.fromarray(pixels).save(folder / file, quality=92)
        images.append({"id": number, "file_name": file, "height": shape[0], "width": shape[1]})
        for label, mask in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": KINDS[label][0],
                    "bbox": box_of(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": runs(mask),
                }
            )
    categories = [
        {"id": n, "name": called, "supercategory": "garment"} for n, called in KINDS.values()
    ]
    told = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))


def make(root: Path, train: int = 200, val: int = 50, sides: tuple[int, int] = (240, 320)) -> Path:
    """The set below `root`; sides: of most pictures, height and width."""
    for name, count, garments, seed in zip(
        ("train2017", "val2017"),
        (train, val),
        open_splits("fashion_mnist_sample"),
        (0, 1),
        strict=True,
    ):
        split(root, name, count, garments, sides, seed)
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--val", type=int, default=50)
    parser.add_argument("--sides", default="240,320")
    given = parser.parse_args()
    height, width = map(int, given.sides.split(","))
    print(make(given.root, given.train, given.val, (height, width)))
