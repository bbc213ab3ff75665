"""Mixup, CutMix and smoothed targets: published images and targets for given draws."""

import pytest
import torch
from scipy import stats
from timm.data.mixup import mixup_target

from xdino.errors import UsageError
from xdino_transfer.classification.mixup import (
    Mix,
    Mixup,
    check_batch,
    cutmix,
    mix_images,
    mix_targets,
    smoothed,
)

PUBLISHED = Mixup()


def test_mixed_batches_are_the_published_ones(downstream, agree):
    tensors, told = downstream("classification")
    images, labels = tensors["mix/images"], tensors["mix/labels"]
    for i, case in enumerate(told["mix"]):
        mix = Mix(case["lam"])
        if case["cutmix"]:
            mix = cutmix(case["lam"], tuple(case["centre"]), *images.shape[2:])
            assert mix.lam == pytest.approx(case["lam_of_the_box"], abs=1e-12)
            assert list(mix.box) == case["box"]
        mixed, targets = PUBLISHED(images, labels, told["num_classes"], mix)
        agree(f"images {i}", mixed, tensors[f"mix/{i}/images"], 1e-6)
        agree(f"targets {i}", targets, tensors[f"mix/{i}/target"], 1e-6)


def test_boxes_are_the_published_ones(downstream):
    _, told = downstream("classification")
    for height, width, lam, y, x, *box, used in told["cutmix_boxes"]["rows"]:
        mix = cutmix(lam, (y, x), height, width)
        assert list(mix.box) == box
        assert mix.lam == pytest.approx(used, abs=1e-12)


def test_targets_are_timms():
    labels = torch.tensor([0, 3, 1, 1])
    for smoothing in (0.0, 0.1, 0.3):
        ours = mix_targets(smoothed(labels, 5, smoothing), Mix(0.3))
        assert torch.allclose(ours, mixup_target(labels, 5, 0.3, smoothing))
        assert torch.allclose(ours.sum(1), torch.ones(4))


def test_draws_follow_from_the_step_and_the_part():
    one = PUBLISHED.draw(1, 20, 0, 224, 224)
    assert one == PUBLISHED.draw(1, 20, 0, 224, 224)
    others = {PUBLISHED.draw(s, i, p, 224, 224) for s, i, p in ((2, 20, 0), (1, 21, 0), (1, 20, 1))}
    assert one not in others
    assert len(others) == 3


def test_the_distribution_is_the_published_one():
    drawn = [PUBLISHED.draw(0, i, 0, 200, 200) for i in range(4000)]
    plain = [mix.lam for mix in drawn if mix.box is None]
    assert len(plain) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(plain, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    only_cutmix = Mixup(mixup_alpha=0)
    assert all(only_cutmix.draw(0, i, 0, 50, 50).box for i in range(50))
    only_mixup = Mixup(cutmix_alpha=0)
    assert not any(only_mixup.draw(0, i, 0, 50, 50).box for i in range(50))
    rarely = Mixup(probability=0.1)
    untouched = sum(rarely.draw(0, i, 0, 50, 50) == Mix() for i in range(1000))
    assert untouched == pytest.approx(900, abs=40)


def test_nothing_is_mixed_where_both_are_off():
    off = Mixup(mixup_alpha=0, cutmix_alpha=0, smoothing=0)
    assert off.draw(0, 0, 0, 8, 8) == Mix()
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    mixed, targets = off(images, labels, 3, Mix())
    assert mixed is images
    assert torch.equal(targets, torch.eye(3))


def test_odd_batches_are_refused():
    for size in (1, 7):
        with pytest.raises(UsageError, match=rf"batch_size must be even, got {size}"):
            PUBLISHED(torch.zeros(size, 1, 2, 2), torch.zeros(size, dtype=torch.long), 2, Mix())
    check_batch(2)


def test_images_are_not_written_to():
    images = torch.rand(4, 3, 8, 8)
    before = images.clone()
    for mix in (Mix(0.4), cutmix(0.5, (2, 2), 8, 8)):
        mix_images(images, mix)
        assert torch.equal(images, before)
