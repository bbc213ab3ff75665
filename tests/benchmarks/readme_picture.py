"""The picture that opens the README: what goes in, and what attention comes out of the demo.

    xdino demo --run RUN
    python tests/benchmarks/readme_picture.py RUN [--out docs/picture.png]

Above, a photograph beside the crops that the published augmentation cuts from it. Below, images of the
Fashion-MNIST sample that ships with the package, held out from the demo's training, and the attention of
the demo's network laid over them, before its first step and at its end. Nothing is chosen by how it
looks: the first held-out image of each class, the crops of the first image of the first epoch at seed 0.

The photograph is scikit-learn's china.jpg (danielbuechele, CC BY 2.0,
https://www.flickr.com/photos/danielbuechele/6061409035); Fashion-MNIST is under the MIT licence.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from xdino import data
from xdino.augment import boxes, crop, draw_batch, multi_crop
from xdino.augment.photometric import photometric
from xdino.augment.picture import save_views
from xdino.checkpoint import load_backbone
from xdino.run_directory import INITIAL_FILE
from xdino_eval import sheets
from xdino_eval.attention import captions, class_attention_maps, figures
from xdino_eval.attention.colours import Scale
from xdino_eval.attention.sizes import shown
from xdino_eval.sheets import Tile

SIDE = 122  # pixels of an image of Fashion-MNIST


def views() -> np.ndarray:
    """uint8 [H, W, 3]: the photograph and its crops, as views.png shows them."""
    image, crops = np.array(load_sample_image("china.jpg")), multi_crop()
    table = draw_batch(crops, 0, 0, np.arange(1))
    places = boxes(table, *image.shape[:2], crops.ratio)[:, 0]
    groups, first = [], 0
    for size, count in crops.groups:
        rows = slice(first, first + count)
        cut = np.stack([crop(image, place, size) for place in places[rows]])
        seen = photometric(torch.from_numpy(cut), table[rows, 0], crops)
        groups.append(seen.unflatten(0, (count, 1)))
        first += count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "views.png"
        save_views(path, groups, crops.mean, crops.std, lambda _: image, table, crops.ratio)
        return np.asarray(Image.open(path))[:, 8:-8]


def accuracies(run: Path) -> str:
    """What the demo's results say of the two networks, where it has been scored."""
    if not (run / "results.json").is_file():
        return ""
    rows = json.loads((run / "results.json").read_text())
    first = rows[: len(rows) // 2]  # of the images that it was pretrained on; then the plain ones
    found = {row["features"]: row["top1"] for row in first if row["protocol"].startswith("k-NN")}
    (before, after) = (
        next(top1 for name, top1 in found.items() if name.startswith(start))
        for start in ("untrained", "teacher")
    )
    return f" k-NN of {rows[0]['val_size']:,} held-out ones: {before:.1f} %, then {after:.1f} %."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/picture.png"))
    arguments = parser.parse_args()
    after = load_backbone(arguments.run)
    before = load_backbone(arguments.run / INITIAL_FILE)
    whose, network = captions.weights(after).split(" · ", 1)
    _, val = data.open_splits("fashion_mnist_scattered")
    labels = np.asarray(val.labels)
    images = [val.read(int(np.flatnonzero(labels == k)[0])) for k in range(len(val.classes or ()))]
    maps = {
        backbone: [
            class_attention_maps(backbone, image, shown(backbone, image.shape).shorter)
            for image in images
        ]
        for backbone in (before, after)
    }
    scale = Scale.of(one.layers[-1].mean(0) for one in maps[after])
    photographs = [figures.fitted(image, SIDE, SIDE) for image in images]
    overlays = {
        backbone: [
            figures.view(one.layers[-1].mean(0), photograph, one.lattice, scale=scale).overlay
            for one, photograph in zip(found, photographs, strict=True)
        ]
        for backbone, found in maps.items()
    }
    whose, network = captions.weights(after).split(" · ")
    tiles = [
        Tile(
            [views()], "What a student learns from: 2 + 8 crops of an image, their colours changed"
        ),
        Tile(photographs, "What it never saw: the first held-out image of each class"),
        Tile(overlays[before], "What an untrained network attends to: every patch alike"),
        Tile(overlays[after], f"The same, pretrained by `xdino demo` ({whose.partition(', ')[2]})"),
    ]
    lines = [
        f"{network}; {figures.told_map(maps[after][0])}; "
        f"{captions.inputs(after, [shown(after, image.shape) for image in images])}."
        + accuracies(arguments.run),
        "Photograph: danielbuechele, CC BY 2.0. Others: Fashion-MNIST, MIT licence.",
    ]
    whole = sheets.sheet(tiles, 1)
    sheets.save(sheets.captioned(whole, lines, captions.bar(scale)), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
