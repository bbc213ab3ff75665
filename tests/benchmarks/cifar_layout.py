"""CIFAR-10's binary archive, file for file and byte for byte its layout, made of photographs.

    python tests/benchmarks/cifar_layout.py FOLDER OUT [--seed 0]

FOLDER holds train/ and val/ with a folder of pictures a class (`learning_data.py tiles`). Its first ten
classes give 5,000 and 1,000 squares each, at random places and of random sides, reduced to 32 pixels;
val/ becomes the test batch, so that no picture is on both sides.
"""

from pathlib import Path

import click
import numpy as np
from PIL import Image

SIDE, CLASSES, BATCHES, BATCH = 32, 10, 5, 10_000


def squares(folder: Path, count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, 3, 32, 32] out of a folder's pictures."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    found = np.empty((count, 3, SIDE, SIDE), np.uint8)
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = int(rng.integers(SIDE, min(picture.size) + 1))
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
        square = picture.resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
        )
        found[number] = np.asarray(square).transpose(2, 0, 1)
    return found


def records(folder: Path, names: list[str], count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, 1 + 3,072] in random order: the label, then red, green and blue."""
    rows = []
    for label, name in enumerate(names):
        pixels = squares(folder / name, count // len(names), rng).reshape(count // len(names), -1)
        rows.append(np.hstack([np.full((len(pixels), 1), label, np.uint8), pixels]))
    return np.concatenate(rows)[rng.permutation(count)]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, out: Path, seed: int) -> None:
    names = sorted(path.name for path in (folder / "train").iterdir())[:CLASSES]
    rng = np.random.default_rng(seed)
    archive = out / "cifar-10-batches-bin"
    archive.mkdir(parents=True)
    train = records(folder / "train", names, BATCHES * BATCH, rng)
    for number, batch in enumerate(np.split(train, BATCHES), start=1):
        (archive / f"data_batch_{number}.bin").write_bytes(batch.tobytes())
    (archive / "test_batch.bin").write_bytes(records(folder / "val", names, BATCH, rng).tobytes())
    (archive / "batches.meta.txt").write_text("".join(f"{name}\n" for name in names) + "\n")


if __name__ == "__main__":
    main()
