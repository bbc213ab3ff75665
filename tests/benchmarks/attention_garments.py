"""Does the demo's class attention find the garments? Composites with known masks.

    python tests/benchmarks/attention_garments.py RUN [RUN ...] --out DIR [--images N] [--sizes 40,80,160]

RUN: a finished run of `xdino demo`, whose held-out images these are: garments at random places on
random textures, and as mask every pixel that a garment hides by half or more. Attention is scored by
`xdino segment-score`'s own functions, of the network before its first step and at the end, at several
sizes (a larger picture is a finer grid of patches). Beside them two answers that look at no network:
brightness, cut to the mass that attention is cut to, and a disc in the middle as large as a garment is
on average. Prints a table; DIR/attention_garments.json has every figure.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from attention_objects import brightness
from PIL import Image
from rich.table import Table

from xdino import data
from xdino.checkpoint import load_backbone
from xdino.data.idx import scattered as scattering
from xdino.run_directory import INITIAL_FILE
from xdino.runtime import rng
from xdino_eval.attention.segmentation import Pair, find_pairs, jaccard, read_mask, score
from xdino_launch.console import stdout_console

HALF = 0.5  # of the ground, hidden


def garment_masks(plain: np.ndarray, seed: int) -> np.ndarray:
    """bool [N, S, S]: where the garments of `scattered(plain, seed)` lie."""
    places, draws = np.arange(len(plain)), sum(scattering._DRAWS)
    raw = rng.raw_of_images(rng.Stream.SCATTERING, seed, 0, places, draws)
    place = torch.from_numpy((raw[:, :4] >> 40).astype(np.float32) / 2**24)
    placed = scattering._placed(torch.from_numpy(plain).float() / 255, place)
    return (placed / scattering._OPAQUE >= HALF).numpy()


def make_folder(folder: Path, count: int) -> list[Pair]:
    """The first `count` held-out images with their masks, as `xdino segment-score` reads them."""
    _, plain = data.open_splits("fashion_mnist_sample")
    _, shown = data.open_splits("fashion_mnist_scattered")
    garments = np.stack([plain.read(i)[..., 0] for i in range(count)])
    truths = garment_masks(garments, 1)  # the seed of val
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, truth in enumerate(truths):
        Image.fromarray(shown.read(i)[..., 0]).save(folder / "images" / f"{i:05}.png")
        Image.fromarray(truth.astype(np.uint8) * 255).save(folder / "masks" / f"{i:05}.png")
    return find_pairs(folder)


def middle(pairs: list[Pair]) -> float:
    """Per cent: the disc in the middle that has the mean area of a garment."""
    truths = [read_mask(pair.mask)[0] for pair in pairs]
    side = truths[0].shape[0]
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    away = np.sort(np.hypot(x, y).ravel())
    disc = np.hypot(x, y) <= away[round(float(np.mean([t.sum() for t in truths])))]
    return 100 * float(np.mean([jaccard(disc, truth) for truth in truths]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--sizes", default="40,80,160")
    arguments = parser.parse_args()
    folder = arguments.out / "garments"
    pairs = make_folder(folder, arguments.images)
    report = {"brightness": brightness(folder), "middle": middle(pairs), "runs": []}
    table = Table(title="Jaccard index in per cent: best head · mean map", title_justify="left")
    for head in ("run", "size", "layer", "untrained", "pretrained"):
        table.add_column(head)
    for run in arguments.runs:
        for size in map(int, arguments.sizes.split(",")):
            both = [
                {s.layer: s.summary() for s in score(load_backbone(path), pairs, size=size)[0]}
                for path in (run / INITIAL_FILE, run)
            ]
            for layer in both[0]:
                told = [
                    f"{found[layer]['jaccard best head']:.1f} · {found[layer]['jaccard mean map']:.1f}"
                    for found in both
                ]
                table.add_row(run.name, str(size), layer, *told)
            report["runs"].append({"run": run.name, "size": size, "scores": both})
    (arguments.out / "attention_garments.json").write_text(json.dumps(report, indent=1))
    stdout_console().print(table)
    print(f"brightness {report['brightness']:.1f} · a disc in the middle {report['middle']:.1f}")


if __name__ == "__main__":
    main()
