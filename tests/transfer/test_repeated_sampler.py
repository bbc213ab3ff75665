"""Repeated augmentation deals as the published sampler does."""

import numpy as np
import pytest

from xdino.data import epoch_order
from xdino.errors import UsageError
from xdino_transfer.classification.repeated_sampler import deal, images_per_epoch, repeated_order


def test_every_process_gets_the_published_images(downstream):
    tensors, told = downstream("repeated_sampler")
    seen = 0
    for name, value in tensors.items():
        if not name.startswith("indices/"):
            continue
        n, world, rank, epoch = map(int, name.split("/")[1:])
        indices, _ = deal(tensors[f"permutation/{n}/{epoch}"].numpy(), rank, world)
        np.testing.assert_array_equal(indices, value.numpy(), name)
        seen += 1
    assert seen == 2 * len(told["samplers"])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_step_sees_the_same_images_however_they_are_dealt(world):
    batch, n = 24, 600
    whole = np.stack(repeated_order(n, 0, 1), axis=1)
    ranks = [np.stack(repeated_order(n, 0, 1, rank, world), axis=1) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {images_per_epoch(n, world)}
    for step in range(4):
        share = batch // world
        together = np.concatenate([rank[step * share : (step + 1) * share] for rank in ranks])
        assert sorted(map(tuple, together)) == sorted(map(tuple, whole[step * batch :][:batch]))


def test_every_image_comes_three_times_as_other_repeats():
    indices, repeats = repeated_order(768, 3, 0)
    assert indices[:9].tolist() == np.repeat(epoch_order(768, 3, 0)[:3], 3).tolist()
    assert repeats[:9].tolist() == [0, 1, 2] * 3
    assert len(set(zip(indices.tolist(), repeats.tolist(), strict=True))) == 768


def test_fewer_images_than_a_portion_are_refused():
    with pytest.raises(UsageError, match="takes images by 256, but the data holds 255"):
        repeated_order(255, 0, 0)
