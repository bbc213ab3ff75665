"""Schedules: the published oddities, and runs that cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdino.schedules import Schedules, cosine, risen, teacher_temperature


@given(
    base=st.floats(1e-6, 10), final=st.floats(0, 10), epochs=st.integers(1, 20),
    steps=st.integers(1, 30), share=st.floats(0, 1),
)  # fmt: skip
def test_cosine_stays_between_its_ends(base, final, epochs, steps, share):
    warmup = share * epochs
    values = cosine(base, final, epochs, steps, warmup)
    assert values.shape == (epochs * steps,)
    ramp = round(warmup * steps)
    decay = values[ramp:]
    slack = 1e-9 * max(base, final)
    assert (decay >= min(base, final) - slack).all()
    assert (decay <= max(base, final) + slack).all()
    if ramp > 1 and len(decay):
        assert values[ramp - 1] == pytest.approx(base), "the peak appears twice"
        assert decay[0] == pytest.approx(base)


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="does not fit into a run of 5 epochs"):
        cosine(1, 0, 5, 10, 6)
    with pytest.raises(ValueError, match="does not fit"):
        teacher_temperature(0.04, 0.07, 5, 10, 6)
    assert cosine(1, 0, 5, 10, 5)[-1] == 1


def test_teacher_temperature_is_one_value_an_epoch():
    table = teacher_temperature(0.04, 0.07, 5, 3, 4).reshape(5, 3)
    np.testing.assert_allclose(table[:, 0], [0.04, 0.05, 0.06, 0.07, 0.07])
    assert (table == table[:, :1]).all()


def laid_out(epochs: int, steps: int = 5) -> Schedules:
    """A run warmed up for one epoch."""
    return Schedules(
        lr=cosine(1.0, 0.01, epochs, steps, 1),
        weight_decay=cosine(0.04, 0.4, epochs, steps),
        momentum=cosine(0.996, 1, epochs, steps),
        teacher_temp=teacher_temperature(0.04, 0.07, epochs, steps, 2),
        frozen_iterations=steps,
    )


def test_an_extension_lies_behind_the_schedules():
    """The equation of the module's docstring, number by number."""
    short, longer, W = laid_out(4), laid_out(8), 3
    both = short.extended(longer, rise=W)
    assert len(both) == 40
    assert both.frozen_iterations == short.frozen_iterations
    for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
        joined, own, planned = (getattr(each, name) for each in (both, short, longer))
        np.testing.assert_array_equal(joined[:20], own)
        where = slice(20 + W, None) if name == "lr" else slice(20, None)
        np.testing.assert_array_equal(joined[where], planned[where])
    for j in range(W):
        last, curve = short.lr[-1], longer.lr[20 + j]
        assert both.lr[20 + j] == pytest.approx(last + (j + 1) / (W + 1) * (curve - last))
    # As many epochs as there were begin at about half the peak; a few disturb little.
    assert 0.4 < both.lr[20:].max() < 0.6
    few = short.extended(laid_out(5), rise=1)
    assert few.lr[20:].max() < 0.2
    again = both.extended(laid_out(10), rise=0)
    np.testing.assert_array_equal(again.lr[:40], both.lr)
    np.testing.assert_array_equal(again.lr[40:], laid_out(10).lr[40:])


@given(last=st.floats(0, 10), level=st.floats(0, 10), n=st.integers(0, 20), rise=st.integers(0, 30))
def test_a_rise_stays_between_its_ends_and_reaches_the_curve(last, level, n, rise):
    curve = np.full(n, level)
    values = risen(last, curve, rise)
    assert values.shape == curve.shape
    assert ((values >= min(last, level) - 1e-9) & (values <= max(last, level) + 1e-9)).all()
    np.testing.assert_array_equal(values[rise:], curve[rise:])
