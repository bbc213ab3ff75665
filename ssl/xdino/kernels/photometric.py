"""The photometric part of multi-crop in two kernels: two uint8 reads and one write of the result.

What `xdino.augment.photometric` defines, for CUDA devices. The first kernel finds the mean level
that contrast blends with, which depends on the operations before it. The second does the rest on
windows of pixels: colours are computed for the window and its margin, so the blur needs no image in
between; its two directions are products with one banded matrix of the kernel's taps. An image
without blur, or without jitter, skips that work: a whole program does, so nothing diverges.

Parameters come packed, one row of float32 an image (columns below).

Letters: N crops, C channels (1 or 3), h w of a crop, R reach of the blur in pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdino.kernels import interpreted

# Columns of the packed parameters. `ORDER` and `FACTOR` have four; `SCALE` and `SHIFT` normalise
# up to three channels; from `TAPS` on: one side of the blur's kernel, the centre first.
FLIP, JITTER, ORDER, FACTOR, GRAY, SOLARIZE, BLUR, SCALE, SHIFT, TAPS = (
    0, 1, 2, 6, 10, 11, 12, 13, 16, 19
)  # fmt: skip
WINDOW = 64  # side of a window, margin included
MAX_REACH = 16
PIXELS = 2**16 if interpreted() else 2048  # of a step of the first kernel
PARTS = 8  # programs an image in the first kernel


def supports(channels: int, reach: int) -> bool:
    return channels in (1, 3) and reach <= MAX_REACH


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _luma(red, green, blue):
    """ITU-R 601, as Pillow's."""
    return red * 0.299 + green * 0.587 + blue * 0.114


@triton.jit
def _tent(hue, centre):
    """1 on the near side of the hue's hexagon, 2 on the far side, straight between."""
    return tl.minimum(tl.maximum(tl.abs(hue - centre), 1.0), 2.0)


@triton.jit
def _turn_hue(red, green, blue, turn):
    """Turn the hue of the HSV hexcone; value and saturation stay."""
    low = tl.minimum(tl.minimum(red, green), blue)
    high = tl.maximum(tl.maximum(red, green), blue)
    chroma = high - low
    sector = tl.where(high == green, blue - red + 2.0 * chroma, red - green + 4.0 * chroma)
    sector = tl.where(high == red, green - blue, sector)
    sector = sector / tl.maximum(chroma, 1e-6) + 6.0 * turn  # in sixths
    sector -= 6.0 * tl.floor(sector / 6.0)
    near = low + 2.0 * chroma
    red = low - chroma + _tent(sector, 3.0) * chroma
    return red, near - _tent(sector, 2.0) * chroma, near - _tent(sector, 4.0) * chroma


@triton.jit
def _operate(operation, red, green, blue, factors, level, C: tl.constexpr):
    """One of the jitter's operations: brightness 0, contrast 1, saturation 2, hue 3."""
    if operation == 0:
        factor = tl.load(factors)
        red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    if operation == 1:
        factor = tl.load(factors + 1)
        shift = level * (1.0 - factor)
        red, green = _clamp(red * factor + shift), _clamp(green * factor + shift)
        blue = _clamp(blue * factor + shift)
    if C == 3:
        if operation == 2:
            factor = tl.load(factors + 2)
            gray = _luma(red, green, blue)
            red, green = (
                _clamp(red + (gray - red) * (1.0 - factor)),
                _clamp(green + (gray - green) * (1.0 - factor)),
            )
            blue = _clamp(blue + (gray - blue) * (1.0 - factor))
        if operation == 3:
            red, green, blue = _turn_hue(red, green, blue, tl.load(factors + 3))
    return red, green, blue


@triton.jit
def _read(at, mask, C: tl.constexpr):
    """The channels of some pixels, float32; one channel three times."""
    red = tl.load(at, mask=mask, other=0).to(tl.float32)
    green, blue = red, red
    if C == 3:
        green = tl.load(at + 1, mask=mask, other=0).to(tl.float32)
        blue = tl.load(at + 2, mask=mask, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _level_sums(
    crops, table, sums, size, steps,
    C: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr,
    JITTER: tl.constexpr, ORDER: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """`sums` [N, PARTS]: of the luma of each part of an image, where contrast finds it."""
    image = tl.program_id(0)
    part = tl.program_id(1)
    row = table + image * COLUMNS
    total = tl.zeros((PIXELS,), tl.float32)
    if tl.load(row + JITTER) != 0:
        for step in range(0, steps):
            pixel = (part * steps + step) * PIXELS + tl.arange(0, PIXELS)
            mask = pixel < size
            at = crops + (image.to(tl.int64) * size + pixel) * C
            red, green, blue = _read(at, mask, C)
            reached = 0
            for turn in tl.static_range(4):
                operation = tl.load(row + ORDER + turn).to(tl.int32)
                reached = reached | (operation == 1).to(tl.int32)
                if reached == 0:
                    red, green, blue = _operate(operation, red, green, blue, row + FACTOR, 0.0, C)
            gray = red
            if C == 3:
                gray = _luma(red, green, blue)
            total += tl.where(mask, gray, 0.0)
    tl.store(sums + image * PARTS + part, tl.sum(total, axis=0))


@triton.jit
def _finish(
    x, channel: tl.constexpr, row, out, at, mask, blurred, banded, threshold,
    SOLARIZE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Blur, solarise, normalise and store one channel of a window."""
    if blurred != 0:
        x = tl.dot(banded, x, input_precision="tf32x3")
        x = tl.dot(x, banded, input_precision="tf32x3")
    if tl.load(row + SOLARIZE) != 0:
        x = tl.where(x >= threshold - 0.5, 255.0 - x, x)
    x = x * tl.load(row + SCALE + channel) - tl.load(row + SHIFT + channel)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _views(
    crops, table, sums, out, h, w, threshold,
    C: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, REACH: tl.constexpr,
    WINDOW: tl.constexpr, FLIP: tl.constexpr, JITTER: tl.constexpr, ORDER: tl.constexpr,
    FACTOR: tl.constexpr, GRAY: tl.constexpr, SOLARIZE: tl.constexpr, BLUR: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Everything else, for one window of one image; its inner part is stored."""
    INNER: tl.constexpr = WINDOW - 2 * REACH
    image = tl.program_id(0)
    across = tl.cdiv(w, INNER)
    side = tl.arange(0, WINDOW)
    inner = (side >= REACH) & (side < WINDOW - REACH)
    y = (tl.program_id(1) // across) * INNER - REACH + side
    x = (tl.program_id(1) % across) * INNER - REACH + side
    row = table + image * COLUMNS
    # Beyond the edge the blur repeats it; a flip looks from the other side.
    from_y = tl.minimum(tl.maximum(y, 0), h - 1)
    from_x = tl.minimum(tl.maximum(x, 0), w - 1)
    from_x = tl.where(tl.load(row + FLIP) != 0, w - 1 - from_x, from_x)
    at = from_y[:, None] * w + from_x[None, :]
    everywhere = at >= 0
    red, green, blue = _read(crops + (image.to(tl.int64) * h * w + at) * C, everywhere, C)
    if tl.load(row + JITTER) != 0:
        total = tl.sum(tl.load(sums + image * PARTS + tl.arange(0, PARTS)), axis=0)
        level = tl.floor(total / (h * w) + 0.5)  # a whole level, as Pillow's
        for turn in tl.static_range(4):
            operation = tl.load(row + ORDER + turn).to(tl.int32)
            red, green, blue = _operate(operation, red, green, blue, row + FACTOR, level, C)
    if C == 3 and tl.load(row + GRAY) != 0:
        gray = _luma(red, green, blue)
        red, green, blue = gray, gray, gray
    blurred = tl.load(row + BLUR)
    distance = tl.abs(side[:, None] - side[None, :])
    banded = tl.load(row + TAPS + distance, mask=distance <= REACH, other=0.0)
    at = image.to(tl.int64) * C * h * w + y[:, None] * w + x[None, :]
    mask = (inner & (y < h))[:, None] & (inner & (x < w))[None, :]
    _finish(red, 0, row, out, at, mask, blurred, banded, threshold, SOLARIZE, SCALE, SHIFT)
    if C == 3:
        at += h * w
        _finish(green, 1, row, out, at, mask, blurred, banded, threshold, SOLARIZE, SCALE, SHIFT)
        at += h * w
        _finish(blue, 2, row, out, at, mask, blurred, banded, threshold, SOLARIZE, SCALE, SHIFT)


def views(crops: Tensor, table: Tensor, threshold: float, reach: int, dtype: torch.dtype) -> Tensor:
    """uint8 [N, h, w, C] -> `dtype` [N, C, h, w].

    Args:
        table: float32 `[N, TAPS + reach + 1]` in the columns above, on the crops' device.
        threshold: whole level from which solarising inverts.
        reach: of the longest blur, in pixels.
    """
    crops = crops.contiguous()
    N, h, w, C = crops.shape
    columns = {
        "C": C, "COLUMNS": table.shape[1], "PARTS": PARTS, "JITTER": JITTER, "ORDER": ORDER,
        "FACTOR": FACTOR,
    }  # fmt: skip
    sums = torch.empty(N, PARTS, device=crops.device)
    steps = triton.cdiv(h * w, PIXELS * PARTS)
    _level_sums[(N, PARTS)](crops, table, sums, h * w, steps, **columns, PIXELS=PIXELS, num_warps=4)
    out = torch.empty(N, C, h, w, dtype=dtype, device=crops.device)
    inner = WINDOW - 2 * reach
    windows = triton.cdiv(h, inner) * triton.cdiv(w, inner)
    _views[(N, windows)](
        crops, table, sums, out, h, w, float(threshold), **columns,
        REACH=reach, WINDOW=WINDOW, FLIP=FLIP, GRAY=GRAY, SOLARIZE=SOLARIZE, BLUR=BLUR,
        SCALE=SCALE, SHIFT=SHIFT, TAPS=TAPS, num_warps=8,
    )  # fmt: skip
    return out
