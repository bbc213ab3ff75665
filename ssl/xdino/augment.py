"""Multi-crop: what is random about a training image, drawn once as a table, then applied.

DINO (arXiv 2104.14294, section 3.1 and appendix E) shows the student two large and several small
crops of each image. The published code draws and applies everything image by image through Pillow,
which starves a fast device. Here the three parts are apart, so that each can run where it is
cheapest and be tested alone:

1. `draw_batch` turns (seed, epoch, image index) into a table of parameters. It keeps no state: an
   image gets the same crops in any worker, on any rank, after any restart.
2. `boxes` and `crop` cut and resize on the CPU; the result stays uint8, a quarter of the traffic.
3. `photometric` does the rest on whole batches, wherever the crops are: flip, colour jitter,
   grayscale, blur, solarise, normalise. It keeps fractions of a level where Pillow rounds down
   after every operation; tests/augment states how far the two are apart.

Letters: B images, V views, N crops (of one size), C channels, H W of an image, h w of a crop.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import groupby
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ATTEMPTS = 10  # boxes tried per view before the central fallback, as torchvision does
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's "L"

#: What is drawn for one view of one image. `blur` is a radius in pixels, 0 for none; `order` lists
#: the four jitter operations in the order in which they are applied.
TABLE_DTYPE = np.dtype(
    [
        ("area", np.float64, (ATTEMPTS,)),  # fraction of the image
        ("log_ratio", np.float64, (ATTEMPTS,)),  # log(width / height)
        ("position", np.float64, (2,)),  # down and across, in [0, 1)
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("order", np.int8, (4,)),
        ("factor", np.float32, (4,)),  # brightness, contrast, saturation (1: unchanged), hue (0)
        ("gray", np.bool_),
        ("blur", np.float32),
        ("solarize", np.bool_),
    ]
)
_UNIFORMS = 2 * ATTEMPTS + 16  # uniform numbers that one view takes, used or not
_STREAM = 1  # the second half of the Philox key: these draws share no number with other streams

# Crops in a block of photometric work on the CPU: about 2 MB of float32, which stays in the cache
# of a core through some forty passes.
_BLOCK_FLOATS = 2**19

Operation = Callable[..., object]  # (part [k, C, h, w], *values [k, 1, 1, 1]), in place


@dataclass(frozen=True)
class View:
    """One crop of an image. `size` in pixels; `scale` fractions of the area; two probabilities."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of a view must be at least 1 pixel, got {self.size}")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"scale must be (low, high) with 0 < low <= high <= 1, got {low, high}"
            )
        for name in ("blur", "solarize"):
            _check_probability(name, getattr(self, name))


@dataclass(frozen=True)
class MultiCrop:
    """All that is random about an image, and the normalisation. `views`: global crops first.

    `brightness`, `contrast` and `saturation` draw a factor from 1 - x to 1 + x; `hue` a shift
    from -x to x of a full turn; `blur_radius` is in pixels. `mean` and `std` have one entry per
    channel, on a scale of 0 to 1.
    """

    views: tuple[View, ...]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_threshold: int = 128
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("views must hold at least one view")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be (low, high) with 0 < low <= high, got {self.ratio}")
        for name in ("flip", "jitter", "grayscale"):
            _check_probability(name, getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be from 0 to 0.5 of a turn, got {self.hue}")
        if not 0 < self.blur_radius[0] <= self.blur_radius[1]:
            raise ValueError(
                f"blur_radius must be (low, high) with 0 < low <= high, got {self.blur_radius}"
            )
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std must have one entry per channel, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(size in pixels, number of views) of consecutive views with one size."""
        sizes = [view.size for view in self.views]
        return tuple((size, len(list(run))) for size, run in groupby(sizes))


def multi_crop(
    global_size: int = 224,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_count: int = 8,
    local_size: int = 96,
    local_scale: tuple[float, float] = (0.05, 0.4),
    global_blur: tuple[float, ...] = (1.0, 0.1),
    global_solarize: tuple[float, ...] = (0.0, 0.2),
    local_blur: float = 0.5,
    **photometric: object,
) -> MultiCrop:
    """DINO's multi-crop; the defaults are the published ones. Sizes in pixels.

    There are as many global crops as `global_blur` and `global_solarize` have entries (two in the
    paper: one always blurred, one sometimes blurred and sometimes solarised). The rest goes to
    `MultiCrop`. Raises ValueError for values that no crop can have.
    """
    if len(global_blur) != len(global_solarize):
        raise ValueError(
            "global_blur and global_solarize must have one entry per global crop, got "
            f"{len(global_blur)} and {len(global_solarize)}"
        )
    if local_count < 0:
        raise ValueError(f"local_count must be at least 0, got {local_count}")
    known = {field.name for field in fields(MultiCrop)} - {"views"}
    if unknown := sorted(set(photometric) - known):
        raise ValueError(f"multi_crop takes no {', '.join(unknown)}; it takes {sorted(known)}")
    views = [
        View(global_size, global_scale, blur, solarize)
        for blur, solarize in zip(global_blur, global_solarize, strict=True)
    ]
    views += [View(local_size, local_scale, local_blur, 0.0)] * local_count
    return MultiCrop(tuple(views), **photometric)  # type: ignore[arg-type]


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value}")


# Drawing


def draw_batch(crops: MultiCrop, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """Parameters of every view of images `indices` [B]: a structured array [V, B] of TABLE_DTYPE.

    A pure function: each image has its own stretch of Philox's counter, so its column depends on
    (seed, epoch, index) alone. Raises ValueError for a seed outside [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    generator = np.random.Philox(key=np.array([seed, _STREAM], np.uint64))
    state = generator.state
    count = len(crops.views) * _UNIFORMS
    raw = np.empty((len(indices), count), np.uint64)
    for row, index in enumerate(indices):  # setting the counter costs a tenth of a new generator
        state["state"]["counter"][:] = (0, index, epoch, 0)
        generator.state = state
        raw[row] = generator.random_raw(count)
    uniform = (raw >> np.uint64(11)) * 2.0**-53  # as numpy's Generator.random; never 1
    uniform = uniform.reshape(len(indices), len(crops.views), _UNIFORMS).transpose(1, 0, 2)
    return _fill(crops, uniform)


def draw(crops: MultiCrop, seed: int, epoch: int, index: int) -> np.ndarray:
    """Parameters of every view of one image: a structured array [V] of TABLE_DTYPE."""
    return draw_batch(crops, seed, epoch, np.array([index]))[:, 0]


def _fill(crops: MultiCrop, uniform: np.ndarray) -> np.ndarray:
    """Uniform numbers [V, B, _UNIFORMS] -> table [V, B]."""
    views = crops.views
    areas, ratios, rest = np.split(uniform, [ATTEMPTS, 2 * ATTEMPTS], axis=-1)
    low, high = np.array([view.scale for view in views]).T[:, :, None, None]  # [V, 1, 1] each
    table = np.empty(uniform.shape[:2], TABLE_DTYPE)
    table["area"] = low + (high - low) * areas
    log_low, log_high = np.log(crops.ratio)
    table["log_ratio"] = log_low + (log_high - log_low) * ratios
    table["position"] = rest[..., 0:2]
    table["flip"] = rest[..., 2] < crops.flip
    table["jitter"] = rest[..., 3] < crops.jitter
    table["order"] = rest[..., 4:8].argsort(axis=-1)
    spread = np.array([crops.brightness, crops.contrast, crops.saturation, crops.hue])
    lowest = np.array([*np.maximum(1 - spread[:3], 0), -crops.hue])
    highest = np.array([*(1 + spread[:3]), crops.hue])
    table["factor"] = lowest + (highest - lowest) * rest[..., 8:12]
    table["gray"] = rest[..., 12] < crops.grayscale
    blur, solarize = np.array([(view.blur, view.solarize) for view in views]).T[:, :, None]
    radius = crops.blur_radius[0] + (crops.blur_radius[1] - crops.blur_radius[0]) * rest[..., 14]
    table["blur"] = np.where(rest[..., 13] < blur, radius, 0)
    table["solarize"] = rest[..., 15] < solarize
    return table


# Cropping, on the CPU


def boxes(
    table: np.ndarray,
    height: int | np.ndarray,
    width: int | np.ndarray,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Top, left, height, width in pixels: int64 [..., 4] for a table [...]; torchvision's rule.

    The first of the ten candidates that fits the image is taken, else the largest central box
    with a ratio inside `ratio`. `height` and `width` are numbers, or arrays that broadcast with
    the table's shape.
    """
    H, W = np.asarray(height), np.asarray(width)
    area, aspect = table["area"] * (H * W)[..., None], np.exp(table["log_ratio"])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= W[..., None]) & (h > 0) & (h <= H[..., None])  # [..., ATTEMPTS]
    first = fits.argmax(axis=-1)[..., None]
    w, h = (np.take_along_axis(side, first, axis=-1)[..., 0] for side in (w, h))
    down, across = table["position"][..., 0], table["position"][..., 1]
    top, left = (down * (H - h + 1)).astype(np.int64), (across * (W - w + 1)).astype(np.int64)
    found = np.stack([top, left, h, w], axis=-1)
    failed = ~fits.any(axis=-1)
    if failed.any():
        found[failed] = np.broadcast_to(_central(H, W, ratio), found.shape)[failed]
    return found


def _central(H: np.ndarray, W: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest central box with width / height inside `ratio`: int64 [..., 4]."""
    # Never below one pixel: torchvision's rule gives 0 where both ends of `ratio` are below 1/2.
    h = np.where(H * ratio[0] > W, np.maximum(np.rint(W / ratio[0]), 1), H).astype(np.int64)
    w = np.where(H * ratio[1] < W, np.maximum(np.rint(H * ratio[1]), 1), W).astype(np.int64)
    return np.stack([(H - h) // 2, (W - w) // 2, h, w], axis=-1)


def crop(
    image: np.ndarray, box: np.ndarray, size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Cut `box` (top, left, height, width) out of an image and resize it, bicubic, antialiased.

    image: uint8 [H, W, C] -> uint8 [size, size, C], written into `out` where that is given.
    The box is cut first, so the filter never reads past its edge, as in the published pipeline.
    """
    top, left, height, width = box
    part = torch.from_numpy(image)[None, top : top + height, left : left + width]  # [1, h, w, C]
    # The batch dimension has to come before the permutation: only then are the strides those of
    # torch.channels_last, for which the uint8 kernel needs no unpacking and is twice as fast.
    resized = F.interpolate(
        part.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True
    ).permute(0, 2, 3, 1)[0]
    if out is None:
        return np.ascontiguousarray(resized.numpy())
    out[:] = resized.numpy()
    return out


# Photometric operations, on the crops' device


def photometric(
    crops: Tensor,
    table: np.ndarray,
    spec: MultiCrop,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
) -> Tensor:
    """From flip to normalisation: uint8 [N, h, w, C] -> `dtype` [N, C, h, w].

    `table` is [N], in the crops' order. Operations and their order are torchvision's, clamped to
    [0, 255] between them. With one channel, saturation, hue and grayscale do nothing; with any
    number but 1 and 3 they do nothing either, and contrast blends with the mean of all channels.
    Runs on the crops' device, on a CPU with torch's number of threads; `fused` by xdino.kernels,
    where they support the channels and the blur. Raises ValueError where the shapes disagree.
    """
    N, h, w, C = crops.shape
    if table.shape != (N,):
        raise ValueError(f"the table must have shape ({N},), one entry per crop, got {table.shape}")
    if spec.channels != C:
        raise ValueError(f"the crops have {C} channels, mean and std have {spec.channels}")
    if fused:
        return photometric_fused(crops, table, spec, dtype)
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


def photometric_fused(
    crops: Tensor, table: np.ndarray, spec: MultiCrop, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`photometric` in two Triton kernels; the plain path where they do not support `spec`."""
    from xdino.kernels import photometric as fused  # imports triton, which not every machine has

    reach = _reach(spec.blur_radius[1])
    if not fused.supports(spec.channels, reach):
        return photometric(crops, table, spec, dtype)
    packed = np.zeros((len(table), fused.TAPS + reach + 1), np.float32)
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
    blurred = np.flatnonzero(table["blur"] > 0)
    if len(blurred):
        kernels = blur_kernels(table["blur"][blurred].astype(np.float64))
        packed[blurred, fused.TAPS : fused.TAPS + kernels.shape[1]] = kernels
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.from_numpy(packed).to(crops.device, non_blocking=True)
        return fused.views(crops, rows, spec.solarize_threshold, reach, dtype)


def _reach(radius: float) -> int:
    """Pixels that a blur of this radius reads on each side (`blur_kernels`)."""
    return 3 * (math.floor((math.sqrt(4 * radius**2 + 1) - 1) / 2) + 1)


def serial_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of `count` threads in which torch does not fan out; other threads keep their number.

    torch.set_num_threads sets the calling thread's number and that of threads yet to be started,
    so a passing thread puts the second one back.
    """
    others = torch.get_num_threads()

    def single() -> None:
        torch.get_num_threads()  # the first call in a thread would undo what is set before it
        torch.set_num_threads(1)
        restore = Thread(target=torch.set_num_threads, args=(others,))
        restore.start()
        restore.join()

    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=single)


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
    order, factor = table["order"], table["factor"]
    operations: dict[int, Operation] = {BRIGHTNESS: _brightness, CONTRAST: _contrast}
    if C == 3:
        operations |= {SATURATION: _saturation, HUE: _hue}
    for turn in range(4):
        for name, operation in operations.items():
            parts.apply(table["jitter"] & (order[:, turn] == name), operation, factor[:, name])
    if C == 3:
        parts.apply(table["gray"], lambda part: part.copy_(_luma(part)))
    _blur(parts, table["blur"].astype(np.float64))
    parts.apply(table["solarize"], lambda part: _solarize(part, spec.solarize_threshold))
    mean, std = (torch.tensor(t, device=x.device).view(1, C, 1, 1) for t in (spec.mean, spec.std))
    return x.mul_(1 / (255 * std)).sub_(mean / std)


# Masks below are float32: comparing into bool and torch.where take ten times as long on a CPU.


def _solarize(x: Tensor, threshold: float) -> None:
    # Pillow compares whole levels; the half level keeps a fraction from crossing over.
    mask = torch.ge(x, threshold - 0.5, out=torch.empty_like(x))
    x.lerp_(255 - x, mask)


def _luma(x: Tensor) -> Tensor:
    """[n, 3, h, w] -> [n, 1, h, w]."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 255)


def _contrast(x: Tensor, factor: Tensor) -> None:
    channels = x.mean(dim=(2, 3), keepdim=True)  # [n, C, 1, 1]
    mean = _luma(channels) if x.shape[1] == 3 else channels.mean(dim=1, keepdim=True)
    mean = mean.add_(0.5).floor_()  # a whole level, as Pillow's
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 255)


def _saturation(x: Tensor, factor: Tensor) -> None:
    x.lerp_(_luma(x), 1 - factor).clamp_(0, 255)


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
    variance = radius**2 / 3
    length = np.sqrt(12 * variance + 1)
    whole = np.floor((length - 1) / 2)  # full taps on each side of the centre
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    ends /= 6 * (variance - (whole + 1) ** 2)
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = (distance <= whole[:, None]) + ends[:, None] * (distance == whole[:, None] + 1)
    box /= box.sum(axis=1, keepdims=True)
    triple = np.stack([np.convolve(np.convolve(b, b), b) for b in box])
    return triple[:, 3 * reach :]


def _blur(parts: _Parts, radius: np.ndarray) -> None:
    """Blur in place where `radius` [n] (pixels) is above 0; each reach apart: most are short."""
    whole = np.floor((np.sqrt(4 * radius**2 + 1) - 1) / 2)
    for taps in np.unique(whole[radius > 0]):
        chosen = (radius > 0) & (whole == taps)
        kernels = np.zeros((len(radius), 3 * int(taps) + 4))
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
