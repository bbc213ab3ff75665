"""Timed steps are real ones, and leave nothing behind."""

import itertools

import pytest
import torch
from tiny_run import configuration, write_images

from xdino.forecast import rates
from xdino.forecast.rates import time_steps


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("rates") / "images")


def test_steps_are_timed_and_leave_no_trace(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    found = time_steps(configuration(images, runtime__workers=1), steps=6, folder=tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []
    assert (found.steps, found.images_per_step, found.images) == (6, 6, 20)
    assert found.steps_per_epoch == 3, "of the run, not of the longer one that was timed"
    assert found.seconds_per_step > 0
    assert found.state_seconds > 0
    assert found.precision in ("fp32", "bf16")
    assert found.images_per_second == found.images_per_step / found.seconds_per_step


def test_slow_steps_are_fewer(images):
    """A clock that gives every look at it a second: a step takes at least one."""
    clock = map(float, itertools.count())
    found = time_steps(
        configuration(images, runtime__workers=0), 50, seconds=7, clock=lambda: next(clock)
    )
    assert rates.LEAST_STEPS <= found.steps <= 7
    assert found.seconds_per_step == 1.0


def test_the_middle_half_is_deaf_to_strays():
    middle, spread = rates._middle([1.0, 1.0, 1.1, 1.1, 1.0, 1.1, 90.0, 0.1])
    assert 1.0 <= middle <= 1.1
    assert spread < 0.2
