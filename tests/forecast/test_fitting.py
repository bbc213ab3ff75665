"""Whole epochs into the time there is."""

import dataclasses

from hypothesis import assume, given
from hypothesis import strategies as st

from xdino.forecast import fitting
from xdino.forecast.fitting import Judging
from xdino.forecast.rates import Rates

RATES = Rates(
    seconds_per_step=0.5,
    images_per_step=32,
    peak_bytes=0,
    precision="fp32",
    device="cpu",
    cores=2,
    steps_per_epoch=20,
    images=650,
    steps=20,
    plan_seconds=1.0,
    state_seconds=0.1,
)
JUDGING = Judging(fixed=0.5, an_image=0.001, train=650, val=100)


def test_a_run_of_many_epochs_fills_its_minutes_and_ends_with_a_score():
    found = fitting.length(1800, RATES, JUDGING)
    assert 0.95 * 1800 < found.seconds <= 1800
    assert found.epochs % found.evaluations.every == 0
    assert found.evaluations.points >= fitting.LEAST_POINTS
    scores = found.evaluations.points * found.evaluations.seconds
    assert scores <= 0.1 * 1800


def test_without_labels_quality_is_judged():
    judging = Judging(0.5, 0.002, 3_000, 0, labelled=False)
    found = fitting.length(600, RATES, judging)
    keys = {c.key: c for c in fitting.lengths(found, RATES, judging)}
    assert keys["evaluate.protocols"].value == "quality"
    assert "labelled" in keys["evaluate.protocols"].reason
    assert int(keys["evaluate.every"].value) > 0


def test_where_nobody_judges_nothing_is_scored():
    found = fitting.length(600, RATES, None)
    assert (found.evaluations.every, found.evaluations.points) == (0, 0)
    keys = {c.key: c for c in fitting.lengths(found, RATES, None)}
    assert keys["evaluate.every"].value == "0"
    assert "judges" in keys["evaluate.every"].reason
    assert "evaluate.protocols" not in keys


def test_scores_that_cost_too_much_are_left_out():
    slow = Judging(fixed=100.0, an_image=0.1, train=10_000, val=1000)
    found = fitting.length(300, RATES, slow)
    assert found.evaluations.every == 0
    assert found.epochs == fitting.length(300, RATES, None).epochs


def test_one_score_at_the_end_may_take_a_fifth():
    dear = Judging(fixed=50.0, an_image=0.0, train=650, val=100)
    found = fitting.length(300, RATES, dear)
    assert (found.evaluations.every, found.evaluations.points) == (found.epochs, 1)
    assert 0.9 * 300 < found.seconds <= 300


def test_not_one_epoch():
    assert fitting.length(8, RATES, None) is None
    assert fitting.length(-5, RATES, None) is None


def test_epochs_are_cut_where_passes_leave_much_of_the_time():
    """17 s for passes of 10.1: one leaves a third of them."""
    assert fitting.length(17, RATES, None).seconds < 0.75 * 17
    cut = fitting.of_other_epochs(17, RATES, None)
    found = fitting.length(17, cut, None)
    assert fitting.FILLED * 17 <= found.seconds <= 17
    assert found.epochs * cut.steps_per_epoch > RATES.steps_per_epoch
    choice = fitting.images_per_epoch(cut)
    assert (choice.key, choice.value) == ("train.images_per_epoch", f"{32 * cut.steps_per_epoch}")


def test_very_many_images_are_seen_in_part():
    many = dataclasses.replace(RATES, images=1_281_167, steps_per_epoch=40_036)
    assert fitting.length(1800, many, JUDGING) is None
    cut = fitting.of_other_epochs(1800, many, JUDGING)
    found = fitting.length(1800, cut, JUDGING)
    assert 0.95 * 1800 < found.seconds <= 1800
    assert found.epochs >= 8
    assert found.evaluations.points >= fitting.LEAST_POINTS
    assert fitting.of_other_epochs(40, many, JUDGING) is many, "100 steps take 50 s"


def test_where_passes_fill_the_time_nothing_is_changed():
    assert fitting.of_other_epochs(1800, RATES, JUDGING) is RATES
    assert fitting.of_other_epochs(8, RATES, JUDGING) is RATES, "not one pass"


@given(
    seconds=st.floats(1, 1e6),
    step=st.floats(1e-3, 100),
    steps=st.integers(1, 20_000),
    state=st.floats(0, 5),
    fixed=st.floats(0, 10),
    image=st.floats(0, 0.1),
)
def test_never_longer_than_asked(seconds, step, steps, state, fixed, image):
    assume(seconds / (step * steps) < 5_000)
    rates = dataclasses.replace(
        RATES, seconds_per_step=step, steps_per_epoch=steps, state_seconds=state
    )
    judging = Judging(fixed, image, 10_000, 1_000)
    cut = fitting.of_other_epochs(seconds, rates, judging)
    if cut is not rates:
        assert fitting.length(seconds, cut, judging).seconds <= seconds
    found = fitting.length(seconds, rates, judging)
    if found is None:
        assert fitting.epoch_seconds(rates) > seconds - 5 - 2 * step - state - 0.05 * seconds
        return
    assert found.epochs >= 1
    assert found.seconds <= seconds
    judged = found.evaluations
    if judged.every:
        assert found.epochs // judged.every == judged.points
        share = fitting.LAST_SHARE if judged.points == 1 else fitting.EVALUATIONS_SHARE
        assert judged.points * judged.seconds <= share * seconds
    if found.epochs > 50:
        assert found.seconds > 0.75 * seconds
