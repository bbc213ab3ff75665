"""The rows of a bank with about the largest products, found with 16-bit integers: compiled, for CPUs.

A processor with AVX2 multiplies sixteen pairs of 16-bit integers and adds neighbours in one
instruction (pmaddwd), where its fused multiply-add takes eight pairs of float32. So rows are
rounded to integers, which costs some 2e-4 of their length, and multiplied in exact 32-bit
arithmetic. What rounding can have moved a product by is returned with the answer (Cauchy-Schwarz on
the rounding errors, which are measured), so a caller can tell which rows may be missing from it.

Products never reach memory: a tile of 6 queries and 16 rows stays in sixteen vector registers and
is compared there with the least product that still counts for each query (the blocking is that of
Goto & van de Geijn 2008, https://doi.org/10.1145/1356052.1356053). What passes is collected, and
the least is raised whenever a query's collection is full.

Letters: N rows of the bank, M queries, D width, P = ceil(D / 2) pairs of numbers.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

from xdino_eval.knn.inner_products import shared_out

LANES = 8  # 32-bit sums of a 256-bit register
VECTORS = 2  # registers of rows in a tile
QUERIES = 6  # queries in a tile: 12 registers of sums leave 4 of 16 for their operands
ROWS = LANES * VECTORS
LENGTH = 32_000  # of the longest row in integers: products stay below 2^31, numbers below 2^15
PIECE = 1 << 22  # integers of the bank at a time: 8 MB, for the cache that cores share
BAND = 1 << 17  # integers of the queries at a time: 256 kB, for a core's own
KEPT = 1 << 23  # collected products at a time: 64 MB


def suits_this_cpu() -> bool:
    """Whether this is known to be the fastest search here: AVX2, and not AVX-512.

    With AVX-512 float32 products are twice as fast, and which is faster was not measured.
    """
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx2")) and not features.get("avx512f")


@intrinsic  # type: ignore[misc, unused-ignore]
def _tile(
    context: Any, queries: Any, rows: Any, pairs: Any, least: Any, products: Any, above: Any
) -> tuple[Any, Callable[..., Any]]:
    """Products of a tile, and which of them are above the least of their query.

    All arguments but `pairs`, P, are addresses. queries: int16 [P, QUERIES, 2]. rows: int16
    [P, ROWS, 2]. least: int32 [QUERIES]. Written: products, int32 [QUERIES, ROWS]; above, int32
    [QUERIES], bit j for row j. Returns int64, 0 where nothing is above.

    Written in LLVM's language because its compiler keeps no array of sums in registers by itself.
    Nothing here names a processor: where there is no pmaddwd, LLVM finds what does the same.
    """
    address, number = numba.types.uintp, numba.types.int64
    signature = number(address, address, number, address, address, address)
    half, word, long = ir.IntType(16), ir.IntType(32), ir.IntType(64)
    sums, halves, wide = (
        ir.VectorType(word, LANES), ir.VectorType(half, 2 * LANES), ir.VectorType(word, 2 * LANES),
    )  # fmt: skip
    places = list(itertools.product(range(QUERIES), range(VECTORS)))

    def generate(_: Any, build: Any, __: Any, arguments: Any) -> Any:
        def pointer(which: int, kind: Any) -> Any:
            return build.inttoptr(arguments[which], kind.as_pointer())

        def load(base: Any, place: Any) -> Any:
            value = build.load(build.gep(base, [place]))
            value.align = 4
            return value

        def store(value: Any, base: Any, place: int) -> None:
            build.store(value, build.gep(base, [long(place)])).align = 4

        def everywhere(value: Any) -> Any:
            empty = ir.Constant(sums, ir.Undefined)
            first = build.insert_element(empty, value, word(0))
            return build.shuffle_vector(first, empty, ir.Constant(sums, [0] * LANES))

        def neighbours_added(products: Any) -> Any:
            empty = ir.Constant(wide, ir.Undefined)
            even, odd = (
                build.shuffle_vector(
                    products, empty, ir.Constant(sums, list(range(first, 2 * LANES, 2)))
                )
                for first in (0, 1)
            )
            return build.add(even, odd)

        left, right = pointer(0, word), pointer(1, halves)
        pairs = arguments[2]
        before, loop, after = build.block, *map(build.append_basic_block, ("loop", "after"))
        build.branch(loop)
        build.position_at_end(loop)
        pair = build.phi(long)
        pair.add_incoming(long(0), before)
        so_far = {place: build.phi(sums) for place in places}
        for total in so_far.values():
            total.add_incoming(ir.Constant(sums, None), before)
        near = [
            build.sext(load(right, build.add(build.mul(pair, long(VECTORS)), long(v))), wide)
            for v in range(VECTORS)
        ]
        asked = [
            load(left, build.add(build.mul(pair, long(QUERIES)), long(q))) for q in range(QUERIES)
        ]
        asked = [build.sext(build.bitcast(everywhere(two), halves), wide) for two in asked]
        total = {
            (q, v): build.add(
                so_far[q, v], neighbours_added(build.mul(asked[q], near[v], flags=["nsw"]))
            )
            for q, v in places
        }
        following = build.add(pair, long(1))
        pair.add_incoming(following, loop)
        for place in places:
            so_far[place].add_incoming(total[place], loop)
        build.cbranch(build.icmp_signed("<", following, pairs), loop, after)

        build.position_at_end(after)
        least, products, above = pointer(3, word), pointer(4, sums), pointer(5, word)
        found = word(0)
        for q in range(QUERIES):
            bound, bits = everywhere(load(least, long(q))), word(0)
            for v in range(VECTORS):
                passed = build.icmp_signed(">", total[q, v], bound)
                passed = build.zext(build.bitcast(passed, ir.IntType(LANES)), word)
                bits = build.or_(bits, build.shl(passed, word(LANES * v)))
                store(total[q, v], products, q * VECTORS + v)
            store(bits, above, q)
            found = build.or_(found, bits)
        return build.zext(found, long)

    return signature, generate


@intrinsic  # type: ignore[misc, unused-ignore]
def _lowest(context: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """The place of the lowest bit that is set."""

    def generate(_: Any, build: Any, __: Any, arguments: Any) -> Any:
        return build.cttz(arguments[0], ir.Constant(ir.IntType(1), True))

    return bits(bits), generate


@numba.njit(nogil=True, cache=True)
def _rounded(
    rows: np.ndarray, scale: np.ndarray, out: np.ndarray, lost: np.ndarray, first: int, last: int
) -> None:
    """Rows `first` to `last` as integers.

    rows: float32 [n, D]. scale: float64 [n]. out: int16 [ceil(n / W), P, W, 2], zero where there is
    no row, or no D-th number. lost: float64 [n], the length of (row - integers / scale).
    """
    W = out.shape[2]
    for i in range(first, last):
        into = out[i // W, :, i % W]
        total = 0.0
        for d in range(rows.shape[1]):
            exact = rows[i, d] * scale[i]
            whole = np.rint(exact)
            total += (exact - whole) ** 2
            into[d >> 1, d & 1] = np.int16(whole)
        lost[i] = np.sqrt(total) / scale[i]


@numba.njit(nogil=True, cache=True)
def _lengths(rows: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
    for i in range(first, last):
        total = 0.0
        for d in range(rows.shape[1]):
            total += np.float64(rows[i, d]) ** 2
        out[i] = np.sqrt(total)


@numba.njit(nogil=True, cache=True)
def _keep(keys: np.ndarray, m: int) -> int:
    """Bring the m largest of `keys`, all different, to the front; returns the least of these.

    Hoare's selection (1961, https://doi.org/10.1145/366622.366647).
    """
    first, last = 0, len(keys) - 1
    while first < last:
        pivot = keys[(first + last) >> 1]
        i, j = first, last
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if m - 1 <= j:
            last = j
        elif m - 1 >= i:
            first = i
        else:
            break
    return int(keys[m - 1])


@numba.njit(nogil=True, cache=True)
def _collect(
    asked: np.ndarray,
    near: np.ndarray,
    offset: int,
    count: int,
    m: int,
    least: np.ndarray,
    keys: np.ndarray,
    filled: np.ndarray,
    band: int,
    first: int,
    last: int,
) -> None:
    """What tiles `first` to `last` of the queries find in a piece of the bank.

    asked: int16 [tiles, P, QUERIES, 2]. near: int16 [panels, P, ROWS, 2], of which the first
    `count` rows exist; their numbers begin at `offset`. keys: int64 [tiles * QUERIES, room], of
    which `filled` [tiles * QUERIES] are: products above, rows' complements below, in no order.
    least: int32 [tiles, QUERIES], what a product must exceed. band: tiles of queries at a time.
    """
    products = np.empty((QUERIES, ROWS), np.int32)
    above = np.empty(QUERIES, np.int32)
    for start in range(first, last, band):
        for panel in range(near.shape[0]):
            for tile in range(start, min(start + band, last)):
                found = _tile(
                    asked[tile].ctypes.data, near[panel].ctypes.data, asked.shape[1],
                    least[tile].ctypes.data, products.ctypes.data, above.ctypes.data,
                )  # fmt: skip
                if not found:
                    continue
                for q in range(QUERIES):
                    bits, query = above[q], tile * QUERIES + q
                    while bits:
                        j = _lowest(bits)
                        bits &= bits - 1
                        row = panel * ROWS + j
                        # The least may have risen since the tile was compared with it.
                        if row >= count or products[q, j] <= least[tile, q]:
                            continue
                        value = np.int64(products[q, j]) << 32
                        keys[query, filled[query]] = value | (0xFFFFFFFF - (offset + row))
                        filled[query] += 1
                        if filled[query] == keys.shape[1]:
                            least[tile, q] = _keep(keys[query], m) >> 32
                            filled[query] = m


def largest(
    queries: np.ndarray, bank: np.ndarray, m: int, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """About the m rows of the bank with the largest inner product with each query.

    Args:
        queries: float32 [M, D]. bank: float32 [N, D], finite as the queries, N < 2^32. m: at most N.

    Returns:
        Products, float32 [M, m], descending; rows, int64 [M, m]; and `error`, float64 [M]: no row
        that is missing has a product that exceeds the query's last by more. None where lengths are
        of a size (the longest row below 1e-15 or above 1e15) at which float32 itself gives way.
    """
    row_length, length = (_lengths_of(rows, threads) for rows in (bank, queries))
    longest = float(row_length.max())
    if not 1e-15 < longest < 1e15 or not length.max(initial=0) < 1e15:
        return None
    shape = len(queries), m
    product, row, error = np.empty(shape, np.float32), np.empty(shape, np.int64), np.empty(shape[0])
    room = m + max(64, m)
    step = max(QUERIES, KEPT // room)
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        some = _Search(queries[part], length[part], m, room, threads)
        some.through(bank, longest)
        product[part], row[part], error[part] = some.found()
    return product, row, error


def _lengths_of(rows: np.ndarray, threads: int) -> np.ndarray:
    found = np.empty(len(rows))
    shared_out(len(rows), threads, lambda first, last: _lengths(rows, first, last, found))
    return found


class _Search:
    """Some queries on their way through the bank."""

    def __init__(
        self, queries: np.ndarray, length: np.ndarray, m: int, room: int, threads: int
    ) -> None:
        M, D = queries.shape
        tiles, self.P = -(-M // QUERIES), -(-D // 2)
        self.M, self.m, self.length, self.threads = M, m, length, threads
        self.scale = LENGTH / np.maximum(length, 1e-30)
        self.asked = np.zeros((tiles, self.P, QUERIES, 2), np.int16)
        self.lost = self._round(queries, self.scale, self.asked)
        # No product is above the highest: places of a tile where there is no query find nothing.
        self.least = np.full((tiles, QUERIES), np.iinfo(np.int32).max, np.int32)
        self.least.reshape(-1)[:M] = np.iinfo(np.int32).min
        self.keys = np.empty((tiles * QUERIES, room), np.int64)
        self.filled = np.zeros(tiles * QUERIES, np.int64)

    def _round(self, rows: np.ndarray, scale: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write `rows` to `out` as integers; returns what each lost, float64 [n]."""
        lost = np.empty(len(rows))
        shared_out(len(rows), self.threads, lambda a, b: _rounded(rows, scale, out, lost, a, b))
        return lost

    def through(self, bank: np.ndarray, longest: float) -> None:
        """Collect from every row of `bank`, the longest of which is so long."""
        step = max(1, PIECE // (2 * self.P * ROWS)) * ROWS
        band = max(1, BAND // (2 * self.P * QUERIES))
        space = np.zeros((min(step, len(bank) + ROWS) // ROWS, self.P, ROWS, 2), np.int16)
        scale = np.full(min(step, len(bank)), LENGTH / longest)
        lost = 0.0
        for start in range(0, len(bank), step):
            rows = bank[start : start + step]
            near = space[: -(-len(rows) // ROWS)]
            lost = max(lost, float(self._round(rows, scale, near).max()))
            collect = partial(
                _collect, self.asked, near, start, len(rows), self.m, self.least, self.keys,
                self.filled, band,
            )  # fmt: skip
            shared_out(len(self.asked), self.threads, collect)
        self.unit = longest / LENGTH / self.scale
        # |q x - q' x'| <= |q - q'| |x| + |q'| |x - x'|, and what float32 rounds off at the end.
        self.error = self.lost * longest + (self.length + self.lost) * lost
        self.error += 2**-22 * self.length * longest

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The answer of `largest`."""
        keys, filled = (torch.from_numpy(table[: self.M]) for table in (self.keys, self.filled))
        beyond = torch.arange(keys.shape[1]) >= filled[:, None]
        keys.masked_fill_(beyond, torch.iinfo(keys.dtype).min)
        best = keys.topk(self.m, dim=1).values.numpy()
        product = ((best >> 32) * self.unit[:, None]).astype(np.float32)
        return product, 0xFFFFFFFF - (best & 0xFFFFFFFF), self.error
