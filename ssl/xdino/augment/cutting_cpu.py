"""`cutting`'s two loops, compiled: bands in groups of four, and side by side again.

Importing this module compiles it, once for a processor, as `photometric_cpu`.

Letters: H x W pixels, C bands, G groups of four.
"""

from collections.abc import Callable

import numba
import numpy as np
from numba.core.errors import NumbaError

if numba.config.DISABLE_JIT:  # the loops below are hopeless in the interpreter
    raise ImportError("NUMBA_DISABLE_JIT is set")

_PIXELS, _GROUPS = numba.uint8[:, :, ::1], numba.uint8[:, :, :, ::1]


def _entry(*arguments: numba.types.Type) -> Callable[[Callable], Callable]:
    """Raises RuntimeError where numba cannot compile it."""

    def compiled(function: Callable) -> Callable:
        signature = numba.void(*arguments)
        try:
            try:
                return numba.njit(signature, cache=True, nogil=True)(function)
            except RuntimeError:  # there is no folder to keep it in
                return numba.njit(signature, nogil=True)(function)
        except NumbaError as error:
            raise RuntimeError(str(error)) from error

    return compiled


@_entry(numba.types.Array(numba.uint8, 3, "C", readonly=True), _GROUPS)
def apart(image: np.ndarray, groups: np.ndarray) -> None:
    """[H, W, C] -> [G, H, W, 4]."""
    H, W, C = image.shape
    for y in range(H):
        for g in range(len(groups)):
            first = 4 * g
            if first + 4 <= C:
                for x in range(W):
                    for k in range(4):
                        groups[g, y, x, k] = image[y, x, first + k]
            else:
                for x in range(W):
                    for k in range(C - first):
                        groups[g, y, x, k] = image[y, x, first + k]


@_entry(_GROUPS, _PIXELS)
def together(parts: np.ndarray, out: np.ndarray) -> None:
    """[G, H, W, 4] -> [H, W, C]."""
    H, W, C = out.shape
    for y in range(H):
        for g in range(len(parts)):
            first = 4 * g
            if first + 4 <= C:
                for x in range(W):
                    for k in range(4):
                        out[y, x, first + k] = parts[g, y, x, k]
            else:
                for x in range(W):
                    for k in range(C - first):
                        out[y, x, first + k] = parts[g, y, x, k]
