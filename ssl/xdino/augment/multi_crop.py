"""Multi-crop: what is random about a training image, drawn once as a table, then applied.

DINO (arXiv 2104.14294, section 3.1 and appendix E) shows the student two large and several small
crops of each image. The published code draws and applies everything image by image through Pillow,
which starves a fast device. Here the three parts are apart, so that each can run where it is
cheapest and be tested alone:

1. `draw_batch` turns (seed, epoch, image index) into a table of parameters. It keeps no state: an
   image gets the same crops in any worker, on any rank, after any restart.
2. `boxes` and `crop` cut and resize on the CPU; the result stays uint8, a quarter of the traffic.
3. `photometric`, a room of its own, does the rest on whole batches, wherever the crops are.

Letters: B images, V views, C channels, H W of an image, h w of a crop.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import groupby
from threading import Thread
from typing import Any

import numpy as np
import torch

from xdino.runtime import rng

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


@dataclass(frozen=True)
class View:
    """One crop of an image. `size` in pixels; `scale` fractions of the area; two probabilities.

    `enlarged`: how many times larger the crop is meant to be than it is; radii of the blur are in
    pixels of the larger one.
    """

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float
    enlarged: float = 1.0

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
        if self.enlarged <= 0:
            raise ValueError(f"enlarged must be above 0, got {self.enlarged}")


@dataclass(frozen=True)
class MultiCrop:
    """All that is random about an image, and the normalisation. `views`: global crops first.

    `brightness`, `contrast` and `saturation` draw a factor from 1 - x to 1 + x; `hue` a shift
    from -x to x of a full turn; `blur_radius` is in pixels. `mean` and `std` have one entry per
    channel, on a scale of 0 to 1. `rgb`: places of red, green and blue; () for none; None: of three
    channels 0, 1, 2.
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
    rgb: tuple[int, ...] | None = None

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
    def band_groups(self) -> tuple[tuple[list[int], bool], ...]:
        """Places of the channels that lose their colours together, and whether they have any: red,
        green and blue, and all others."""
        rgb = self.rgb
        if rgb is None:
            rgb = (0, 1, 2) if self.channels == 3 else ()
        rest = [place for place in range(self.channels) if place not in rgb]
        groups = (list(rgb), True), (rest, False)
        return tuple((places, colour) for places, colour in groups if places)

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
    **photometric: Any,
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
    return MultiCrop(tuple(views), **photometric)


def at_sizes(crops: MultiCrop, global_size: int, local_size: int, globals_: int = 2) -> MultiCrop:
    """The same crops at other sizes in pixels: one draw, the same boxes, flips and colours.

    For a curriculum of resolutions (FastDINOv2, arXiv 2507.03779, resizes finished crops). The
    blur's radius shrinks with the crop, so that it takes away as much of the picture as before.
    The first `globals_` views are the global ones.
    """

    def resized(view: View, size: int) -> View:
        return replace(view, size=size, enlarged=view.enlarged * view.size / size)

    sizes = [global_size] * globals_ + [local_size] * (len(crops.views) - globals_)
    views = tuple(resized(view, size) for view, size in zip(crops.views, sizes, strict=True))
    return replace(crops, views=views)


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
    count = len(crops.views) * _UNIFORMS
    raw = rng.raw_of_images(rng.Stream.CROPS, seed, epoch, indices, count)
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
    radius /= np.array([view.enlarged for view in views])[:, None]
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
    if out is None:
        out = np.empty((size, size, image.shape[2]), np.uint8)
    elif not out.flags.c_contiguous:  # the uint8 kernel would write as if it were
        out[:] = crop(image, box, size)
        return out
    part = image[top : top + height, left : left + width]
    # What F.interpolate(mode="bicubic", antialias=True) calls, but straight into `out`, and cut by
    # numpy, which saves a third of what a small crop costs. The strides of `target` are those of
    # torch.channels_last, for which the uint8 kernel needs no unpacking and is twice as fast.
    source, target = (torch.from_numpy(x[None].transpose(0, 3, 1, 2)) for x in (part, out))
    torch.ops.aten._upsample_bicubic2d_aa.out(source, (size, size), False, out=target)
    return out


# Threads


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
