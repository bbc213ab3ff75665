"""`photometric` on a CPU: the same operations, compiled, over tiles that stay in the cache.

Eager torch runs each operation over whole blocks of crops, some forty passes over memory, which
costs twice what decoding and resizing cost. Here numba compiles the operations, in the same order
and in float32 with the same clamps, and applies them to one band of rows after another: a band is
read as uint8, jittered, and written once. Two operations need more than their own pixel: contrast,
whose mean takes a pass of its own over what comes before it, and blur, which follows on the
written crop.

`photometric` says what the operations are and holds the eager ones, the reference that tests
compare these with. Importing this module compiles it, once for a processor: numba keeps the result
beside this file, or in the user's cache where it cannot write there.

Letters: N crops, C channels, h w of a crop, R reach of a blur in pixels.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import floor
from typing import Any

import numba
import numpy as np
from numba.core.errors import NumbaError

from xdino.augment.multi_crop import BRIGHTNESS, CONTRAST, LUMA, SATURATION, TABLE_DTYPE

if numba.config.DISABLE_JIT:  # the loops below are hopeless in the interpreter
    raise ImportError("NUMBA_DISABLE_JIT is set")

_TILE = 4096  # pixels of a band, about: a plane of it is 16 kB

# numba computes in float64 as soon as one number is a Python float, so constants are typed. They
# become part of the compiled code: numba's cache knows this file's date, not that of others.
_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX, _TOP = (np.float32(x) for x in (0, 1, 2, 3, 4, 6, 255))
_TINY, _SIXTH = np.float32(1e-6), np.float32(1 / 6)
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in LUMA)

# Sums may be taken in lanes and multiply-adds fused; no value is infinite or NaN. Divisions stay
# exact: an approximate reciprocal would turn hues.
_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "nnan", "ninf"},
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}

_SIGNATURE = numba.void(
    numba.uint8[:, :, :, ::1], numba.float32[:, :, :, ::1],  # crops [N, h, w, C], out [N, C, h, w]
    numba.int64, numba.int64, numba.from_dtype(TABLE_DTYPE)[::1],  # first, last, table
    numba.float32[:, ::1], numba.int64[::1],  # kernels, reach
    numba.float32, numba.float32[::1], numba.float32[::1],  # threshold, scale, shift
    numba.int64[::1], numba.boolean,  # places, colour
)  # fmt: skip


def apply(
    crops: np.ndarray, table: np.ndarray, kernels: np.ndarray, reach: np.ndarray,
    threshold: float, scale: np.ndarray, shift: np.ndarray, out: np.ndarray, threads: int = 1,
    places: Sequence[int] | None = None, colour: bool = True,
) -> None:  # fmt: skip
    """Flip, jitter, grayscale, blur, solarise: out = level * scale - shift.

    Every crop is worked on by itself, so the result does not depend on `threads`.

    Args:
        crops: uint8 [N, h, w, C], contiguous. table: [N] of TABLE_DTYPE.
        kernels: float32 [N, R + 1], one side of each blur, the centre first.
        reach: int64 [N], how far each blur goes: a multiple of 3 up to R, 0 for no blur.
        threshold: levels from here on are solarised. scale, shift: float32 [C].
        out: float32 [N, C, h, w], contiguous; it is overwritten.
        places: of the channels that are worked on together, G of C; None: all. scale, shift: of these.
        colour: they are red, green and blue.
    """
    chosen = np.arange(crops.shape[3]) if places is None else np.array(places, np.int64)
    table, N = np.array(table, TABLE_DTYPE), len(crops)  # a copy: writable, as the signature says

    def work(first: int, last: int) -> None:
        level = np.float32(threshold)
        _apply(crops, out, first, last, table, kernels, reach, level, scale, shift, chosen, colour)

    if threads <= 1 or N < 2:
        work(0, N)
        return
    # A few parts for each thread: crops without blur and jitter are done early.
    bounds = np.linspace(0, N, min(N, 4 * threads) + 1).astype(np.int64).tolist()
    with ThreadPoolExecutor(threads, thread_name_prefix="photometric") as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _compiled(function: Callable) -> Callable:
    """Compiled with its callers."""
    return numba.njit(no_cpython_wrapper=True, **_OPTIONS)(function)


def _entry(function: Callable) -> Callable:
    """Compiled now or read from numba's cache; lets go of the interpreter lock.

    Raises RuntimeError where numba cannot compile it.
    """
    try:
        try:
            return numba.njit(_SIGNATURE, cache=True, nogil=True, **_OPTIONS)(function)
        except RuntimeError:  # there is no folder to keep it in
            return numba.njit(_SIGNATURE, nogil=True, **_OPTIONS)(function)
    except NumbaError as error:
        raise RuntimeError(str(error)) from error


# Operations on a tile: float32 [C, .] in levels, of which the first n pixels count


@_compiled
def _clamp(x: np.float32) -> np.float32:
    return min(max(x, _ZERO), _TOP)


@_compiled
def _luma(tile: np.ndarray, x: int) -> np.float32:
    return _RED * tile[0, x] + _GREEN * tile[1, x] + _BLUE * tile[2, x]


@_compiled
def _brightness(tile: np.ndarray, n: int, factor: np.float32) -> None:
    for c in range(len(tile)):
        for x in range(n):
            tile[c, x] = _clamp(tile[c, x] * factor)


@_compiled
def _contrast(tile: np.ndarray, n: int, factor: np.float32, mean: np.float32) -> None:
    rest = mean * (_ONE - factor)
    for c in range(len(tile)):
        for x in range(n):
            tile[c, x] = _clamp(tile[c, x] * factor + rest)


@_compiled
def _saturation(tile: np.ndarray, n: int, factor: np.float32) -> None:
    rest = _ONE - factor
    for x in range(n):
        gray = rest * _luma(tile, x)
        for c in range(3):
            tile[c, x] = _clamp(factor * tile[c, x] + gray)


@_compiled
def _hue(tile: np.ndarray, n: int, turn: np.float32) -> None:
    sixths = _SIX * turn
    for x in range(n):
        red, green, blue = tile[0, x], tile[1, x], tile[2, x]
        low, high = min(min(red, green), blue), max(max(red, green), blue)
        chroma = high - low
        if red == high:
            sector = green - blue
        elif green == high:
            sector = blue - red + _TWO * chroma
        else:
            sector = red - green + _FOUR * chroma
        sector = sector / max(chroma, _TINY) + sixths
        sector -= _SIX * np.floor(sector * _SIXTH)  # in [0, 6)
        # Each channel is a tent of the hue, as in the eager path.
        tile[0, x] = low + chroma * (min(max(abs(sector - _THREE), _ONE), _TWO) - _ONE)
        tile[1, x] = low + chroma * (_TWO - min(max(abs(sector - _TWO), _ONE), _TWO))
        tile[2, x] = low + chroma * (_TWO - min(max(abs(sector - _FOUR), _ONE), _TWO))


@_compiled
def _gray(tile: np.ndarray, n: int) -> None:
    for x in range(n):
        gray = _luma(tile, x)
        for c in range(3):
            tile[c, x] = gray


@_compiled
def _mean(tile: np.ndarray, x: int) -> np.float32:
    total = _ZERO
    for c in range(len(tile)):
        total += tile[c, x]
    return total / np.float32(len(tile))


@_compiled
def _saturation_of_bands(tile: np.ndarray, n: int, factor: np.float32) -> None:
    rest = _ONE - factor
    for x in range(n):
        gray = rest * _mean(tile, x)
        for c in range(len(tile)):
            tile[c, x] = _clamp(factor * tile[c, x] + gray)


@_compiled
def _jitter(
    tile: np.ndarray, n: int, name: int, factor: np.ndarray, mean: np.float32, colour: bool
) -> None:
    """Operation `name`, one of the four, with its own factor of `factor` [4]."""
    if name == BRIGHTNESS:
        _brightness(tile, n, factor[name])
    elif name == CONTRAST:
        _contrast(tile, n, factor[name], mean)
    elif colour:
        if name == SATURATION:
            _saturation(tile, n, factor[name])
        else:
            _hue(tile, n, factor[name])
    elif name == SATURATION and len(tile) > 1:
        _saturation_of_bands(tile, n, factor[name])


# Between a crop and a tile: `count` rows from row `top` on


@_compiled
def _load_bytes(
    tile: np.ndarray, pixels: np.ndarray, top: int, count: int, places: np.ndarray
) -> None:
    w, C = pixels.shape[1:]
    for y in range(count):
        if (
            C == 3 and len(places) == 3 and places[0] == 0 and places[1] == 1
        ):  # all at once: the form that becomes shuffles of whole registers
            for x in range(w):
                tile[0, y * w + x] = pixels[top + y, x, 0]
                tile[1, y * w + x] = pixels[top + y, x, 1]
                tile[2, y * w + x] = pixels[top + y, x, 2]
        else:
            for c in range(len(places)):
                place = places[c]
                for x in range(w):
                    tile[c, y * w + x] = pixels[top + y, x, place]


@_compiled
def _load(tile: np.ndarray, planes: np.ndarray, top: int, count: int, places: np.ndarray) -> None:
    w = planes.shape[2]
    for c in range(len(places)):
        for y in range(count):
            for x in range(w):
                tile[c, y * w + x] = planes[places[c], top + y, x]


@_compiled
def _store(planes: np.ndarray, tile: np.ndarray, top: int, count: int, places: np.ndarray) -> None:
    w = planes.shape[2]
    for c in range(len(places)):
        for y in range(count):
            for x in range(w):
                planes[places[c], top + y, x] = tile[c, y * w + x]


@_compiled
def _finish(
    target: np.ndarray, levels: np.ndarray, at: int,
    flip: bool, solarize: bool, threshold: np.float32, scale: np.float32, shift: np.float32,
) -> None:  # fmt: skip
    """Solarise, normalise and flip a row: levels [w] from place `at` on -> target [w].

    The flip comes last because all other operations give the same result on a mirrored crop.
    """
    w = len(target)
    if solarize:
        for x in range(w):
            level = levels[at + x]
            levels[at + x] = _TOP - level if level >= threshold else level
    if flip:
        for x in range(w):
            target[x] = levels[at + w - 1 - x] * scale - shift
    else:
        for x in range(w):
            target[x] = levels[at + x] * scale - shift


# Blur


@_compiled
def _weigh(
    target: np.ndarray, centre: np.ndarray,
    a1: np.ndarray, b1: np.ndarray, a2: np.ndarray, b2: np.ndarray, a3: np.ndarray, b3: np.ndarray,
    k0: np.float32, k1: np.float32, k2: np.float32, k3: np.float32,
) -> None:  # fmt: skip
    """The centre and the three nearest pairs of taps: all there is for radii below sqrt(2)."""
    for x in range(len(target)):
        pairs = k1 * (a1[x] + b1[x]) + k2 * (a2[x] + b2[x]) + k3 * (a3[x] + b3[x])
        target[x] = k0 * centre[x] + pairs


@_compiled
def _add_pairs(
    target: np.ndarray,
    a1: np.ndarray, b1: np.ndarray, a2: np.ndarray, b2: np.ndarray, a3: np.ndarray, b3: np.ndarray,
    k1: np.float32, k2: np.float32, k3: np.float32,
) -> None:  # fmt: skip
    """Three more pairs. With more at a time the compiler gives up on vectors: too many aliases."""
    for x in range(len(target)):
        target[x] += k1 * (a1[x] + b1[x]) + k2 * (a2[x] + b2[x]) + k3 * (a3[x] + b3[x])


@_compiled
def _convolve(
    target: np.ndarray, source: np.ndarray, step: int, kernel: np.ndarray, R: int
) -> None:
    """target[i] = the sum over d from -R to R of kernel[|d|] * source[i + (R + d) * step].

    Rows that lie one after the other are one long row here, whether `step` is 1 (across) or the
    length of a row (down): a loop for each of them would cost more than the arithmetic.
    """
    n, centre = len(target), R * step
    for d in range(1, R + 1, 3):
        near, mid = d * step, (d + 1) * step
        far = mid + step
        a1, b1 = source[centre - near :][:n], source[centre + near :][:n]
        a2, b2 = source[centre - mid :][:n], source[centre + mid :][:n]
        a3, b3 = source[centre - far :][:n], source[centre + far :][:n]
        k1, k2, k3 = kernel[d], kernel[d + 1], kernel[d + 2]
        if d == 1:
            _weigh(target, source[centre:][:n], a1, b1, a2, b2, a3, b3, kernel[0], k1, k2, k3)
        else:
            _add_pairs(target, a1, b1, a2, b2, a3, b3, k1, k2, k3)


@_compiled
def _widen(target: np.ndarray, plane: np.ndarray, top: int, count: int, R: int) -> None:
    """`count` rows of a plane [h, w] from `top` on, its edge repeated, as rows of w + 2 R."""
    h, w = plane.shape
    for row in range(count):
        y, at = min(max(top + row, 0), h - 1), row * (w + 2 * R)
        for x in range(R):
            target[at + x] = plane[y, 0]
            target[at + R + w + x] = plane[y, w - 1]
        for x in range(w):
            target[at + R + x] = plane[y, x]


@_compiled
def _blur(
    plane: np.ndarray, band: int, wide: np.ndarray, across: np.ndarray, kernel: np.ndarray, R: int,
    flip: bool, solarize: bool, threshold: np.float32, scale: np.float32, shift: np.float32,
) -> None:  # fmt: skip
    """Blur and finish a plane [h, w] in place, `band` rows at a time.

    wide, across: room for band + 2 R rows of w + 2 R.
    """
    h, w = plane.shape
    W = w + 2 * R
    kept = 0  # rows at the top of `across` that the band before has left there
    for top in range(0, h, band):
        count = band + 2 * R - kept
        _widen(wide, plane, top - R + kept, count, R)
        target = across[kept * W + R : (kept + count) * W - R]
        _convolve(target, wide, np.int64(1), kernel, R)
        _convolve(wide[: band * W], across, W, kernel, R)
        kept = 2 * R
        for x in range(kept * W):  # upwards: the two may overlap
            across[x] = across[band * W + x]
        for y in range(top, min(top + band, h)):
            at = (y - top) * W + R
            _finish(plane[y], wide, at, flip, solarize, threshold, scale, shift)


# Crops


@_compiled
def _band(
    tile: np.ndarray, pixels: np.ndarray, planes: np.ndarray, top: int, count: int,
    row: np.record, first: int, last: int, mean: np.float32, places: np.ndarray, colour: bool,
) -> int:  # fmt: skip
    """Load rows and apply the jitter's turns from `first` up to `last`; -> pixels of the tile.

    They come from the crop's bytes, or from `planes` where earlier turns have left them.
    """
    n = count * pixels.shape[1]
    if first == 0:
        _load_bytes(tile, pixels, top, count, places)
    else:
        _load(tile, planes, top, count, places)
    for turn in range(first, last):
        _jitter(tile, n, row.order[turn], row.factor, mean, colour)
    return n


@_compiled
def _mean_level(
    tile: np.ndarray, pixels: np.ndarray, planes: np.ndarray, band: int, row: np.record, turns: int,
    places: np.ndarray, colour: bool,
) -> np.float32:  # fmt: skip
    """The whole level with which contrast blends: the mean after `turns`, left in `planes`."""
    C = len(places)
    h, w = planes.shape[1:]
    total = np.float64(0)
    for top in range(0, h, band):
        count = min(band, h - top)
        n = _band(tile, pixels, planes, top, count, row, np.int64(0), turns, _ZERO, places, colour)
        for c in range(C):
            levels = _ZERO
            for x in range(n):
                levels += tile[c, x]
            total += levels * LUMA[c] if colour else levels / C
        if turns:
            _store(planes, tile, top, count, places)
    return np.float32(floor(total / (h * w) + 0.5))


@_entry
def _apply(
    crops: np.ndarray, out: np.ndarray, first: int, last: int, table: np.ndarray,
    kernels: np.ndarray, reach: np.ndarray, threshold: np.float32, scale: np.ndarray, shift: np.ndarray,
    places: np.ndarray, colour: bool,
) -> None:  # fmt: skip
    """`apply` to crops first to last."""
    h, w = crops.shape[1:3]
    C = len(places)
    colour = colour and C == 3
    band = min(max(1, _TILE // w), h)  # rows
    R = kernels.shape[1] - 1
    tile = np.empty((C, band * w), np.float32)
    wide = np.zeros((band + 2 * R) * (w + 2 * R), np.float32)  # not empty: what is read beyond
    across = np.zeros((band + 2 * R) * (w + 2 * R), np.float32)  # the rows must be a number
    for i in range(first, last):
        row, pixels, planes = table[i], crops[i], out[i]
        done, turns, mean = 0, 0, _ZERO
        if row.jitter:
            turns = 4
            while row.order[done] != CONTRAST:
                done += 1
            mean = _mean_level(tile, pixels, planes, band, row, done, places, colour)
        for top in range(0, h, band):
            count = min(band, h - top)
            n = _band(tile, pixels, planes, top, count, row, done, turns, mean, places, colour)
            if row.gray:
                if colour:
                    _gray(tile, n)
                elif C > 1:
                    _saturation_of_bands(tile, n, _ZERO)
            if reach[i]:
                _store(planes, tile, top, count, places)
                continue
            for c in range(C):
                for y in range(count):
                    to, at = planes[places[c], top + y], y * w
                    _finish(to, tile[c], at, row.flip, row.solarize, threshold, scale[c], shift[c])
        for c in range(C if reach[i] else 0):
            _blur(
                planes[places[c]], band, wide, across, kernels[i], reach[i],
                row.flip, row.solarize, threshold, scale[c], shift[c],
            )  # fmt: skip
