"""What ranks read of an epoch: every image once, no rank much more than the others."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from read_plans import Shards, read


@pytest.mark.parametrize(("ranks", "batch"), [(8, 5), (7, 3)])
def test_every_image_is_read_once_an_epoch(ranks, batch):
    source = Shards(50, 128, 0.5)
    total = ranks * batch
    seen = []
    for epoch in range(2):
        found = read(source, ranks, batch, epoch)
        assert found.times.max() == 1
        assert (found.times == 0).sum() == len(source) % total
        # 800 images and more a rank: a standard deviation of their sum is below 2 % of it.
        assert found.off < 4 * 0.5 * (ranks / len(source)) ** 0.5
        seen.append(found.times)
    if len(source) % total:
        assert (seen[0] != seen[1]).any()  # what an epoch leaves is another each time
