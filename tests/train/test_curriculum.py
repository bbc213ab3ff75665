"""Small crops first: sizes follow from the iteration, and a stop anywhere changes nothing."""

import os
import signal

import numpy as np
import pytest
import torch

from xdino import augment, checkpoint, config, data
from xdino.augment import photometric
from xdino.errors import Stopped, UsageError
from xdino.plan import make_plan
from xdino.pretraining import pretrain

from .listening import Ear, assert_same_networks, rows

HALF = {"curriculum__share": 0.5, "curriculum__global_size": 16, "curriculum__local_size": 8}


def test_other_sizes_are_the_same_draw():
    crops = augment.multi_crop()
    small = augment.at_sizes(crops, 112, 48)
    assert small.groups == ((112, 2), (48, 8))
    a, b = (augment.draw_batch(c, 3, 4, np.arange(50)) for c in (crops, small))
    for name in set(a.dtype.names) - {"blur"}:
        assert (a[name] == b[name]).all(), name
    assert b["blur"] == pytest.approx(a["blur"] / 2)  # the same part of a picture half as large
    assert augment.at_sizes(small, 224, 96).views[0].enlarged == 1
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    assert (augment.boxes(a, 90, 120) == augment.boxes(b, 90, 120)).all()
    views = torch.from_numpy(augment.crop(image, augment.boxes(b, 90, 120)[0, 0], 112))[None]
    assert photometric.photometric(views, b[0, :1], small).isfinite().all()


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (1, 5), (4, 3)])
def test_batches_switch_at_their_iteration(tiny, workers, prefetch):
    plan = make_plan(tiny(**HALF))
    assert (plan.iterations, plan.early_iterations) == (6, 3)
    loader, plain = (
        data.CropLoader(plan.source, plan.crops, 6, 0, workers=workers, prefetch=prefetch, **early)
        for early in ({"early_crops": plan.early_crops, "early_iterations": 3}, {})
    )
    batches = list(loader.iterate(0, 6))
    sizes = [[c.shape[2] for c in batch.crops] for batch in batches]
    assert sizes == [[16, 8]] * 3 + [[24, 16]] * 3
    resumed = list(loader.iterate(2, 6))
    for one, two in zip(batches[2:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.crops, two.crops, strict=True))
    for one, two in zip(batches[3:], plain.iterate(3, 6), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.crops, two.crops, strict=True))
        assert (one.table == two.table).all()


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_a_stop_before_at_or_after_the_switch_changes_no_bit(tiny, tmp_path, stop_at):
    configuration = tiny(**HALF, model__drop_path=0.3)
    ear = Ear(at=stop_at, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    pretrain(configuration, tmp_path / "whole")
    with pytest.raises(Stopped, match=f"after iteration {stop_at} of 6"):
        pretrain(configuration, tmp_path / "broken", listener=ear)
    torch.manual_seed(99)
    pretrain(configuration, tmp_path / "broken")
    assert_same_networks(tmp_path / "whole", tmp_path / "broken")
    files = [checkpoint.sha256(tmp_path / n / "backbone.safetensors") for n in ("whole", "broken")]
    assert files[0] == files[1]
    for run in ("whole", "broken"):
        told = [(r["global_size"], r["local_size"]) for r in rows(tmp_path / run)]
        assert told == [(16, 8)] * 3 + [(24, 16)] * 3
    assert checkpoint.load_backbone(tmp_path / "whole").input_size == 24


def test_off_is_the_default_and_changes_nothing(tiny, tmp_path):
    assert config.Config().curriculum.share == 0
    plan = make_plan(tiny())
    assert plan.early_crops is None
    assert plan.early_iterations == 0
    pretrain(tiny(), tmp_path)
    assert {(r["global_size"], r["local_size"]) for r in rows(tmp_path)} == {(24, 16)}


def test_mistakes(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"curriculum.global_size is 112, larger than crops\.glo"):
        tiny(curriculum__share=0.5, curriculum__local_size=8)
    with pytest.raises(UsageError, match=r"curriculum\.share"):
        tiny(curriculum__share=1.5)
    pretrain(tiny(), tmp_path)
    with pytest.raises(UsageError, match=r"curriculum\.share \(0\.0 against 0\.5\)"):
        pretrain(tiny(**HALF), tmp_path)
    recipe = config.load("fashion_mnist_curriculum")
    plain = config.load("fashion_mnist")
    differing = [d.split(" ")[0] for d in config.differing_keys(plain, recipe)]
    assert differing == ["curriculum.share", "curriculum.global_size", "curriculum.local_size"]
