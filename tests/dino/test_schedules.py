"""Schedules: the published oddities, and runs that cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdino.schedules import cosine, teacher_temperature


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
