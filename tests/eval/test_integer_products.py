"""Candidates from 16-bit integers: nothing is missed that the stated error does not allow for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdino_eval.knn import integer_products, search
from xdino_eval.knn.integer_products import largest
from xdino_eval.knn.search import Exact, How, as_float32, unpack


def check(queries, bank, m, threads=1):
    """What `largest` promises, against products in float64; returns its answer."""
    product, row, error = largest(queries, bank, m, threads)
    exact = queries.astype(np.float64) @ bank.astype(np.float64).T
    found = np.take_along_axis(exact, row, 1)
    assert (np.sort(row, 1)[:, 1:] != np.sort(row, 1)[:, :-1]).all(), "no row twice"
    assert (np.diff(product, axis=1) <= 0).all()
    assert (abs(found - product) <= error[:, None]).all()
    missing = exact.copy()
    np.put_along_axis(missing, row, -np.inf, 1)
    assert (missing.max(1) <= product[:, -1] + error).all()
    return product, row, error


@settings(max_examples=150, deadline=None)
@given(
    N=st.integers(1, 200), M=st.integers(1, 30), D=st.integers(1, 40), m=st.integers(1, 200),
    shape=st.sampled_from(["normal", "one number", "lengths", "nearly one", "whole"]),
    size=st.sampled_from([1e-8, 1.0, 1e8]), threads=st.integers(1, 4),
    small=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_error_is_a_bound(N, M, D, m, shape, size, threads, small, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((N + M, D))
    if shape == "one number":  # the largest integers there are
        rows = np.eye(D)[rng.integers(0, D, N + M)] * rng.choice([-1.0, 1.0], (N + M, 1))
    elif shape == "lengths":
        rows *= 10.0 ** rng.integers(-4, 5, (N + M, 1))
    elif shape == "nearly one":
        rows = 1 + 3e-7 * rows
    elif shape == "whole":
        rows = np.rint(rows)  # rows of zeros too
        rows[0, 0] = 1
    rows = (size * rows).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        if small:  # many pieces, bands and batches of queries even here
            for name in ("PIECE", "BAND", "KEPT"):
                patch.setattr(integer_products, name, 1)
        check(rows[N:], rows[:N], min(m, N), threads)


def test_the_error_is_small():
    """Else candidates would be many; 2e-4 of a row and as much of a query at a width of 384."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert check(rows[:60], rows[60:], 200)[2].max() < 5e-4


@pytest.mark.parametrize("order", [1, -1])
def test_rows_in_order_of_their_products(order):
    """Each row nearer than all before it fills the collection again and again; or none after m."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((7, 33)).astype(np.float32)
    rows = rng.standard_normal((3000, 33)).astype(np.float32)
    rows = rows[np.argsort(order * (rows @ query[0]))]
    check(query, rows, 20)


def test_of_equal_products_the_first_rows_are_kept():
    rows = np.repeat(np.eye(3, dtype=np.float32), 50, axis=0)
    _, row, _ = check(rows[:1], rows, 20)
    assert row[0].tolist() == list(range(20))


def test_lengths_at_which_float32_gives_way():
    ones = np.ones((4, 3), np.float32)
    for query, bank in ((ones, 1e-20 * ones), (ones, 1e20 * ones), (1e20 * ones, ones)):
        assert largest(query.astype(np.float32), bank.astype(np.float32), 2, 1) is None
    found = Exact(as_float32(1e-20 * ones), How("integers")).nearest(as_float32(ones), 2)
    assert unpack(found)[1].tolist() == [[0, 1]] * 4


def test_what_rounding_leaves_open_is_searched_again(monkeypatch):
    rng = np.random.default_rng(0)
    bank = (1 + 3e-5 * rng.standard_normal((3000, 64))).astype(np.float32)
    queries, asked = as_float32(bank[:50]), []
    by_faiss = search.by_faiss
    monkeypatch.setitem(
        search.ENGINES, "faiss", lambda b, q, m: (asked.append(len(q)), by_faiss(b, q, m))[1]
    )
    found = Exact(bank, How("integers")).nearest(queries, 30)
    assert asked
    assert torch.equal(found, Exact(bank, How("torch")).nearest(queries, 30))


def test_auto_takes_integers_where_they_are_known_to_be_faster(monkeypatch):
    for suits, large in ((True, "integers"), (False, "faiss")):
        monkeypatch.setattr(integer_products, "suits_this_cpu", lambda suits=suits: suits)
        assert How().fastest(5000, 100_000, 384) == large
        assert How().fastest(50, 1000, 384) == "faiss"
    assert How(device=torch.device("cuda")).fastest(5000, 100_000, 384) == "torch"
    assert How("torch").fastest(5000, 100_000, 384) == "torch"


def test_without_numba_integers_are_refused(monkeypatch):
    monkeypatch.setattr(search, "_compiled", lambda name: None)
    with pytest.raises(search.UsageError, match="needs numba"):
        How.named("integers", torch.device("cpu"))
    assert How.named("auto", torch.device("cpu")).fastest(5000, 100_000, 384) == "faiss"
