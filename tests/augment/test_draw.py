"""The table of random parameters: frequencies, ranges, distributions, and that it has no state."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from xdino.augment.multi_crop import MultiCrop, View, boxes, draw, draw_batch, multi_crop

COUNT = 5_000
PINNED = {
    "area": 0.8880124365876139,
    "position": [0.7944111218430623, 0.4365862314786826],
    "order": [3, 1, 2, 0],
    "factor": [1.1008587, 0.8862682, 1.0739124, -0.0977652],
}


@pytest.fixture(scope="module")
def crops():
    return multi_crop()


@pytest.fixture(scope="module")
def table(crops):
    return draw_batch(crops, seed=7, epoch=3, indices=np.arange(COUNT))


def assert_frequency(hits: np.ndarray, probability: float) -> None:
    """Within 4.5 standard deviations of a binomial: one false alarm in 150,000 tests."""
    n = hits.size
    if probability in (0, 1):
        assert hits.mean() == probability
    else:
        bound = 4.5 * math.sqrt(probability * (1 - probability) / n)
        assert abs(hits.mean() - probability) <= bound


def test_published_groups(crops):
    assert crops.groups == ((224, 2), (96, 8))
    assert crops.channels == 3


def test_frequencies_for_every_view(crops, table):
    for view, rows in zip(crops.views, table, strict=True):
        assert_frequency(rows["flip"], 0.5)
        assert_frequency(rows["jitter"], 0.8)
        assert_frequency(rows["gray"], 0.2)
        assert_frequency(rows["blur"] > 0, view.blur)
        assert_frequency(rows["solarize"], view.solarize)
    assert [view.blur for view in crops.views] == [1.0, 0.1] + [0.5] * 8
    assert [view.solarize for view in crops.views] == [0.0, 0.2] + [0.0] * 8


def test_factors_fill_their_ranges(table):
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = table["factor"][..., column]
        assert low - 1e-6 <= values.min() <= low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) <= values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)
    radii = table["blur"][table["blur"] > 0]
    assert 0.1 <= radii.min() <= 0.12
    assert 1.98 <= radii.max() <= 2.0


def test_every_order_of_the_jitter_is_equally_likely(table):
    orders = table["order"].reshape(-1, 4)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    for order in itertools.permutations(range(4)):
        assert_frequency((orders == order).all(axis=1), 1 / 24)


def test_draws_are_independent_of_each_other(table):
    """No two flags, and no two views, share a number."""
    flags = np.stack([table[name] for name in ("flip", "jitter", "gray")]).reshape(-1, COUNT)
    correlation = np.corrcoef(flags) - np.eye(len(flags))
    assert np.abs(correlation).max() < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("view", [0, 4])
def test_area_and_ratio_as_torchvision_draws_them(crops, table, view):
    """Two-sample Kolmogorov-Smirnov against RandomResizedCrop.get_params, at alpha = 1e-4."""
    torch.manual_seed(view)
    image = torch.empty(3, 375, 500)
    n = 2_000
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, list(crops.views[view].scale), [3 / 4, 4 / 3])
            for _ in range(n)
        ]
    )
    ours = boxes(table[view], 375, 500)
    bound = math.sqrt(-0.5 * math.log(1e-4 / 2) * (n + COUNT) / (n * COUNT))
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / np.maximum(375 - box[:, 2], 1),
        lambda box: box[:, 1] / np.maximum(500 - box[:, 3], 1),
    ):
        a, b = np.sort(measure(ours)), np.sort(measure(theirs))
        grid = np.concatenate([a, b])
        distance = np.abs(
            np.searchsorted(a, grid, side="right") / len(a)
            - np.searchsorted(b, grid, side="right") / len(b)
        ).max()
        assert distance < bound


def test_a_draw_is_a_pure_function(crops):
    indices = np.array([5, 900, 5, 0])
    batch = draw_batch(crops, 1, 2, indices)
    for column, index in enumerate(indices):
        assert (draw(crops, 1, 2, int(index)) == batch[:, column]).all()


def test_every_seed_epoch_and_index_differs(crops):
    seen = {
        draw(crops, seed, epoch, index)["position"].tobytes()
        for seed in (0, 1, 2**64 - 1)
        for epoch in (0, 1, 2)
        for index in (0, 1, 2, 10**6)
    }
    assert len(seen) == 3 * 3 * 4


def test_draws_are_stable_across_versions(crops):
    """These values are part of what a seed means: a change makes old runs unrepeatable."""
    row = draw(crops, 0, 0, 0)[0]
    assert row["area"][0] == pytest.approx(PINNED["area"], abs=1e-12)
    assert row["position"].tolist() == pytest.approx(PINNED["position"], abs=1e-12)
    assert row["order"].tolist() == PINNED["order"]
    late = draw(crops, 12345, 99, 1_281_166)[9]
    assert late["factor"].tolist() == pytest.approx(PINNED["factor"], abs=1e-6)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: View(0, (0.1, 1), 0, 0), "at least 1 pixel"),
        (lambda: View(8, (0.5, 0.4), 0, 0), "scale must be"),
        (lambda: View(8, (0.0, 0.4), 0, 0), "scale must be"),
        (lambda: View(8, (0.1, 1), 1.5, 0), "blur must be a probability"),
        (lambda: MultiCrop(()), "at least one view"),
        (lambda: multi_crop(flip=-1), "flip must be a probability"),
        (lambda: multi_crop(hue=0.6), "hue must be"),
        (lambda: multi_crop(contrast=-0.1), "contrast must be at least 0"),
        (lambda: multi_crop(ratio=(2, 1)), "ratio must be"),
        (lambda: multi_crop(blur_radius=(0, 1)), "blur_radius must be"),
        (lambda: multi_crop(mean=(0.5,)), "one entry per channel"),
        (lambda: multi_crop(std=(0.0, 1, 1)), "std must be above 0"),
        (lambda: multi_crop(global_blur=(1.0,)), "one entry per global crop"),
        (lambda: multi_crop(local_count=-1), "local_count must be at least 0"),
        (lambda: multi_crop(contrst=0.1), "takes no contrst"),
        (lambda: draw(multi_crop(), -1, 0, 0), "seed must be"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
