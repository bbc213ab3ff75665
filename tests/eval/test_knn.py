"""Weighted k-NN against the published code's vectors and against a vote counted by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdino.errors import UsageError
from xdino_eval.features import Features
from xdino_eval.knn import SearchOptions, classify, evaluate, normalise, search, vote


def test_published_vectors_to_the_digit(golden):
    tensors, facts = golden("knn")
    splits = [tensors[f"{s}_{w}"] for s in ("train", "test") for w in ("features", "labels")]
    expected = {int(k): tuple(score) for k, score in facts["top1_top5"].items()}
    assert classify(*splits, tuple(expected), facts["temperature"]) == expected


def by_hand(bank, bank_labels, queries, query_labels, k, temperature):
    """The contract, one query at a time: nearest first, earlier first, lower class first."""
    top1 = top5 = 0
    for query, label in zip(queries, query_labels, strict=True):
        similarity = [float(np.dot(row, query)) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = {}
        for i in nearest:
            weight = math.exp((similarity[i] - similarity[nearest[0]]) / temperature)
            votes[bank_labels[i]] = votes.get(bank_labels[i], 0.0) + weight
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        top1 += label in ranking[:1]
        top5 += label in ranking[:5]
    return 100 * top1 / len(queries), 100 * top5 / len(queries)


@settings(max_examples=120, deadline=None)
@given(
    N=st.integers(1, 40), M=st.integers(1, 25), D=st.integers(1, 4),
    ks=st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    labels=st.lists(st.integers(-3, 2000), min_size=1, max_size=9, unique=True),
    temperature=st.sampled_from([0.07, 0.5, 4.0]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_equals_a_vote_counted_by_hand(N, M, D, ks, labels, temperature, seed):
    """Small whole numbers: similarities are exact, and most of them are equal to others."""
    rng = np.random.default_rng(seed)
    bank, queries = (rng.integers(-1, 2, (n, D)).astype(np.float32) for n in (N, M))
    bank_labels = rng.choice(labels, N)
    query_labels = rng.choice([*labels, 9999], M)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = classify(bank, bank_labels, queries, query_labels, ks, temperature)
    for k in ks:
        assert ours[k] == by_hand(bank, bank_labels, queries, query_labels, k, temperature)


def test_more_queries_than_a_block_and_many_classes(monkeypatch):
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(300, 16, generator=g)
    bank_labels, labels = torch.arange(900) % 300, torch.randint(300, (130,), generator=g)
    bank = normalise(centres[bank_labels] + torch.randn(900, 16, generator=g))
    queries = normalise(centres[labels] + torch.randn(130, 16, generator=g))
    whole = classify(bank, bank_labels, queries, labels, (1, 7, 50))
    assert 0 < whole[1][0] < whole[7][1] < 100
    expected = by_hand(
        bank.numpy(), bank_labels.tolist(), queries.numpy(), labels.tolist(), 7, 0.07
    )
    assert whole[7] == expected
    monkeypatch.setattr(vote, "VOTES", 33)
    options = SearchOptions(query_block=50)
    assert classify(bank, bank_labels, queries, labels, (50, 1, 7), options=options) == whole


def test_k_beyond_the_bank_is_the_whole_bank():
    bank, labels = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
    with pytest.warns(UserWarning, match="4 training images"):
        clipped = classify(bank, labels, bank, labels, (2, 100))
    assert clipped == {2: classify(bank, labels, bank, labels, (2,))[2],
                       100: classify(bank, labels, bank, labels, (4,))[4]}  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures(temperature):
    bank = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], np.float32)
    found = classify(bank, [5, 6, 7], bank, [5, 6, 7], (3,), temperature)
    assert found[3][1] == 100.0, "every class has a vote, however small"


@pytest.mark.filterwarnings("ignore:k = ")
def test_refuses():
    x, y = np.eye(3, dtype=np.float32), np.arange(3)
    nan = np.full((3, 3), np.nan, np.float32)
    for arguments, message in (
        ((x[:0], y[:0], x, y), "training features must be"),
        ((x, y, x[:0], y[:0]), "test features must be"),
        ((x, y, x, y, (0,)), "every k must be 1 or more"),
        ((x, y, x, y, ()), "every k must be 1 or more"),
        ((x, y, x, y, (1,), 0.0), "temperature must be positive"),
        ((x, y, x[:, :2], y), "3 numbers, test features 2"),
        ((x, y[:2], x, y), "3 training features, but labels"),
        ((nan, y, x, y), "a training feature is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            classify(*arguments)


def test_rows_carry_their_protocol():
    g = torch.Generator().manual_seed(0)
    train, val = (
        Features(3 * torch.randn(n, 5, generator=g), torch.arange(n) % 3, torch.arange(n),
                 skipped=[("a.png", "truncated")] * bad, data="d", transform="t, fp32")
        for n, bad in ((40, 0), (20, 1))
    )  # fmt: skip
    rows = evaluate(train, val, (1, 10), 0.1)
    scores = classify(normalise(train.features), train.labels, normalise(val.features), val.labels,
                      (1, 10), 0.1)  # fmt: skip
    assert [(r.top1, r.top5) for r in rows] == [scores[1], scores[10]]
    assert [r.settings for r in rows] == [{"k": k, "temperature": 0.1} for k in (1, 10)]
    assert (rows[0].train_size, rows[0].val_size, rows[0].data) == (40, 20, "d")
    assert rows[0].notes == ["1 images of d could not be read"]
    with pytest.raises(UsageError, match="no labels"):
        evaluate(train, Features(val.features, None, val.indices, data="d"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_are_searched_on_their_own_gpu(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank, queries = (normalise(torch.randn(n, 16, generator=generator)) for n in (300, 40))
    labels, wanted = torch.arange(300) % 7, torch.arange(40) % 7
    expected = classify(bank, labels, queries, wanted, (1, 20))
    monkeypatch.delitem(search.ENGINES, "faiss")
    assert classify(*(x.cuda() for x in (bank, labels, queries, wanted)), (1, 20)) == expected
