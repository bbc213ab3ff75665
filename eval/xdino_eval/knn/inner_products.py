"""Inner products of given pairs of rows, summed in float64: compiled, for CPUs.

torch has no operation for "these rows of that table": it copies each row, widens it, multiplies and
sums in four passes over memory. Here a pair is read once.

Letters: M queries, N rows of the table, D width, b lines of m pairs.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

FEW = 1 << 22  # numbers to multiply from which a second thread pays


# The order of a sum is the compiler's to choose (else it could not use vectors): in float64 that
# moves a result by some 1e-16, far below the float32 that it is rounded to.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _some(
    queries: np.ndarray, table: np.ndarray, query: np.ndarray, row: np.ndarray, out: np.ndarray
) -> None:
    wide = np.empty(queries.shape[1], np.float64)
    for line in range(row.shape[0]):
        for d in range(len(wide)):
            wide[d] = queries[query[line], d]
        for pair in range(row.shape[1]):
            near = table[row[line, pair]]
            total = 0.0
            for d in range(len(wide)):
                total += wide[d] * np.float64(near[d])
            out[line, pair] = np.float32(total)


def shared_out(count: int, threads: int, work: Callable[[int, int], None]) -> None:
    """work(first, last) over the range(count), each thread a part of it."""
    threads = max(1, min(threads, count))
    if threads == 1:
        return work(0, count)
    edges = np.linspace(0, count, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads, thread_name_prefix="products") as pool:
        list(pool.map(lambda edge: work(*edge), itertools.pairwise(edges)))
    return None


def of_pairs(
    queries: np.ndarray, table: np.ndarray, query: np.ndarray, row: np.ndarray, threads: int
) -> np.ndarray:
    """float32 [b, m]: query `query[i]` times row `row[i, j]` of the table.

    Args:
        queries: float32 [M, D]. table: float32 [N, D]. query: int64 [b]. row: int64 [b, m]; indices
            are not checked.
    """
    out = np.empty(row.shape, np.float32)

    def some(first: int, last: int) -> None:
        part = slice(first, last)
        _some(queries, table, query[part], row[part], out[part])

    shared_out(len(row), min(threads, row.size * queries.shape[1] // FEW), some)
    return out
