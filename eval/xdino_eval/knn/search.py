"""The nearest rows of a bank: one answer, whatever finds it and however the bank is cut.

A product in float32 depends in its last bits on the library and on the shape of the block that it
was computed in, so two searches of one bank may order near-equals differently. Here the similarity
of two rows is *defined* as their inner product in float64, rounded to float32, and of equal
similarities the lower row is the nearer. Products in float32 (faiss's on the CPU, torch's on any
device) only propose candidates; these are measured by the definition. Where the rounding error of
float32 leaves it open whether a row that was not proposed belongs in the answer, that query is
searched again in float64. So whole bank, blocks, processes and devices give the same neighbours,
bit for bit.

A bank larger than memory is read a block at a time (see `tables`). For very large banks an inverted
file (Jégou et al. 2011, https://doi.org/10.1109/TPAMI.2010.57) or a graph (HNSW, Malkov & Yashunin
2018, https://arxiv.org/abs/1603.09320) finds most of the neighbours; `keys.recall` says how many.

Letters: N rows of the bank, M queries, D width, b queries of a block, n rows of a block of the
bank, m candidates of a query.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from xdino.errors import UsageError, nearest
from xdino_eval.knn.keys import EMPTY, merge, pack, unpack
from xdino_eval.knn.tables import CPU, Table, read, take

SEARCHES = ("auto", "faiss", "torch", "ivf", "hnsw")
MARGIN = 16  # candidates beyond the k-th: what rounding leaves open is seldom more than a few rows
PAIRS = 1 << 19  # float64 numbers at a time while candidates are measured: 4 MB, near the cores
PIECE = 8192  # rows of the bank at a time in float64
BAND = 512  # queries at a time in float64, and for torch's products
# Queries and rows that faiss multiplies at a time, 32 MB of products: some 5 % faster on one
# machine with two cores (interleaved, nine times each) than its own 4096 and 1024.
TILE = (2048, 4096)


@dataclass(frozen=True)
class SearchOptions:
    """How neighbours are looked for; no exact choice changes the answer.

    engine: "faiss" or "torch", exact, or "auto": faiss on a CPU, torch elsewhere; "ivf" or "hnsw",
    most of the neighbours. device: where torch searches. bank_block: rows of the bank in memory at a
    time, None = the bank as a whole. query_block: queries at a time, which bounds what the search
    holds beside the bank.
    """

    engine: str = "auto"
    device: torch.device = CPU
    bank_block: int | None = None
    query_block: int = 8192

    @classmethod
    def from_name(
        cls, search: str, device: torch.device, bank_block: int | None = None
    ) -> "SearchOptions":
        """`search` is one of SEARCHES; "auto" is torch on a CUDA device.

        Raises:
            UsageError: another name, or a block without a row.
        """
        if search not in SEARCHES:
            raise UsageError(f'there is no search "{search}": {nearest(search, SEARCHES)}')
        if bank_block is not None and bank_block < 1:
            raise UsageError(f"a block of the bank has 1 row or more, got {bank_block}")
        if search == "auto" and device.type == "cuda":
            search = "torch"
        return cls(search, device if search == "torch" else CPU, bank_block)

    @property
    def exact(self) -> bool:
        return self.engine in ("auto", *ENGINES)

    def index_settings(self, rows: int) -> dict[str, Any]:
        """How an index over `rows` rows is built and searched, for a row of results."""
        if self.engine == "ivf":
            lists = max(1, min(round(4 * math.sqrt(rows)), rows // 39))  # 39: faiss's least a list
            return {"search": "ivf", "lists": lists, "probes": math.ceil(lists / 16)}
        return {} if self.exact else {"search": "hnsw", "links": 32}


EXACT = SearchOptions()


class Searcher(Protocol):
    """What answers queries, float32 [b, D], by keys, int64 [b, min(k, N)], the nearest first."""

    def nearest(self, queries: Tensor, k: int) -> Tensor: ...


def searcher(bank: Table, options: SearchOptions) -> Searcher:
    """What `options` ask for, over the rows of `bank`."""
    return ExactSearcher(bank, options) if options.exact else IndexSearcher(bank, options)


def nearest_neighbours(
    bank: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `bank` with the largest inner product with each query, exactly.

    Args:
        bank: float32 [N, D]. queries: float32 [b, D]. k: at most N.

    Returns:
        Similarities, float32 [b, k], descending, and rows of the bank, int64 [b, k]; where
        similarities are equal the lower row comes first, and is the one that is kept.
    """
    asked = read(queries, slice(None), name="query")
    similarity, row = unpack(ExactSearcher(bank, EXACT).nearest(asked, k))
    return similarity.numpy(), row.numpy()


def similarities(queries: Tensor, bank: Tensor, row: Tensor, query: Tensor | None = None) -> Tensor:
    """The definition: inner products of queries and rows of the bank, float32 [b, m].

    Args:
        queries: float32 [M, D]. bank: float32 [n, D]. row: int64 [b, m], rows of the bank.
        query: int64 [b], the query that each line of `row` belongs to; None = in order, b = M.
    """
    cpu = queries.device.type == "cpu"
    step = max(1, (PAIRS if cpu else 64 * PAIRS) // (max(1, row.shape[1]) * queries.shape[1]))
    found = torch.empty(row.shape, device=queries.device)
    for start in range(0, len(row), step):
        lines = slice(start, start + step)
        asked = queries[lines] if query is None else queries[query[lines]]
        found[lines] = (_products_by_numpy if cpu else _products)(asked, bank, row[lines])
    return found


def _products(queries: Tensor, bank: Tensor, row: Tensor) -> Tensor:
    """float64 [b, m] of queries float32 [b, D] and `row` int64 [b, m] of bank float32 [n, D]."""
    return (bank[row].double() * queries.double()[:, None]).sum(-1)


def _products_by_numpy(queries: Tensor, bank: Tensor, row: Tensor) -> Tensor:
    """The same on one core: torch's threads would wait for each other after every small block."""
    near = bank.numpy()[row.numpy()].astype(np.float64)  # [b, m, D]
    return torch.from_numpy((near @ queries.numpy().astype(np.float64)[:, :, None])[:, :, 0])


# --- exact ------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """Candidates of some queries from a block of the bank.

    product: float32 [b, m], descending. row: int64 [b, m], numbered from the block's first. error:
    float64 [b]: no other row of the block has a product, by the definition, that exceeds the last
    candidate's by more.
    """

    product: Tensor
    row: Tensor
    error: Tensor


def _float32_error(bank: Tensor, queries: Tensor) -> Tensor:
    """float64 [b]: |float32 product - exact| <= D u / (1 - D u) |q| |x|, u = 2^-24, in any order.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    share = bank.shape[1] * 2**-24
    length = queries.double().norm(dim=1) * bank.norm(dim=1).max().item()
    return 1.01 * share / (1 - min(0.5, share)) * length


def by_faiss(bank: Tensor, queries: Tensor, m: int) -> Proposal:
    """The m rows with the largest float32 products, by faiss."""
    with faiss_settings():
        found = faiss.knn(queries.numpy(), bank.numpy(), m, metric=faiss.METRIC_INNER_PRODUCT)
    product, row = map(torch.from_numpy, found)
    return Proposal(product, row, _float32_error(bank, queries))


@contextlib.contextmanager
def faiss_settings() -> Iterator[None]:
    """Inside, faiss multiplies TILE at a time with as many threads as torch; put back afterwards."""
    names = ("distance_compute_blas_query_bs", "distance_compute_blas_database_bs")
    tile = [getattr(faiss.cvar, name) for name in names]
    threads = faiss.omp_get_max_threads()

    def apply(threads: int, tile: Sequence[int]) -> None:
        faiss.omp_set_num_threads(threads)
        for name, value in zip(names, tile, strict=True):
            setattr(faiss.cvar, name, value)

    apply(torch.get_num_threads(), TILE)
    try:
        yield
    finally:
        apply(threads, tile)


def by_torch(bank: Tensor, queries: Tensor, m: int) -> Proposal:
    """The same by matmul and topk in float32 on the tensors' device, a tile at a time."""
    band = BAND if bank.device.type == "cpu" else 4 * BAND
    bands = []
    for some in queries.split(band):
        value = some.new_empty(len(some), 0)
        row = torch.empty(len(some), 0, dtype=torch.int64, device=some.device)
        for number, piece in enumerate(bank.split(4 * PIECE)):
            tile = some @ piece.T
            top = tile.topk(min(m, tile.shape[1]), dim=1)
            value = torch.cat([value, top.values], 1)
            row = torch.cat([row, top.indices + 4 * PIECE * number], 1)
            kept = value.topk(min(m, value.shape[1]), dim=1)
            value, row = kept.values, row.gather(1, kept.indices)
        bands.append((value, row))
    product, row = (torch.cat(parts) for parts in zip(*bands, strict=True))
    return Proposal(product, row, _float32_error(bank, queries))


ENGINES: dict[str, Callable[[Tensor, Tensor, int], Proposal]] = {
    "faiss": by_faiss,
    "torch": by_torch,
}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 or bf16 inside them would break the bound on their error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class ExactSearcher:
    """The k nearest rows by the definition; see the top of this file.

    Args:
        bank: float [N, D], read a block at a time for each block of queries.
    """

    def __init__(self, bank: Table, options: SearchOptions) -> None:
        if len(bank.shape) != 2 or not bank.shape[0]:
            raise ValueError(f"a bank must be [rows, width] and not empty: {tuple(bank.shape)}")
        self.bank, self.options = bank, options
        engine = options.engine
        if engine == "auto":
            engine = "faiss" if options.device.type == "cpu" else "torch"
        self.propose = ENGINES[engine]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, float32 [n, D] on the device) of each block of the bank."""
        step = self.options.bank_block or self.bank.shape[0]
        for start in range(0, self.bank.shape[0], step):
            yield start, read(self.bank, slice(start, start + step), self.options.device)

    @torch.inference_mode()
    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """Keys, int64 [b, min(k, N)], of queries float32 [b, D], on the search's device."""
        N = self.bank.shape[0]
        queries = queries.to(self.options.device)
        k, m = min(k, N), min(k + MARGIN, N)
        keys, beyond = self._candidates(queries, m)
        found = keys.topk(k, dim=1).values
        if m < N:
            last = unpack(found[:, -1])[0].double()
            unsure = (~(last > beyond)).nonzero()[:, 0]
            if len(unsure):
                found[unsure] = self._in_float64(queries[unsure], k)
        return found

    def _candidates(self, queries: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Keys, int64 [b, m], of the rows with about the largest products; and float64 [b]: no other
        row's similarity is larger."""
        product = queries.new_empty(len(queries), 0)  # float32 [b, at most m], descending
        keys = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        error = torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
        with full_precision():
            for start, block in self.blocks():
                found = self.propose(block, queries, min(m, len(block)))
                error = torch.maximum(error, found.error)
                if not start:
                    product = found.product
                    keys = pack(similarities(queries, block, found.row), found.row)
                    continue
                both = torch.cat([product, found.product], 1)
                kept = both.topk(min(m, both.shape[1]), dim=1)
                fresh = kept.indices >= product.shape[1]  # measured while their block is here
                query, place = fresh.nonzero(as_tuple=True)
                row = found.row[query, kept.indices[query, place] - product.shape[1]]
                unmeasured = torch.full_like(found.row, EMPTY)
                keys = torch.cat([keys, unmeasured], 1).gather(1, kept.indices)
                product = kept.values
                measured = similarities(queries, block, row[:, None], query)[:, 0]
                keys[query, place] = pack(measured, row + start)
        return keys, product[:, -1].double() + error

    def _in_float64(self, queries: Tensor, k: int) -> Tensor:
        """The definition for every pair: keys, int64 [b, k]."""
        wide = queries.double()
        best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start, block in self.blocks():
            inside = best.new_empty(len(queries), 0)
            for number, piece in enumerate(block.split(PIECE)):
                rows = piece.double()
                row = torch.arange(len(rows), device=block.device) + (start + PIECE * number)
                top = [merge([pack((band @ rows.T).float(), row)], k) for band in wide.split(BAND)]
                inside = merge([inside, torch.cat(top)], k)
            best = merge([best, inside], k)
        return best


# --- most of the neighbours -------------------------------------------------------------------


class IndexSearcher:
    """An inverted file or a graph over the bank; it holds a copy of the bank's rows.

    Its candidates are measured and ordered by the definition; what it misses, `keys.recall` shows. A
    query for which it finds fewer than k rows is searched exactly.

    Args:
        options: engine "ivf" (4 sqrt(N) lists, a sixteenth of them visited) or "hnsw" (32 links,
            depth of search 4 k but at least 256).
    """

    def __init__(self, bank: Table, options: SearchOptions) -> None:
        N, D = bank.shape
        self.bank, self.options = bank, options
        self.exact = ExactSearcher(bank, SearchOptions(bank_block=options.bank_block))
        settings = options.index_settings(N)
        with faiss_settings():
            if options.engine == "ivf":
                lists = settings["lists"]
                index: Any = faiss.IndexIVFFlat(
                    faiss.IndexFlatIP(D), D, lists, faiss.METRIC_INNER_PRODUCT
                )
                spread = np.linspace(0, N - 1, min(N, 64 * lists)).astype(np.int64)
                index.train(take(bank, spread).numpy())
                index.nprobe = settings["probes"]
            else:
                index = faiss.IndexHNSWFlat(D, settings["links"], faiss.METRIC_INNER_PRODUCT)
                index.hnsw.efConstruction = 200
            for _, block in self.exact.blocks():
                index.add(block.numpy())
            if options.engine == "ivf":
                index.make_direct_map()
        self.index = index

    @torch.inference_mode()
    def nearest(self, queries: Tensor, k: int) -> Tensor:
        k = min(k, self.bank.shape[0])
        queries = queries.cpu()
        if self.options.engine == "hnsw":
            self.index.hnsw.efSearch = max(256, 4 * k)
        with faiss_settings():
            _, rows = self.index.search(queries.numpy(), k)
        found = torch.from_numpy(rows)  # [b, k], -1 where there are no more
        keys = torch.full_like(found, EMPTY)
        for start in range(0, len(found), 64):
            some = found[start : start + 64]
            query, place = (some >= 0).nonzero(as_tuple=True)
            row = some[query, place]
            if len(row):
                vectors = torch.from_numpy(self.index.reconstruct_batch(row.numpy()))
                measured = similarities(
                    queries, vectors, torch.arange(len(row))[:, None], start + query
                )
                keys[start + query, place] = pack(measured[:, 0], row)
        keys = keys.sort(dim=1, descending=True).values
        short = (found < 0).any(1).nonzero()[:, 0]
        if len(short):
            keys[short] = self.exact.nearest(queries[short], k)
        return keys
