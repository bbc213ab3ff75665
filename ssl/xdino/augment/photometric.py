"""Photometric operations on whole batches of crops: from flip to normalisation.

DINO (arXiv 2104.14294, section 3.1) follows BYOL (arXiv 2006.07733, appendix B): flip, colour
jitter in random order, grayscale, blur, solarise, normalise. Here they run wherever the crops are,
after the table that `augment.draw_batch` has drawn, and keep fractions of a level where Pillow
rounds down after every operation; tests/augment states how far the two are apart.

Three paths. `photometric_eager` is plain torch and runs on any device. On a CPU `photometric` uses
`photometric_cpu`, the same operations compiled by numba; where that fails, it says so once and
takes the eager path. `photometric_fused` is for CUDA: Triton kernels. Tests hold them together.

Letters: N crops (of one size), C channels, h w of a crop.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xdino.augment.multi_crop import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    LUMA,
    SATURATION,
    MultiCrop,
    serial_threads,
)
from xdino.runtime import transfer

# Crops in a block of eager work on the CPU: about 2 MB of float32, which stays in the cache of a
# core through some forty passes.
_BLOCK_FLOATS = 2**19

Operation = Callable[..., object]  # (part [k, C, h, w], *values [k, 1, 1, 1]), in place


def photometric(
    crops: Tensor,
    table: np.ndarray,
    spec: MultiCrop,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
) -> Tensor:
    """From flip to normalisation: uint8 [N, h, w, C] -> `dtype` [N, C, h, w].

    `table` is [N], in the crops' order. Operations and their order are torchvision's, clamped to
    [0, 255] between them. With one channel, saturation, hue and grayscale do nothing.

    Bands of a sensor fall into two groups, red, green and blue (`spec.rgb`) and the rest, and each is
    treated for itself with what was drawn once. The first is a photograph. Of the rest the grey is
    the mean of its bands: with it saturation blends, to it grayscale sets every band, with its mean
    level contrast blends; hue has no meaning and does nothing. Brightness, blur and solarise are of
    every band alike, solarise from half of the declared range on.

    Runs on the crops' device, on a CPU with torch's number of threads, which the result does not
    depend on. The first call on a CPU compiles for some seconds, once for a machine. `fused`: by
    xdino.kernels, where they support the channels and the blur. Raises ValueError where the shapes
    disagree.
    """
    _check_shapes(crops, table, spec)
    if fused:
        return photometric_fused(crops, table, spec, dtype)
    compiled = _compiled() if crops.device.type == "cpu" else None
    if compiled is None:
        return photometric_eager(crops, table, spec, dtype)
    N, h, w, C = crops.shape
    with torch.inference_mode(False), torch.no_grad():
        out = torch.empty(N, C, h, w)
    if out.numel():
        _apply_compiled(compiled, crops.contiguous().numpy(), table, spec, out.numpy())
    return out.to(dtype)


def _apply_compiled(
    compiled: ModuleType, crops: np.ndarray, table: np.ndarray, spec: MultiCrop, out: np.ndarray
) -> None:
    """`photometric_cpu.apply`, once a group of bands: crops [N, h, w, C] -> out [N, C, h, w]."""
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    kernels, reach = _kernels_of(table["blur"])
    threads = torch.get_num_threads()
    for places, colour in spec.band_groups:
        levels = _solarize_from(spec), 1 / (255 * std[places]), mean[places] / std[places]
        compiled.apply(crops, table, kernels, reach, *levels, out, threads, places, colour)


def photometric_fused(
    crops: Tensor, table: np.ndarray, spec: MultiCrop, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`photometric` in two Triton kernels; the plain path where they do not support `spec`."""
    from xdino.kernels import photometric as fused  # imports triton, which not every machine has

    reach = int(_reach(np.append(table["blur"], spec.blur_radius[1]).astype(np.float64)).max())
    if not fused.supports(spec.channels, reach):
        return photometric(crops, table, spec, dtype)
    shape = len(table), fused.TAPS + reach + 1
    rows = torch.zeros(shape, pin_memory=crops.is_cuda)
    packed = rows.numpy()
    columns = {
        fused.FLIP: table["flip"],
        fused.JITTER: table["jitter"],
        fused.GRAY: table["gray"],
        fused.SOLARIZE: table["solarize"],
        fused.BLUR: table["blur"] > 0,
    }
    for column, values in columns.items():
        packed[:, column] = values
    packed[:, fused.ORDER : fused.ORDER + 4] = table["order"]
    packed[:, fused.FACTOR : fused.FACTOR + 4] = table["factor"]
    mean, std = np.array(spec.mean), np.array(spec.std)
    packed[:, fused.SCALE : fused.SCALE + spec.channels] = 1 / (255 * std)
    packed[:, fused.SHIFT : fused.SHIFT + spec.channels] = mean / std
    kernels, _ = _kernels_of(table["blur"])
    packed[:, fused.TAPS : fused.TAPS + kernels.shape[1]] = kernels
    with torch.inference_mode(False), torch.no_grad():
        rows = transfer.to_device(rows, crops.device)
        return fused.views(crops, rows, spec.solarize_threshold, reach, dtype)


@lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    """`photometric_cpu`, compiled; None, after one warning, where numba cannot do it."""
    try:
        from xdino.augment import photometric_cpu
    except (ImportError, RuntimeError, OSError) as error:
        # Missing or too old for numpy; a compiler or a processor that it knows nothing of; a full
        # disk where it keeps what it has compiled.
        warnings.warn(
            "the fast photometric path for CPUs cannot be used; crops take the eager one, several "
            f"times slower ({type(error).__name__}: {str(error).splitlines()[0]})",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return photometric_cpu


def _check_shapes(crops: Tensor, table: np.ndarray, spec: MultiCrop) -> None:
    N, C = len(crops), crops.shape[-1]
    if table.shape != (N,):
        raise ValueError(f"the table must have shape ({N},), one entry per crop, got {table.shape}")
    if spec.channels != C:
        raise ValueError(f"the crops have {C} channels, mean and std have {spec.channels}")


def _kernels_of(radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blur kernels float32 [N, R + 1] and how far each goes, int64 [N]; a radius of 0 goes 0."""
    radius = radius.astype(np.float64)
    blurred = radius > 0
    reach = np.where(blurred, _reach(radius), 0)
    kernels = np.zeros((len(radius), reach.max(initial=0) + 1), np.float32)
    if blurred.any():
        kernels[blurred] = blur_kernels(radius[blurred])
    return kernels, reach


# The eager path


def photometric_eager(
    crops: Tensor, table: np.ndarray, spec: MultiCrop, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`photometric` in plain torch, on any device: the reference of every other path."""
    _check_shapes(crops, table, spec)
    N, h, w, C = crops.shape
    with torch.inference_mode(False), torch.no_grad():
        out = torch.empty(N, C, h, w, dtype=dtype, device=crops.device)

    def work(rows: np.ndarray) -> None:
        with torch.no_grad():  # a thread starts with gradients on
            index = torch.from_numpy(rows).to(crops.device, non_blocking=True)
            block = _photometric_block(crops.index_select(0, index), table[rows], spec)
            _put(out, rows, index, block.to(dtype))

    blocks = _blocks(table, C * h * w, crops.device)
    threads = min(torch.get_num_threads(), len(blocks))
    if crops.device.type == "cpu" and threads > 1:
        # Whole blocks in threads: torch's own threads would meet after each of the forty passes,
        # and on cores that decode images meanwhile they spend their time waiting for each other.
        with serial_threads(threads, "photometric") as pool:
            list(pool.map(work, blocks))
    else:
        for rows in blocks:
            work(rows)
    return out


def _blocks(table: np.ndarray, floats: int, device: torch.device) -> list[np.ndarray]:
    """Row numbers of the crops that are worked on together; `floats` is the size of one crop.

    A GPU takes all at once. A CPU takes what fits its cache, and crops with the same order of
    jitter side by side, so that nearly every operation runs on the whole block in place.
    """
    if device.type != "cpu":
        return [np.arange(len(table))]
    order = table["order"].astype(np.int64) @ np.array([64, 16, 4, 1])
    rows = np.argsort(np.where(table["jitter"], order, -1), kind="stable")
    step = max(1, _BLOCK_FLOATS // floats)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _put(target: Tensor, rows: np.ndarray, index: Tensor, values: Tensor) -> None:
    """target[rows] = values along the first axis; `index` is `rows` on the device."""
    if target.device.type != "cpu":
        target.index_copy_(0, index, values)
    else:  # five times faster through numpy, which copies whole rows; bytes, for any dtype
        target.view(torch.uint8).numpy()[rows] = values.view(torch.uint8).numpy()


class _Parts:
    """Runs operations in place on part of a block x [n, C, h, w], chosen by a mask on the host."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def apply(self, chosen: np.ndarray, operation: Operation, *columns: np.ndarray) -> None:
        """`operation(part, *values)`, values [k, 1, 1, 1] on the device, for `chosen` bool [n]."""
        if not chosen.any():
            return
        # One host-to-device copy for the index and the values together (float32 holds both).
        rows = np.flatnonzero(chosen)
        both = np.stack([rows, *(column[rows] for column in columns)]).astype(np.float32)
        packed = torch.from_numpy(both).to(self.x.device, non_blocking=True)
        values = [column.view(-1, 1, 1, 1) for column in packed[1:]]
        if len(rows) == len(chosen):
            operation(self.x, *values)
        else:
            index = packed[0].long()
            part = self.x.index_select(0, index)
            operation(part, *values)
            _put(self.x, rows, index, part)


def _photometric_block(block: Tensor, table: np.ndarray, spec: MultiCrop) -> Tensor:
    """uint8 [n, h, w, C] -> normalised float32 [n, C, h, w]."""
    C = block.shape[3]
    x = block.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    parts = _Parts(x)
    parts.apply(table["flip"], lambda part: part.copy_(part.flip(3)))
    for places, colour in spec.band_groups:
        if places == list(range(C)):
            _colours(parts, table, colour)
        else:
            group = x[:, places]
            _colours(_Parts(group), table, colour)
            x[:, places] = group
    _blur(parts, table["blur"].astype(np.float64))
    parts.apply(table["solarize"], lambda part: _solarize(part, _solarize_from(spec)))
    mean, std = (
        transfer.to_device(torch.tensor(t), x.device).view(1, C, 1, 1)
        for t in (spec.mean, spec.std)
    )
    return x.mul_(1 / (255 * std)).sub_(mean / std)


def _colours(parts: _Parts, table: np.ndarray, colour: bool) -> None:
    """Jitter and grayscale of a group of bands. colour: they are red, green and blue."""
    order, factor = table["order"], table["factor"]
    operations: dict[int, Operation] = {BRIGHTNESS: _brightness, CONTRAST: _contrast}
    if colour:
        operations |= {SATURATION: _saturation, HUE: _hue}
    else:
        operations |= {CONTRAST: _contrast_of_bands}
    if not colour and parts.x.shape[1] > 1:
        operations |= {SATURATION: _saturation_of_bands}
    for turn in range(4):
        for name, operation in operations.items():
            parts.apply(table["jitter"] & (order[:, turn] == name), operation, factor[:, name])
    if colour:
        parts.apply(table["gray"], lambda part: part.copy_(_luma(part)))
    elif parts.x.shape[1] > 1:
        parts.apply(table["gray"], lambda part: part.copy_(part.mean(dim=1, keepdim=True)))


# Masks below are float32: comparing into bool and torch.where take ten times as long on a CPU.


def _solarize_from(spec: MultiCrop) -> float:
    """Pillow compares whole levels; the half level keeps a fraction from crossing over."""
    return spec.solarize_threshold - 0.5


def _solarize(x: Tensor, threshold: float) -> None:
    mask = torch.ge(x, threshold, out=torch.empty_like(x))
    x.lerp_(255 - x, mask)


def _luma(x: Tensor) -> Tensor:
    """[n, 3, h, w] -> [n, 1, h, w]."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 255)


def _contrast(x: Tensor, factor: Tensor) -> None:
    _blend_with_level(x, factor, _luma(x.mean(dim=(2, 3), keepdim=True)))


def _contrast_of_bands(x: Tensor, factor: Tensor) -> None:
    _blend_with_level(x, factor, x.mean(dim=(2, 3), keepdim=True).mean(dim=1, keepdim=True))


def _blend_with_level(x: Tensor, factor: Tensor, mean: Tensor) -> None:
    """mean: [n, 1, 1, 1], made a whole level, as Pillow's."""
    mean = mean.add_(0.5).floor_()
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 255)


def _saturation(x: Tensor, factor: Tensor) -> None:
    x.lerp_(_luma(x), 1 - factor).clamp_(0, 255)


def _saturation_of_bands(x: Tensor, factor: Tensor) -> None:
    x.lerp_(x.mean(dim=1, keepdim=True), 1 - factor).clamp_(0, 255)


def _hue(x: Tensor, turn: Tensor) -> None:
    """Turn the hue of the HSV hexcone; value and saturation stay. Pillow's HSV has 256 levels."""
    red, green, blue = x.unbind(dim=1)  # [n, h, w] each
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    sector, mask = (red - green).add_(chroma, alpha=4), torch.empty_like(high)
    sector.lerp_((blue - red).add_(chroma, alpha=2), torch.eq(green, high, out=mask))
    sector.lerp_(green - blue, torch.eq(red, high, out=mask))
    sector.div_(high.copy_(chroma).clamp_(min=1e-6)).add_(turn[..., 0], alpha=6)  # in sixths
    sector.sub_((sector / 6).floor_(), alpha=6)  # in [0, 6)
    # Each channel is low + chroma * a tent of the hue, 0 at its far side and 1 at its near side.
    near = torch.add(low, chroma, alpha=2)
    torch.addcmul(low.sub_(chroma), (sector - 3).abs_().clamp_(1, 2), chroma, out=red)
    torch.addcmul(near, (sector - 2).abs_().clamp_(1, 2), chroma, value=-1, out=green)
    torch.addcmul(near, (sector - 4).abs_().clamp_(1, 2), chroma, value=-1, out=blue)


# Blur


def blur_kernels(radius: np.ndarray) -> np.ndarray:
    """One side of Pillow's GaussianBlur as one kernel: float64 [n, R + 1], the centre first.

    Pillow blurs three times with a box that has fractional ends (Gwosdek et al., "Theoretical
    Foundations of Gaussian Convolution by Extended Box Filtering"), of variance radius**2 / 3.
    Three boxes in a row are one kernel, with R = 3 for radii below sqrt(2), else 6 and more.
    """
    variance, whole = radius**2 / 3, _whole_taps(radius)
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    ends /= 6 * (variance - (whole + 1) ** 2)
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = (distance <= whole[:, None]) + ends[:, None] * (distance == whole[:, None] + 1)
    box /= box.sum(axis=1, keepdims=True)
    return _convolved(_convolved(box, box), box)[:, 3 * reach :]


def _convolved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row: [n, p], [n, q] -> [n, p + q - 1]."""
    out = np.zeros((len(a), a.shape[1] + b.shape[1] - 1))
    for j in range(b.shape[1]):  # all rows at once: there are hundreds of them, a few taps long
        out[:, j : j + a.shape[1]] += a * b[:, [j]]
    return out


def _whole_taps(radius: np.ndarray) -> np.ndarray:
    """Full taps of a box on each side of its centre: float64, as the radius in pixels."""
    return np.floor((np.sqrt(4 * radius**2 + 1) - 1) / 2)


def _reach(radius: np.ndarray) -> np.ndarray:
    """Pixels that three boxes read on each side: int64."""
    return 3 * (_whole_taps(radius).astype(np.int64) + 1)


def _blur(parts: _Parts, radius: np.ndarray) -> None:
    """Blur in place where `radius` [n] (pixels) is above 0; each reach apart: most are short."""
    reach = _reach(radius)
    for far in np.unique(reach[radius > 0]):
        chosen = (radius > 0) & (reach == far)
        kernels = np.zeros((len(radius), far + 1))
        kernels[chosen] = blur_kernels(radius[chosen])
        parts.apply(chosen, _blur_both_ways, *kernels.T)


def _blur_both_ways(x: Tensor, *kernel: Tensor) -> None:
    """Convolve x [n, C, h, w] with each image's symmetric kernel, R + 1 values [n, 1, 1, 1]."""
    R = len(kernel) - 1
    for dim, padding in ((3, (R, R, 0, 0)), (2, (0, 0, R, R))):
        size = x.shape[dim]
        wide = F.pad(x, padding, mode="replicate")
        x.mul_(kernel[0])
        for distance in range(1, R + 1):
            # The sum of shifted copies: in cache it beats grouped convolution several times.
            x.addcmul_(wide.narrow(dim, R - distance, size), kernel[distance])
            x.addcmul_(wide.narrow(dim, R + distance, size), kernel[distance])
