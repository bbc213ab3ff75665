"""The nearest rows of a bank: one answer, whatever finds it and however the bank is cut.

A product in float32 depends in its last bits on the library and on the shape of the block that it
was computed in, so two searches of one bank may order near-equals differently. Here the similarity
of two rows is *defined* as their inner product in float64, rounded to float32, and of equal
similarities the lower row is the nearer. Fast products (of 16-bit integers or faiss's in float32 on
the CPU, torch's in float32 on any device) only propose candidates; these are measured by the
definition. Where the rounding error of the fast product leaves it open whether a row that was not
proposed belongs in the answer, that query is searched again: after integers by faiss, then in
float64. So whole bank, blocks, processes and devices give the same neighbours, bit for bit.

A neighbour is carried as one int64, its key: the similarity's bits above, the row's complement
below. Keys are unique and order as neighbours do, so merging two answers is `topk` of both.

A bank larger than memory is any table that can be sliced (a memory-mapped array or tensor, a tensor
in a safetensors file): it is read a block at a time. For very large banks an inverted file (Jégou
et al. 2011, https://doi.org/10.1109/TPAMI.2010.57) or a graph (HNSW, Malkov & Yashunin 2018,
https://arxiv.org/abs/1603.09320) finds most of the neighbours; `recall` says how many.

Letters: N rows of the bank, M queries, D width, b queries of a block, n rows of a block of the bank.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from xdino.errors import UsageError, nearest
from xdino.runtime import distributed

SEARCHES = ("auto", "integers", "faiss", "torch", "ivf", "hnsw")
MARGIN = 16  # candidates beyond the k-th: what rounding leaves open is seldom more than a few rows
WORTH = 1 << 32  # products from which integers pay for being compiled, once an installation: 0.1 s
PAIRS = 1 << 19  # float64 numbers at a time while candidates are measured: 4 MB, near the cores
PIECE = 8192  # rows of the bank at a time in float64
BAND = 512  # queries at a time in float64, and for torch's products
# Queries and rows that faiss multiplies at a time, 32 MB of products: some 5 % faster on one
# machine with two cores (interleaved, nine times each) than its own 4096 and 1024.
TILE = (2048, 4096)


class Table(Protocol):
    """float [N, D] that can be sliced: an array, a tensor, either of them memory-mapped, ..."""

    @property
    def shape(self) -> Any: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


CPU = torch.device("cpu")


class StoredTable:
    """A tensor [N, D] of a safetensors file, read slice by slice."""

    def __init__(self, path: Path | str, name: str = "features") -> None:
        self._file = safe_open(path, framework="pt")
        self._slice = self._file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        return self._slice[rows]


class JoinedTable:
    """Tables of one width, one below the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = list(tables)
        self._ends = np.cumsum([table.shape[0] for table in tables])
        self.shape = (int(self._ends[-1]), tables[0].shape[1])

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        for table, end in zip(self._tables, self._ends.tolist(), strict=True):
            first = end - table.shape[0]
            if start < end and first < stop:
                parts.append(as_float32(table[max(0, start - first) : min(stop, end) - first]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class UnitTable:
    """`table` with rows of unit length, made so block by block; a zero row stays zero."""

    def __init__(self, table: Table) -> None:
        self._table, self.shape = table, table.shape

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.nn.functional.normalize(as_float32(self._table[rows]), dim=1)


@dataclass(frozen=True)
class How:
    """How neighbours are looked for; no exact choice changes the answer.

    engine: "integers", "faiss" or "torch", exact, or "auto", whichever of these is the fastest; "ivf"
    or "hnsw", most of the neighbours. device: where torch searches. bank_block: rows of the bank in
    memory at a time, None = the bank as a whole. query_block: queries at a time, which bounds what
    the search holds beside the bank.
    """

    engine: str = "auto"
    device: torch.device = CPU
    bank_block: int | None = None
    query_block: int = 8192

    @classmethod
    def named(cls, search: str, device: torch.device, bank_block: int | None = None) -> "How":
        """`search` is one of SEARCHES; "auto" is torch on a CUDA device.

        Raises:
            UsageError: another name, or a block without a row.
        """
        if search not in SEARCHES:
            raise UsageError(f'there is no search "{search}": {nearest(search, SEARCHES)}')
        if bank_block is not None and bank_block < 1:
            raise UsageError(f"a block of the bank has 1 row or more, got {bank_block}")
        if search == "integers" and _compiled("integer_products") is None:
            raise UsageError("--search integers needs numba, which does not work here; try faiss")
        if search == "auto" and device.type == "cuda":
            search = "torch"
        return cls(search, device if search == "torch" else CPU, bank_block)

    @property
    def exact(self) -> bool:
        return self.engine == "auto" or self.engine in ENGINES

    def fastest(self, queries: int, rows: int, width: int) -> str:
        """The exact engine that answers so many queries: `engine`, but for "auto"."""
        if self.engine != "auto":
            return self.engine
        if self.device.type != "cpu":
            return "torch"
        if queries * rows * width >= WORTH:
            compiled = _compiled("integer_products")
            if compiled is not None and compiled.suits_this_cpu():
                return "integers"
        return "faiss"

    def index_settings(self, rows: int) -> dict[str, Any]:
        """How an index over `rows` rows is built and searched, for a row of results."""
        if self.engine == "ivf":
            lists = max(1, min(round(4 * math.sqrt(rows)), rows // 39))  # 39: faiss's least a list
            return {"search": "ivf", "lists": lists, "probes": math.ceil(lists / 16)}
        return {} if self.exact else {"search": "hnsw", "links": 32}


EXACT = How()


class Searcher(Protocol):
    """What answers queries, float32 [b, D], by keys, int64 [b, min(k, N)], the nearest first."""

    def nearest(self, queries: Tensor, k: int) -> Tensor: ...


# --- similarities and keys --------------------------------------------------------------------


def as_float32(part: Any) -> Tensor:
    """float32 [n, D], contiguous; without a copy where the rows are so already."""
    if not isinstance(part, Tensor):
        array = np.ascontiguousarray(part, dtype=np.float32)
        part = torch.from_numpy(array if array.flags.writeable else array.copy())
    return part.detach().float().contiguous()


def read(table: Table, rows: slice, device: torch.device = CPU, name: str = "training") -> Tensor:
    """float32 [n, D] on `device`. Raises UsageError where a number is not finite."""
    part = as_float32(table[rows])
    # Infinities and NaN survive a sum, thirty times as fast as a look at every number; only where
    # the sum of large numbers has itself run over is that look taken.
    if not part.sum().isfinite() and not part.isfinite().all():
        raise UsageError(f"a {name} feature is not finite")
    return part.to(device)


def take(table: Table, rows: np.ndarray, step: int = 1 << 16) -> Tensor:
    """float32 [n, D]: `rows` (int64 [n], ascending), without more than `step` others in memory."""
    if isinstance(table, Tensor):
        return as_float32(table[torch.from_numpy(rows)])
    chosen = [torch.empty(0, table.shape[1])]
    for start in range(0, table.shape[0], step):
        inside = rows[(rows >= start) & (rows < start + step)] - start
        if len(inside):
            part = as_float32(table[start : start + step])
            chosen.append(part[torch.from_numpy(inside)])
    return torch.cat(chosen)


def similarities(queries: Tensor, bank: Tensor, row: Tensor, query: Tensor | None = None) -> Tensor:
    """The definition: inner products of queries and rows of the bank, float32 [b, m].

    Args:
        queries: float32 [M, D]. bank: float32 [n, D]. row: int64 [b, m], rows of the bank.
        query: int64 [b], the query that each line of `row` belongs to; None = in order, b = M.
    """
    if queries.device.type == "cpu" and row.numel():
        compiled = _compiled("inner_products")
        if compiled is not None:
            line = np.arange(len(row)) if query is None else query.numpy()
            threads = torch.get_num_threads()
            tables = queries.contiguous().numpy(), bank.contiguous().numpy()
            return torch.from_numpy(compiled.of_pairs(*tables, line, row.numpy(), threads))
    D, m = queries.shape[1], max(1, row.shape[1])
    step = max(1, (PAIRS if queries.device.type == "cpu" else 64 * PAIRS) // (m * D))
    found = torch.empty(row.shape, device=queries.device)
    for start in range(0, len(row), step):
        lines = slice(start, start + step)
        asked = queries[lines] if query is None else queries[query[lines]]  # [step, D]
        # Multiplied where it lies: every copy of these numbers costs as much as the sums.
        near = bank.index_select(0, row[lines].flatten()).view(-1, m, D)
        products = near.double().mul_(asked.double()[:, None])  # [step, m, D]
        found[lines] = products.sum(-1)
    return found


@lru_cache(maxsize=2)
def _compiled(name: str) -> ModuleType | None:
    """A compiled neighbour of this file; None where numba cannot: others give the same, slower."""
    try:
        return importlib.import_module(f"xdino_eval.{name}")
    except (ImportError, RuntimeError, OSError):
        return None


def pack(similarity: Tensor, row: Tensor) -> Tensor:
    """float32 similarities and int64 rows below 2^32 -> keys, int64 of their broadcast shape."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (0xFFFFFFFF - row)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys -> similarities, float32, and rows, int64, of the same shape."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


EMPTY = torch.iinfo(torch.int64).min
"""A key that comes after all others: no neighbour."""


def merged(keys: list[Tensor], k: int) -> Tensor:
    """The k best of several answers: int64 [b, at most k], the nearest first."""
    together = torch.cat(keys, 1)
    return together.topk(min(k, together.shape[1]), dim=1).values


def without(keys: Tensor, row: np.ndarray) -> Tensor:
    """Keys int64 [b, k + 1] -> [b, k] without each query's own row, int64 [b].

    Where k + 1 others are as near, the own row is not among them, and the last is dropped.
    """
    own = unpack(keys)[1] == torch.from_numpy(row).to(keys.device)[:, None]
    return keys.masked_fill(own, EMPTY).topk(keys.shape[1] - 1, dim=1).values


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


def by_integers(bank: Tensor, queries: Tensor, m: int) -> Proposal:
    """About the m rows with the largest products, by 16-bit integers; by faiss where these cannot."""
    compiled = _compiled("integer_products")
    assert compiled is not None, "How.named and How.fastest have looked"
    tables = queries.contiguous().numpy(), bank.contiguous().numpy()
    found = compiled.largest(*tables, m, torch.get_num_threads())
    return by_faiss(bank, queries, m) if found is None else Proposal(*map(torch.from_numpy, found))


def by_faiss(bank: Tensor, queries: Tensor, m: int) -> Proposal:
    """The same by faiss, in float32."""
    with _faiss_tile():
        found = faiss.knn(queries.numpy(), bank.numpy(), m, metric=faiss.METRIC_INNER_PRODUCT)
    product, row = map(torch.from_numpy, found)
    return Proposal(product, row, _float32_error(bank, queries))


@contextlib.contextmanager
def _faiss_tile() -> Iterator[None]:
    """faiss multiplies TILE at a time inside; a setting for the process, put back afterwards."""
    settings = faiss.cvar
    names = ("distance_compute_blas_query_bs", "distance_compute_blas_database_bs")
    before = [getattr(settings, name) for name in names]
    try:
        for name, value in zip(names, TILE, strict=True):
            setattr(settings, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)


def by_torch(bank: Tensor, queries: Tensor, m: int) -> Proposal:
    """The same by matmul and topk in float32 on the tensors' device, a tile at a time."""
    cpu = bank.device.type == "cpu"
    band, piece = (BAND, 4 * PIECE) if cpu else (4 * BAND, 4 * PIECE)
    bands = []
    for first in range(0, len(queries), band):
        some = queries[first : first + band]
        best = (
            some.new_empty(len(some), 0),
            torch.empty(len(some), 0, dtype=torch.int64, device=some.device),
        )
        for start in range(0, len(bank), piece):
            tile = some @ bank[start : start + piece].T
            top = tile.topk(min(m, tile.shape[1]), dim=1)
            value = torch.cat([best[0], top.values], 1)
            row = torch.cat([best[1], top.indices + start], 1)
            kept = value.topk(min(m, value.shape[1]), dim=1)
            best = kept.values, row.gather(1, kept.indices)
        bands.append(best)
    product, row = (torch.cat(parts) for parts in zip(*bands, strict=True))
    return Proposal(product, row, _float32_error(bank, queries))


Engine = Callable[[Tensor, Tensor, int], Proposal]
ENGINES: dict[str, Engine] = {"integers": by_integers, "faiss": by_faiss, "torch": by_torch}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 or bf16 inside them would break the bound on their error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Exact:
    """The k nearest rows by the definition; see the top of this file.

    Args:
        bank: float [N, D], read a block at a time for each block of queries.
    """

    def __init__(self, bank: Table, how: How) -> None:
        if len(bank.shape) != 2 or not bank.shape[0]:
            raise ValueError(f"a bank must be [rows, width] and not empty: {tuple(bank.shape)}")
        self.bank, self.how = bank, how

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, float32 [n, D] on the device) of each block of the bank."""
        step = self.how.bank_block or self.bank.shape[0]
        for start in range(0, self.bank.shape[0], step):
            yield start, read(self.bank, slice(start, start + step), self.how.device)

    @torch.inference_mode()
    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """Keys, int64 [b, min(k, N)], of queries float32 [b, D], on the search's device."""
        N, D = self.bank.shape
        queries = queries.to(self.how.device)
        k, reach = min(k, N), min(k + MARGIN, N)
        engine = self.how.fastest(len(queries), N, D)
        best = queries.new_empty(len(queries), 0)  # products [b, at most reach], descending
        keys = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        error = torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
        with full_precision():
            for start, part in self.parts():
                found = ENGINES[engine](part, queries, min(reach, len(part)))
                error = torch.maximum(error, found.error)
                if not start:
                    best = found.product
                    keys = pack(similarities(queries, part, found.row), found.row)
                    continue
                both = torch.cat([best, found.product], 1)
                kept = both.topk(min(reach, both.shape[1]), dim=1)
                fresh = kept.indices >= best.shape[1]  # measured while their block is here
                query, place = fresh.nonzero(as_tuple=True)
                row = found.row[query, kept.indices[query, place] - best.shape[1]]
                unmeasured = torch.full_like(found.row, EMPTY)
                keys, best = torch.cat([keys, unmeasured], 1).gather(1, kept.indices), kept.values
                measured = similarities(queries, part, row[:, None], query)[:, 0]
                keys[query, place] = pack(measured, row + start)
        nearest_first = keys.topk(k, dim=1).values
        if reach < N:
            least = unpack(nearest_first[:, -1])[0].double()
            open_ = (~(least > best[:, -1].double() + error)).nonzero()[:, 0]
            if len(open_) and engine == "integers":
                finer = Exact(self.bank, replace(self.how, engine="faiss"))
                nearest_first[open_] = finer.nearest(queries[open_], k)
            elif len(open_):
                nearest_first[open_] = self._in_float64(queries[open_], k)
        return nearest_first

    def _in_float64(self, queries: Tensor, k: int) -> Tensor:
        """The definition for every pair: keys, int64 [b, k]."""
        wide = queries.double()
        best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start, part in self.parts():
            inside = best.new_empty(len(queries), 0)
            for first in range(0, len(part), PIECE):
                piece = part[first : first + PIECE].double()
                row = torch.arange(len(piece), device=part.device) + (start + first)
                top = [
                    merged([pack((band @ piece.T).float(), row)], k) for band in wide.split(BAND)
                ]
                inside = merged([inside, torch.cat(top)], k)
            best = merged([best, inside], k)
        return best


# --- most of the neighbours -------------------------------------------------------------------


class Index:
    """An inverted file or a graph over the bank; it holds a copy of the bank's rows.

    Its candidates are measured and ordered by the definition; what it misses, `recall` shows. A
    query for which it finds fewer than k rows is searched exactly.

    Args:
        how: engine "ivf" (4 sqrt(N) lists, a sixteenth of them visited) or "hnsw" (32 links, depth
            of search 4 k but at least 256).
    """

    def __init__(self, bank: Table, how: How) -> None:
        N, D = bank.shape
        self.bank, self.how = bank, how
        self.exact = Exact(bank, How(bank_block=how.bank_block))
        settings = how.index_settings(N)
        if how.engine == "ivf":
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
        for _, part in self.exact.parts():
            index.add(part.numpy())
        if how.engine == "ivf":
            index.make_direct_map()
        self.index = index

    @torch.inference_mode()
    def nearest(self, queries: Tensor, k: int) -> Tensor:
        k = min(k, self.bank.shape[0])
        queries = queries.cpu()
        if self.how.engine == "hnsw":
            self.index.hnsw.efSearch = max(256, 4 * k)
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


def recall(found: Tensor, exact: Tensor, k: int) -> float:
    """The share of the exact k nearest that is among the k found; keys int64 [b, k or more]."""
    k = min(k, exact.shape[1])
    ours, theirs = unpack(found[:, :k])[1], unpack(exact[:, :k])[1]
    return (theirs[:, :, None] == ours[:, None, :]).any(2).double().mean().item()


# --- over processes ---------------------------------------------------------------------------


class Share:
    """A searcher of this process's rows that answers for the rows of all processes.

    Every process must ask the same queries in the same order.

    Args:
        inner: searches this process's rows; None where it has none.
        offset: the number, among all rows, of this process's first.
        total: the rows of all processes.
    """

    def __init__(self, inner: Searcher | None, offset: int, total: int) -> None:
        self.inner, self.offset, self.total = inner, offset, total

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        k = min(k, self.total)
        keys = torch.full((len(queries), k), EMPTY)
        if self.inner is not None:
            own = self.inner.nearest(queries, k).cpu()
            keys[:, : own.shape[1]] = own - self.offset  # a key holds the row's complement
        return merged(distributed.gather_tensor(keys), k)


def searcher(bank: Table, how: How) -> Exact | Index:
    """What `how` asks for, over the rows of `bank`."""
    return Exact(bank, how) if how.exact else Index(bank, how)
