"""Garments at random places: whole, in the frame, and the same ones every time."""

import numpy as np

from xdino import data
from xdino.data.idx.scattered import SIZE, scattered


def test_the_sample_scattered_is_the_same_every_time_and_keeps_its_labels():
    plain = data.open_splits("fashion_mnist_sample")
    for split, again, source in zip(
        data.open_splits("fashion_mnist_scattered"),
        data.open_splits("fashion_mnist_scattered"),
        plain,
        strict=True,
    ):
        assert split.read(5).shape == (SIZE, SIZE, 1)
        assert np.array_equal(split.read(5), again.read(5))
        assert np.array_equal(split.labels, source.labels)
        assert len(split) == len(source)


def test_the_same_garment_lies_elsewhere_in_another_image():
    garment = np.zeros((28, 28), np.uint8)
    garment[4:24, 10:18] = 255
    first, second = scattered(np.stack([garment, garment]), seed=0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, scattered(garment[None], seed=1)[0])
    assert np.array_equal(first, scattered(garment[None].repeat(5, 0), seed=0)[0]), "by its place"


def test_a_garment_stays_whole_within_the_frame():
    """White rectangles keep their area, scaled by between 0.6 and 1 of the frame, and their shape."""
    garments = np.zeros((400, 28, 28), np.uint8)
    garments[:, 1:27, 4:24] = 255
    images = scattered(garments, seed=3)
    areas = (images > 240).sum((1, 2)) / (26 * 20) / (SIZE / 28) ** 2
    assert 0.3 < areas.min() < 0.45, "0.6 squared, less what the edges blur"
    assert 0.8 < areas.max() <= 1.0
    rows = (images > 240).any(2).mean(0)
    assert rows[:4].max() > 0.2, "it lies at the upper edge at times"
    assert rows[-4:].max() > 0.2, "and at the lower one"


def test_none_and_one_that_is_all_black():
    assert scattered(np.zeros((0, 28, 28), np.uint8), 0).shape == (0, SIZE, SIZE)
    black = scattered(np.zeros((2, 28, 28), np.uint8), 0)
    assert black.std((1, 2)).min() > 0, "its texture is there"
