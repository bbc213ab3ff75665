"""Pictures with masks in ADE20K's own layout, made of garments on textures.

    python tests/benchmarks/made_ade20k.py FOLDER [--train 200] [--val 40] [--side 192] [--generic]

FOLDER/ADEChallengeData2016 then has the directories and names of the real data set, with garments of
the shipped sample of Fashion-MNIST pasted on stripes, checks and noise: label 1 is the ground, 2 to 11
are the ten kinds of garment, 0 ("other", which counts as void) a strip that nobody labelled. The other
names of objectInfo150.txt do not occur. --generic writes images/, masks/ and classes.txt instead.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from xdino.data import Source, open_splits

GROUND, FIRST, NAMES = 1, 2, 150
PARTS = {"training": ("train", "train"), "validation": ("val", "val")}


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Stripes, checks or noise in two colours: float64 [height, width, 3] in 0 to 255."""
    y, x = np.mgrid[:height, :width]
    period, angle = rng.uniform(6, 40), rng.uniform(0, np.pi)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    kind = rng.integers(3)
    if kind == 1:
        wave = np.sign(wave * np.sin((y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period))
    if kind == 2:
        wave = rng.normal(0, 0.6, (height, width))
    one, two = rng.uniform(0, 150, (2, 3))
    share = (wave[..., None] + 1) / 2
    return one * share + two * (1 - share) + rng.normal(0, 6, (height, width, 1))


def picture(garments: Source, rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, 3] and its labels uint8 [H, W], 0 where nobody labelled."""
    height, width = (int(side * rng.uniform(1, 1.4)) for _ in range(2))
    image = texture(rng, height, width)
    labels = np.full((height, width), GROUND, np.uint8)
    assert garments.labels is not None
    for _ in range(rng.integers(2, 6)):
        size = int(rng.integers(side // 4, side // 2))
        index = int(rng.integers(len(garments)))
        small = torch.from_numpy(garments.read(index)[..., 0]).float()[None, None] / 255
        large = F.interpolate(small, (size, size), mode="bilinear")[0, 0].numpy()
        top, left = (int(rng.integers(0, room - size)) for room in (height, width))
        shape = large > 0.1
        tint = rng.uniform(120, 255, 3)
        place = image[top : top + size, left : left + size]
        place[shape] = (0.35 + 0.65 * large[shape, None]) * tint
        labels[top : top + size, left : left + size][shape] = FIRST + garments.labels[index]
    if rng.random() < 0.3:
        labels[-height // 10 :] = 0
    return image.clip(0, 255).astype(np.uint8), labels


def write(folder: Path, train: int, val: int, side: int, generic: bool, seed: int = 0) -> None:
    for part, count, source in zip(
        PARTS, (train, val), open_splits("fashion_mnist_sample"), strict=True
    ):
        assert source.classes is not None
        split, short = PARTS[part]
        names = ["ground", *source.classes]
        root = folder if generic else folder / "ADEChallengeData2016"
        places = [
            root / top / (split if generic else part)
            for top in ("images", "masks" if generic else "annotations")
        ]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            rng = np.random.default_rng([seed, part == "training", number])
            image, labels = picture(source, rng, side)
            stem = f"ADE_{short}_{number:08}"
            Image.fromarray(image).save(places[0] / f"{stem}.jpg", quality=92)
            if generic:
                labels = np.where(labels == 0, 255, labels - 1).astype(np.uint8)
            Image.fromarray(labels).save(places[1] / f"{stem}.png")
    if generic:
        (folder / "classes.txt").write_text("\n".join(names) + "\n")
        return
    names += [f"absent {number}" for number in range(len(names) + 1, NAMES + 1)]
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{i}\t0.0\t0\t0\t0\t{name}" for i, name in enumerate(names, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--val", type=int, default=40)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--generic", action="store_true")
    given = parser.parse_args()
    write(given.folder, given.train, given.val, given.side, given.generic)
