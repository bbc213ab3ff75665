"""What every rank reads of an epoch, worked out in one process from the index alone: no image is there.

    python tests/benchmarks/read_plans.py [--shards 1000 --images 1281 --ranks 64 --batch 16 --epochs 3]

The loader's own `indices_at` is asked, for every rank and step. Sizes are drawn log-normal around
ImageNet's mean of 110 kB, as wide as they are told (`--spread`, standard deviation over mean).
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xdino.augment import multi_crop
from xdino.data import CropLoader
from xdino.data.source import Source

MEAN = 110_000  # bytes


class Shards(Source):
    """An index: so many tars of so many images, and the size of each image in bytes."""

    def __init__(self, shards: int, images: int, spread: float, seed: int = 0) -> None:
        super().__init__(f"{shards} shards", 3)
        self.images = images
        width = np.sqrt(np.log(1 + spread**2))
        drawn = np.random.default_rng(seed).lognormal(-(width**2) / 2, width, shards * images)
        self.sizes = (MEAN * drawn).astype(np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int) -> np.ndarray:
        raise AssertionError("a plan reads nothing")

    def describe(self, index: int) -> str:
        return f"shard {index // self.images}, image {index % self.images}"

    def _content(self) -> Iterator[bytes]:
        yield self.sizes.tobytes()


@dataclass(frozen=True)
class Read:
    """Of one epoch. times: how often each image is read [N]; bytes_: of each rank [R]; shards: that a
    rank touches in an epoch, on average, and in a step."""

    times: np.ndarray
    bytes_: np.ndarray
    shards: float
    shards_a_step: float

    @property
    def off(self) -> float:
        """How far the rank that is farthest from the mean is, as a share of it."""
        return float(np.abs(self.bytes_ / self.bytes_.mean() - 1).max())


def read(source: Shards, ranks: int, batch: int, epoch: int, seed: int = 0) -> Read:
    """What the ranks read in `epoch`, by the loader's own plan."""
    times = np.zeros(len(source), np.int64)
    bytes_, shards, of_steps = np.zeros(ranks), 0, []
    crops = multi_crop()
    for rank in range(ranks):
        loader = CropLoader(source, crops, batch, seed, rank=rank, world_size=ranks, workers=0)
        steps = loader.steps_per_epoch
        own = [loader.indices_at(epoch * steps + step, 0)[1] for step in range(steps)]
        found = np.concatenate(own)
        times += np.bincount(found, minlength=len(source))
        bytes_[rank] = source.sizes[found].sum()
        shards += len(np.unique(found // source.images))
        of_steps += [len(np.unique(each // source.images)) for each in own[:50]]
    return Read(times, bytes_, shards / ranks, float(np.mean(of_steps)))


def main() -> None:
    options = argparse.ArgumentParser()
    for name, value in (("shards", 1000), ("images", 1281), ("ranks", 64), ("batch", 16)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--spread", type=float, nargs="*", default=[0.25, 0.5, 1.0])
    told = options.parse_args()
    for spread in told.spread:
        source = Shards(told.shards, told.images, spread)
        total = np.zeros(told.ranks)
        for epoch in range(told.epochs):
            began = time.process_time()
            found = read(source, told.ranks, told.batch, epoch)
            total += found.bytes_
            left = int((found.times == 0).sum())
            print(
                f"spread {spread:g}, epoch {epoch}: {len(source):,} images, read twice "
                f"{int((found.times > 1).sum())}, not at all {left:,} (the epoch's rest, below one "
                f"batch of {told.ranks * told.batch:,}); bytes of a rank {found.bytes_.mean() / 1e9:.3f} "
                f"GB, {100 * found.off:.2f} % off at most; shards of a rank {found.shards:.0f}, of a step "
                f"{found.shards_a_step:.1f} of {told.batch} images; {time.process_time() - began:.1f} s"
            )
        off = np.abs(total / total.mean() - 1).max()
        print(f"spread {spread:g}, all {told.epochs} epochs: {100 * off:.2f} % off at most")


if __name__ == "__main__":
    main()
