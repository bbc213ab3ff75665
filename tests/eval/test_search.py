"""Every way to search a bank gives the answer of a search in float64 with a stable sort."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xdino.errors import UsageError
from xdino_eval.knn import search
from xdino_eval.knn.keys import EMPTY, merge, pack, recall, unpack
from xdino_eval.knn.search import ExactSearcher, IndexSearcher, SearchOptions
from xdino_eval.knn.tables import JoinedTable, UnitTable, as_float32, read, take


def by_hand(bank, queries, k):
    """The definition: inner products in float64, rounded; a stable sort keeps the lower row."""
    similarity = (queries.astype(np.float64) @ bank.astype(np.float64).T).astype(np.float32)
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(bank))]
    return np.take_along_axis(similarity, rows, 1), rows


def made(N, M, D, kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "whole numbers":  # most similarities are equal to others
        return (rng.integers(-1, 2, (n, D)).astype(np.float32) for n in (N, M))
    bank = rng.standard_normal((N, D)).astype(np.float32)
    if kind == "twins":  # every row stands in the bank several times, in no order
        bank = bank[rng.integers(0, max(1, N // 4), N)]
    elif kind == "nearly one":  # a collapsed network: apart in float64, not in float32
        bank = (1 + 3e-7 * bank).astype(np.float32)
    return bank, bank[rng.integers(0, N, M)] if M < N else rng.standard_normal((M, D), np.float32)


KINDS = ("whole numbers", "normal", "twins", "nearly one")


@settings(max_examples=150, deadline=None)
@given(
    N=st.integers(1, 90), M=st.integers(1, 40), D=st.integers(1, 24), k=st.integers(1, 100),
    kind=st.sampled_from(KINDS), engine=st.sampled_from(["faiss", "torch"]),
    block=st.none() | st.integers(1, 100), small=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_engine_and_block_equals_brute_force(N, M, D, k, kind, engine, block, small, seed):
    bank, queries = made(N, M, D, kind, seed)
    similarity, rows = by_hand(bank, queries, k)
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several tiles, bands and pieces even here
            for name, value in (("PIECE", 7), ("BAND", 5), ("PAIRS", 50), ("MARGIN", 1)):
                patch.setattr(search, name, value)
        found = ExactSearcher(bank, SearchOptions(engine, bank_block=block)).nearest(
            as_float32(queries), k
        )
    assert np.array_equal(unpack(found)[1].numpy(), rows)
    assert np.array_equal(unpack(found)[0].numpy(), similarity)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_larger_bank(engine, kind):
    bank, queries = made(3000, 60, 64, kind, 0)
    similarity, rows = by_hand(bank, queries, 50)
    for block in (None, 1, 701, 2999) if engine == "torch" else (None, 701):
        found = ExactSearcher(bank, SearchOptions(engine, bank_block=block)).nearest(
            as_float32(queries), 50
        )
        assert np.array_equal(unpack(found)[1].numpy(), rows)
        assert np.array_equal(unpack(found)[0].numpy(), similarity)


def test_float32_alone_would_not_do():
    """The rows that this file is about: float32 products order them otherwise than float64 does."""
    bank, queries = made(3000, 60, 64, "nearly one", 0)
    rows = by_hand(bank, queries, 50)[1]
    assert not np.array_equal(np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :50], rows)


def test_float32_products_stay_float32():
    bank, queries = made(500, 20, 64, "normal", 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = ExactSearcher(bank, SearchOptions("torch")).nearest(as_float32(queries), 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(unpack(found)[1].numpy(), by_hand(bank, queries, 20)[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 1)),
                min_size=1, max_size=20))  # fmt: skip
def test_keys_order_as_neighbours_and_come_back(pairs):
    similarity = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    row = torch.tensor([pair[1] for pair in pairs])
    keys = pack(similarity, row)
    assert torch.equal(unpack(keys)[0], similarity)  # 0.0 == -0.0
    assert torch.equal(unpack(keys)[1], row)
    order = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], pairs[i][1]))
    assert torch.equal(keys.sort(descending=True).values, keys[order])
    assert (keys > EMPTY).all()


def test_tables_are_read_in_slices(tmp_path):
    features = 3 * torch.randn(70, 9)
    features[4] = 0
    save_file({"features": features}, tmp_path / "f.safetensors")
    mapped = np.memmap(tmp_path / "f.raw", np.float32, "w+", shape=(70, 9))
    mapped[:] = features.numpy()
    mapped.flush()
    unit = torch.nn.functional.normalize(features, dim=1)
    tables = {
        "stored": load_file(tmp_path / "f.safetensors")["features"],
        "mapped": np.memmap(tmp_path / "f.raw", np.float32, "r", shape=(70, 9)),
        "joined": JoinedTable([features[:30], features[30:31], features[31:].numpy()]),
        "double": features.double().numpy(),
    }
    rows = np.array([0, 4, 29, 30, 69])
    for name, table in tables.items():
        assert tuple(table.shape) == (70, 9), name
        for step in (1, 7, 31, 70):
            parts = [read(UnitTable(table), slice(i, i + step)) for i in range(0, 70, step)]
            assert torch.equal(torch.cat(parts), unit), name
        assert torch.equal(take(table, rows, step=8), features[rows]), name
        whole = ExactSearcher(unit, SearchOptions()).nearest(unit, 12)
        for block in (None, 13):
            found = ExactSearcher(UnitTable(table), SearchOptions(bank_block=block)).nearest(
                unit, 12
            )
            assert torch.equal(found, whole), name


class Counting:
    """A table that remembers how many rows were read at a time."""

    def __init__(self, table):
        self.table, self.shape, self.most, self.rows = table, table.shape, 0, 0

    def __getitem__(self, rows):
        part = self.table[rows]
        self.most, self.rows = max(self.most, len(part)), self.rows + len(part)
        return part


def test_a_block_is_all_that_is_read_at_a_time():
    bank, queries = made(1000, 30, 16, "twins", 0)
    table = Counting(bank)
    ExactSearcher(table, SearchOptions(bank_block=64)).nearest(as_float32(queries), 20)
    assert table.most == 64
    assert table.rows in (1000, 2000), "once, and once more where float32 left it open"


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_finds_most_and_says_how_many(kind):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 16))
    rows = centres[rng.integers(0, 60, 4000)] + 0.5 * rng.standard_normal((4000, 16))
    unit = UnitTable(rows.astype(np.float32))
    bank, queries = unit[slice(0, 3900)], unit[slice(3900, 4000)]
    exact = ExactSearcher(bank, SearchOptions()).nearest(queries, 20)
    found = IndexSearcher(bank, SearchOptions(kind, bank_block=1000)).nearest(queries, 20)
    assert 0.8 < recall(found, exact, 20) <= 1
    assert recall(exact, exact, 20) == 1
    # What it finds is measured by the definition.
    similarity, row = unpack(found)
    expected = (queries.double()[:, None] * bank[row].double()).sum(-1).float()
    assert torch.equal(similarity, expected)
    assert torch.equal(found, found.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_of_a_tiny_bank_still_finds_k(kind):
    bank, queries = (torch.randn(n, 4) for n in (50, 3))
    found = IndexSearcher(bank, SearchOptions(kind)).nearest(queries, 60)
    assert torch.equal(found, ExactSearcher(bank, SearchOptions()).nearest(queries, 60))


def test_recall_is_a_share_of_the_exact():
    def keys(*rows):
        return torch.stack([pack(torch.tensor([3.0, 2.0, 1.0]), torch.tensor(row)) for row in rows])

    found, exact = keys([4, 5, 6], [1, 2, 3]), keys([5, 4, 9], [1, 7, 8])
    assert recall(found, exact, 3) == (2 + 1) / 6
    assert recall(found, exact, 1) == 1 / 2


def test_merging_keeps_the_lower_row():
    one, two = torch.ones(1, 1), torch.ones(1, 1)
    both = merge([pack(one, torch.tensor([[9]])), pack(two, torch.tensor([[3]]))], 1)
    assert unpack(both)[1].item() == 3


def test_only_numbers_that_are_not_finite_are_refused():
    """Also where a sum of finite numbers is infinite, and one of two infinities is not a number."""
    large = torch.full((2, 4), 3e38)
    assert large.sum().isinf()
    assert torch.equal(read(large, slice(0, 2)), large)
    for pair in ((np.inf, -np.inf), (np.inf, 1), (np.nan, 1), (-np.inf, 3e38)):
        with pytest.raises(UsageError, match="a query feature is not finite"):
            read(np.array([pair], np.float32), slice(0, 1), name="query")


def test_refuses():
    with pytest.raises(UsageError, match='no search "integers": choose one of auto, faiss, torch'):
        SearchOptions.from_name("integers", torch.device("cpu"))
    with pytest.raises(UsageError, match='no search "fais": did you mean "faiss"'):
        SearchOptions.from_name("fais", torch.device("cpu"))
    with pytest.raises(UsageError, match="1 row or more, got 0"):
        SearchOptions.from_name("auto", torch.device("cpu"), 0)
    with pytest.raises(ValueError, match="not empty"):
        ExactSearcher(np.empty((0, 3), np.float32), SearchOptions())
    with pytest.raises(UsageError, match="a training feature is not finite"):
        ExactSearcher(np.array([[1, np.inf]], np.float32), SearchOptions()).nearest(
            torch.ones(1, 2), 1
        )
    assert SearchOptions.from_name("auto", torch.device("cuda")).engine == "torch"


def test_faiss_takes_the_threads_of_torch_and_gives_its_own_back():
    torch.set_num_threads(2)  # where both share one OpenMP, these are faiss's already
    settings = [faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_query_bs]
    with search.faiss_settings():
        assert faiss.omp_get_max_threads() == 2
        assert faiss.cvar.distance_compute_blas_query_bs == search.TILE[0]
    assert settings == [faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_query_bs]


def test_torch_measures_as_numpy_does():
    """The way of other devices, tried on this one."""
    bank, queries = (as_float32(table) for table in made(200, 30, 64, "normal", 0))
    row = torch.randint(200, (30, 12))
    asked = search._products(queries, bank, row).float()
    assert torch.equal(asked, search._products_by_numpy(queries, bank, row).float())
    assert torch.equal(asked, search.similarities(queries, bank, row))
    some = torch.tensor([3, 3, 29])
    assert torch.equal(search.similarities(queries, bank, row[some], some), asked[some])
