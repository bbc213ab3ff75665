"""Does class attention find objects after a short pretraining? Made images, known answers.

    python tests/benchmarks/attention_objects.py --out DIR [--seeds 0,1,2] [--images 2000]

Each image is a bright object (an ellipse or a polygon of random place, size, angle and colour) on a
textured dark background whose statistics are the same in every image. (Where each background has a
colour of its own, the background tells images apart, and that is where attention went.) A small
XCiT is pretrained on half of the images by `xdino pretrain`, without the masks; attention is scored
on the other half by `xdino segment-score`'s own functions. Three arms a seed: the teacher before its
first step (`initial.safetensors`), the teacher at the end, and chance: the Jaccard index that the
same number of pixels has, laid anywhere. As a fourth, brightness itself, thresholded to the same
mass as attention is: the answer is easy to see.

Prints a table; DIR/attention_objects.json has every figure, DIR/seed0/pictures a few to look at.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xdino.checkpoint import load_backbone
from xdino.run_directory import INITIAL_FILE
from xdino_eval.attention import figures
from xdino_eval.attention.maps import class_attention_maps, mask
from xdino_eval.attention.segmentation import Scores, find_pairs, jaccard, read_mask, score

SIDE = 32  # pixels
SETTINGS = {
    "model.arch": "xcit_nano_12_p4",
    "model.embed_dim": "64",
    "model.depth": "2",
    "model.num_heads": "4",
    "model.tokens_norm": "true",
    "model.drop_path": "0",
    "head.prototypes": "512",
    "head.hidden_dim": "128",
    "head.bottleneck_dim": "32",
    "head.use_bn": "true",
    "crops.global_size": str(SIDE),
    "crops.global_scale": "[0.6,1.0]",
    "crops.global_blur": "[0.0,0.0]",
    "crops.global_solarize": "[0.0,0.0]",
    "crops.local_size": "16",
    "crops.local_count": "2",
    "crops.local_scale": "[0.25,0.6]",
    "crops.local_blur": "0.0",
    "teacher.momentum": "0.99",
    "optim.lr": "8.0e-3",
    "optim.warmup_epochs": "5%",
    "optim.weight_decay_end": "0.04",
    "optim.freeze_last_layer": "0",
    "train.batch_size": "32",
    "evaluate.every": "0",
    "evaluate.resize": str(SIDE),
    "runtime.workers": "1",
    "runtime.log_every": "20",
}


def make_image(rng: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [side, side, 3] and bool [side, side]: an object of 5 to 35 % of the image, on texture."""
    while True:
        truth = _shape(rng, side)
        if 0.05 <= truth.mean() <= 0.35:
            break
    background = 60 + _texture(rng, side) * 25 + rng.normal(0, 20, (side, side, 3))
    colour = rng.uniform(110, 255, 3)
    colour *= rng.uniform(180, 250) / colour.max()
    thing = colour + rng.normal(0, 12, (side, side, 1))
    return np.clip(np.where(truth[..., None], thing, background), 0, 255).astype(np.uint8), truth


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise, about -1..1, float [side, side, 1]."""
    coarse = Image.fromarray(rng.normal(0, 0.7, (8, 8)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))[..., None]


def _shape(rng: np.random.Generator, side: int) -> np.ndarray:
    """bool [side, side]: an ellipse, or a polygon of 3 to 7 corners, wholly inside."""
    big = 4 * side  # drawn large and thresholded: edges without steps of their own
    canvas = Image.new("L", (big, big))
    radius = rng.uniform(0.12, 0.34, 2) * big
    turn, corners = rng.uniform(0, 2 * math.pi), int(rng.integers(3, 8))
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    if rng.random() < 0.5:
        angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    x, y = radius[0] * np.cos(angles), radius[1] * np.sin(angles)
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    reach = max(np.abs(x).max(), np.abs(y).max())
    centre = rng.uniform(reach, big - reach, 2)
    points = np.stack((x + centre[0], y + centre[1]), 1)
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=255)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX)) > 127


def make_folder(folder: Path, count: int, seed: int, side: int = SIDE) -> Path:
    """`count` images and masks in the layout of `xdino segment-score`."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, truth = make_image(rng, side)
        Image.fromarray(image).save(folder / "images" / f"{i:05}.png")
        Image.fromarray(truth.astype(np.uint8) * 255).save(folder / "masks" / f"{i:05}.png")
    return folder


def pretrain(data: Path, run: Path, epochs: int, seed: int) -> None:
    """The command, as a person would start it."""
    command = [sys.executable, "-m", "xdino_launch", "pretrain", "debug", "--run", str(run)]
    settings = SETTINGS | {"data.path": str(data), "train.epochs": str(epochs)}
    settings |= {"train.seed": str(seed), "crops.mean": "null", "crops.std": "null"}
    for key, value in settings.items():
        command += [f"--{key}", value]
    subprocess.run(command, check=True)


def brightness(folder: Path) -> float:
    """Per cent: the brightest pixels that hold 60 % of the image's light above its darkest."""
    found = []
    for pair in find_pairs(folder):
        truth, _ = read_mask(pair.mask)
        grey = np.asarray(Image.open(pair.image).convert("L"), np.float32)
        found.append(jaccard(mask(grey - grey.min(), None, *truth.shape), truth))
    return 100 * float(np.mean(found))


def summaries(scores: list[Scores]) -> dict[str, dict[str, float]]:
    return {one.layer: one.summary() for one in scores}


def draw(backbone, folder: Path, out: Path, count: int = 12) -> None:
    """A sheet of the first images: image, last layer's mean map, its mask."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in find_pairs(folder)[:count]:
        image = np.asarray(Image.open(pair.image))
        maps = class_attention_maps(backbone, image, SIDE)
        tiles = [image]
        for heads in maps.layers:
            one = figures.view(heads.mean(0), image, maps.lattice)
            tiles += [one.heat, figures.dimmed(image, one.mask)]
        rows.append((pair.name, tiles))
    list(figures.folder_sheets(rows, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--images", type=int, default=2000, help="Half to learn on, half to score.")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    half = arguments.images // 2
    report = {}
    for seed in map(int, arguments.seeds.split(",")):
        place = arguments.out / f"seed{seed}"
        train = make_folder(place / "train", half, 2 * seed)
        held = make_folder(place / "held", half, 2 * seed + 1)
        began = time.monotonic()
        pretrain(train / "images", place / "run", arguments.epochs, seed)
        seconds = time.monotonic() - began
        one = {"seconds": round(seconds), "brightness": brightness(held)}
        for name, path in (
            ("untrained", place / "run" / INITIAL_FILE),
            ("pretrained", place / "run"),
        ):
            backbone = load_backbone(path)
            one[name] = summaries(score(backbone, find_pairs(held), size=SIDE)[0])
            draw(backbone, held, place / "pictures" / name)
        report[seed] = one
        print(f"seed {seed}: {seconds:.0f} s of pretraining; brightness {one['brightness']:.1f}")
        for name in ("untrained", "pretrained"):
            for layer, values in one[name].items():
                told = ", ".join(f"{k.removeprefix('jaccard ')} {v:.1f}" for k, v in values.items())
                print(f"  {name}, {layer}: {told}", flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "attention_objects.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
