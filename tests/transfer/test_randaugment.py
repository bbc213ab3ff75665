"""RandAugment: the published pictures to the bit, the published distribution, draws by place."""

import random

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform

from xdino.errors import UsageError
from xdino_transfer.classification.randaugment import (
    OPERATIONS,
    TABLE_DTYPE,
    RandAugment,
    argument,
    operate,
)

MEAN = (0.485, 0.456, 0.406)
PUBLISHED = RandAugment()


def layers(*entries: tuple) -> np.ndarray:
    return np.array([(OPERATIONS.index(name), True, m, s) for name, m, s in entries], TABLE_DTYPE)


def test_every_operation_is_the_published_one(downstream):
    tensors, told = downstream("randaugment")
    image = tensors["image"].numpy()
    assert tuple(told["operations"]) == OPERATIONS
    for case in told["ops"]:
        name, magnitude, sign = case["name"], case["magnitude"], case["sign"] or 1
        assert list(argument(name, magnitude, sign)) == case["argument"], case
        out = PUBLISHED.apply(image, layers((name, magnitude, sign)))
        np.testing.assert_array_equal(out, tensors[case["key"]].numpy(), str(case))


def test_chains_are_the_published_ones(downstream):
    tensors, told = downstream("randaugment")
    for i, chain in enumerate(told["chains"]):
        picture = Image.fromarray(tensors["image"].numpy())
        for step in chain["applied"]:
            name, magnitude = step["name"], min(step["magnitude_drawn"], 10.0)
            signs = (s for s in (-1, 1) if list(argument(name, magnitude, s)) == step["argument"])
            picture = operate(name, picture, magnitude, next(signs), PUBLISHED.fill)
        np.testing.assert_array_equal(np.asarray(picture), tensors[f"chain/{i}"].numpy())


def test_the_spelling_is_timms():
    assert RandAugment.parse("rand-m9-mstd0.5-inc1", MEAN) == PUBLISHED
    theirs = rand_augment_transform("rand-m7-n3-mstd0.25-inc1", {"img_mean": PUBLISHED.fill})
    ours = RandAugment.parse("rand-m7-n3-mstd0.25-inc1", MEAN)
    assert (ours.magnitude, ours.layers) == (theirs.ops[0].magnitude, theirs.num_layers)
    assert ours.std == theirs.ops[0].magnitude_std
    assert tuple(op.name for op in theirs.ops) == OPERATIONS
    assert RandAugment.parse("rand-m9-inc1", (0.459,)).fill == (117,)
    for wrong in ("rand-m9-mstd0.5", "augmix-m3", "rand-m12-inc1", "", "rand-mx-inc1"):
        with pytest.raises(UsageError, match=r"randaugment must be spelt"):
            RandAugment.parse(wrong, MEAN)


def test_draws_follow_from_the_place_alone():
    indices = np.arange(20)
    whole = PUBLISHED.draw(7, 3, indices)
    some = PUBLISHED.draw(7, 3, indices[[11, 4]])
    assert np.array_equal(whole[[11, 4]], some)
    for other in (
        PUBLISHED.draw(8, 3, indices),
        PUBLISHED.draw(7, 4, indices),
        PUBLISHED.draw(7, 3, indices, 1),
    ):
        assert not np.array_equal(whole, other)
    with pytest.raises(ValueError, match="seed must be"):
        PUBLISHED.draw(-1, 0, indices)


def test_the_distribution_is_the_published_one():
    drawn = PUBLISHED.draw(0, 0, np.arange(40_000)).ravel()
    counts = np.bincount(drawn["operation"], minlength=len(OPERATIONS))
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(drawn["applied"].mean() - 0.5) < 0.01
    assert abs((drawn["sign"] > 0).mean() - 0.5) < 0.01
    inside = drawn["magnitude"][drawn["magnitude"] < 10]
    assert abs(1 - len(inside) / len(drawn) - stats.norm.sf(2)) < 0.002
    assert stats.kstest(inside, stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-3


def test_arguments_are_timms_at_any_magnitude():
    rng = random.Random(0)
    for name in OPERATIONS:
        if LEVEL_TO_ARG[name] is None:
            continue
        for _ in range(20):
            magnitude = rng.uniform(0, 10)
            theirs = LEVEL_TO_ARG[name](magnitude, {})
            assert theirs in (argument(name, magnitude, 1), argument(name, magnitude, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_stays_an_image(channels):
    rng = np.random.default_rng(0)
    augment = RandAugment(probability=1.0, fill=(124, 116, 104)[:channels])
    for index in range(60):
        height, width = rng.integers(1, 40, 2)
        image = rng.integers(0, 256, (height, width, channels), np.uint8)
        before = image.copy()
        out = augment.apply(image, augment.draw(0, 0, np.array([index]))[0])
        assert (out.dtype, out.shape) == (np.uint8, image.shape)
        assert np.array_equal(image, before)


def test_no_bit_left_is_black():
    image = np.full((4, 5, 3), 200, np.uint8)
    assert not PUBLISHED.apply(image, layers(("PosterizeIncreasing", 10.0, 1))).any()
