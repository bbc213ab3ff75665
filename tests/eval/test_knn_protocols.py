"""Leave-one-out, few-shot, grids, blocks and indices: each against the plain vote or a loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdino.errors import UsageError
from xdino_eval.features import Features
from xdino_eval.knn import (
    Draws,
    SearchOptions,
    classify,
    evaluate,
    few_shot,
    leave_one_out,
    nearest_neighbours,
    normalise,
)
from xdino_eval.knn.protocols import sample_shots


def clustered(count, classes=7, dim=12, noise=1.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=g)
    labels[:classes] = torch.arange(classes)
    features = 3 * (centres[labels] + noise * torch.randn(count, dim, generator=g))
    return Features(features, labels, torch.arange(count), data="d", transform="t")


def plain(train, val, ks, temperature):
    return classify(normalise(train.features), train.labels, normalise(val.features), val.labels,
                    ks, temperature)  # fmt: skip


def test_a_grid_is_every_search_of_its_own():
    train, val = clustered(400), clustered(150, seed=1)
    ks, temperatures = (1, 20, 50), (0.04, 0.07, 1.0)
    rows = evaluate(train, val, ks, temperatures)
    assert [(r.settings["k"], r.settings["temperature"]) for r in rows] == [
        (k, T) for k in ks for T in temperatures
    ]
    for row in rows:
        k, T = row.settings["k"], row.settings["temperature"]
        assert (row.top1, row.top5) == plain(train, val, (k,), T)[k]
    assert len({row.top1 for row in rows}) > 3, "the settings matter here"


@pytest.mark.parametrize("options", [
    SearchOptions("torch"), SearchOptions("torch", bank_block=400, query_block=11),
    SearchOptions("faiss", bank_block=37), SearchOptions("faiss", query_block=1),
])  # fmt: skip
def test_engines_and_blocks_give_the_same_numbers(options):
    train, val = clustered(400), clustered(150, seed=1)
    expected = evaluate(train, val, (1, 20, 399), (0.07, 0.5))
    pieces = [
        replace(train, features=train.features[a:b], labels=train.labels[a:b])
        for a, b in ((0, 128), (128, 256), (256, 400))
    ]
    for bank in (train, pieces):
        rows = evaluate(bank, val, (1, 20, 399), (0.07, 0.5), options)
        assert [replace(r, seconds=0) for r in rows] == [replace(r, seconds=0) for r in expected]


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(2, 30), D=st.integers(1, 4), k=st.integers(1, 31), classes=st.integers(1, 5),
    seed=st.integers(0, 999), block=st.none() | st.integers(1, 31),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:k = ")
def test_leave_one_out_is_a_loop_over_the_others(N, D, k, classes, seed, block):
    """Small whole numbers, not of unit length: most similarities are equal, twins are common."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.integers(-1, 2, (N, D)).astype(np.float32))
    labels = torch.from_numpy(np.concatenate([np.repeat(np.arange(classes), 2),
                                              rng.integers(0, classes, N)])[:N])  # fmt: skip
    _, counts = np.unique(labels, return_counts=True)
    whole = Features(features, labels, torch.arange(N), data="d")
    if counts.min() < 2:
        with pytest.raises(UsageError, match="2 images of every class"):
            leave_one_out(whole, (k,))
        return
    (row,) = leave_one_out(whole, (k,), 0.5, SearchOptions(bank_block=block, query_block=7))
    right = np.zeros(2)
    unit = normalise(features)
    for i in range(N):
        others = np.delete(np.arange(N), i)
        right += classify(unit[others], labels[others], unit[[i]], labels[[i]], (k,), 0.5)[k]
    assert (row.top1, row.top5) == pytest.approx(tuple(right / N), abs=1e-9)
    assert (row.protocol, row.train_size, row.val_size) == ("k-NN, leave-one-out", N, N)


def test_few_shot_is_the_mean_of_banks_that_are_drawn():
    train, val = clustered(300), clustered(120, seed=1)
    rows = few_shot(train, val, Draws((1, 3), 4, seed=5), ks=(1, 10), temperature=(0.07, 1.0))
    assert [(r.settings["shots"], r.settings["k"], r.settings["temperature"]) for r in rows] == [
        (n, k, T) for n in (1, 3) for k in (1, 10) for T in (0.07, 1.0)
    ]
    labels = train.labels.numpy()
    for row in rows:
        n, k, T = (row.settings[name] for name in ("shots", "k", "temperature"))
        each = []
        for repeat in range(4):
            chosen = sample_shots(labels, n, 5, repeat)
            few = replace(train, features=train.features[chosen], labels=train.labels[chosen])
            each.append(plain(few, val, (min(k, n * 7),), T)[min(k, n * 7)])
        top1, top5 = np.array(each).T
        assert (row.top1, row.top5) == (top1.mean(), top5.mean())
        assert row.settings["top1_std"] == round(top1.std(ddof=1), 4)
        assert row.settings["top5_std"] == round(top5.std(ddof=1), 4)
        assert row.train_size == 7 * n
        assert f"top-1 of each: {top1[0]:.2f}" in row.notes[-1]
    assert rows[0].settings["top1_std"] > 0
    assert any("all 7 images of the bank voted" in note for note in rows[2].notes)


def test_draws_are_nested_seeded_and_balanced():
    labels = np.random.default_rng(0).integers(-2, 4, 200)
    one, five = sample_shots(labels, 1, 0, 0), sample_shots(labels, 5, 0, 0)
    assert set(one) <= set(five)
    assert np.array_equal(np.unique(labels[five], return_counts=True)[1], np.full(6, 5))
    assert np.array_equal(five, sample_shots(labels, 5, 0, 0))
    assert np.array_equal(five, np.sort(five))
    for other in (sample_shots(labels, 5, 1, 0), sample_shots(labels, 5, 0, 1)):
        assert not np.array_equal(five, other)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_carries_its_recall(kind):
    train, val = clustered(3000, noise=0.4), clustered(90, noise=0.4, seed=1)
    (exact,) = evaluate(train, val, (20,))
    (row,) = evaluate(train, val, (20,), options=SearchOptions(kind))
    assert row.settings["search"] == kind
    assert 0.6 < row.settings["recall"] <= 1
    assert any(f"{100 * row.settings['recall']:.2f} % of the exact 20" in n for n in row.notes)
    assert abs(row.top1 - exact.top1) < 5
    assert "recall" not in exact.settings


def test_refusals_are_a_sentence_each():
    train, val = clustered(50), clustered(20, seed=1)
    nothing = Features(
        torch.empty(0, 0), torch.empty(0, dtype=torch.int64), torch.empty(0), data="v"
    )
    unlabelled = replace(val, labels=None, data="v")
    broken = replace(val, features=val.features.clone().fill_(torch.nan), data="v")
    alone = replace(train, labels=torch.where(torch.arange(50) == 3, 8, train.labels % 2))
    names = [*"abcdefgh", "heron"]
    for call, sentence in (
        (lambda: evaluate(train, nothing), "v has no test image: there is nothing to score"),
        (lambda: evaluate(nothing, val), "v has no training image"),
        (lambda: evaluate(train, unlabelled), "v has no labels to score against"),
        (lambda: evaluate(unlabelled, val), "v has no labels to score against"),
        (lambda: evaluate(train, broken), "20 test features of v are not finite"),
        (lambda: evaluate(train, val, (0, 5)), "every k must be 1 or more"),
        (lambda: evaluate(train, val, (5,), (0.1, 0)), "temperature must be positive"),
        (lambda: leave_one_out(alone, (1,), classes=names), r"2 images .* fewer of heron \(1\)"),
        (lambda: few_shot(alone, val, Draws((2,)), classes=names), r"2 shots need .* heron \(1\)"),
        (lambda: few_shot(train, val, Draws((0,))), "shots and repeats must be 1 or more"),
    ):
        with pytest.raises(UsageError, match=sentence):
            call()


def test_nearest_neighbours_are_numpy_in_and_out():
    bank = np.eye(4, dtype=np.float32)
    similarity, row = nearest_neighbours(bank, bank[2:3], 2)
    assert similarity.tolist() == [[1.0, 0.0]]
    assert row.tolist() == [[2, 0]]
