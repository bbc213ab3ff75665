"""A few small pictures of noise with masks, with boxes, and in class folders."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("sky", "sea", "sand")


def annotated(root: Path, names: tuple[str, ...] = NAMES) -> None:
    """maps/ with images/ and masks/, boxes/ in COCO's layout, classes/ with class folders."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(3 if split == "val" else 2):
            labels = np.full((40, 56), 255, np.uint8)
            labels[:20], labels[20:, :28] = 0, i % len(names)
            pixels = rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)
            for folder, array in (("images", pixels), ("masks", labels)):
                path = root / "maps" / folder / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
            path = root / "classes" / split / names[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        folder = root / "boxes" / f"{split}2017"
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "0.png")
        tree = {
            "images": [{"id": 4, "height": 40, "width": 56, "file_name": "0.png"}],
            "annotations": [
                {"id": 1, "image_id": 4, "category_id": 7, "bbox": [4, 4, 20, 16], "iscrowd": 0}
            ],
            "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        }
        (root / "boxes" / "annotations").mkdir(exist_ok=True)
        (root / "boxes" / "annotations" / f"instances_{split}2017.json").write_text(
            json.dumps(tree)
        )
    (root / "maps" / "classes.txt").write_text("\n".join(names))
