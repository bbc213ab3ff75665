"""A mask carried through a video: patches take the labels of those that look most alike.

Nothing is trained: the label of a patch is the mean of those of the patches that look most alike in
the first frame and in the frames just before, within a neighbourhood (Jabri et al. 2020,
https://arxiv.org/abs/2006.14613; DINO, https://arxiv.org/abs/2104.14294, section 4.2.2 and the
published `eval_video_segmentation.py`).

Letters: M context frames, N patches of a frame, D width, K labels with the background, (h, w) patch
grid, H x W pixels, C channels.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from xdino.backbone import IMAGENET_STD, Backbone
from xdino.errors import RunFailed
from xdino_eval.features import autocast, device_of
from xdino_eval.suite.davis_dataset import Video, read_frame, read_mask
from xdino_eval.suite.davis_scores import VOID
from xdino_eval.transform import EvalTransform

# The published evaluation divides red by 0.228, where every other one of DINO has 0.229.
PUBLISHED_STD = (0.228, 0.224, 0.225)
MULTIPLE = 64  # the longer side of a frame is rounded down
LARGEST = 2**26  # affinities that are held at a time


@dataclass(frozen=True)
class Propagation:
    """context: frames before the one in hand, besides the first. radius: of the neighbourhood, in
    patches; 0 = the whole frame. topk: patches that vote. temperature: of the affinities."""

    context: int = 7
    radius: int = 12
    topk: int = 5
    temperature: float = 0.1


# --- frames, as the network sees them ---------------------------------------------------------


def frame_size(height: int, width: int, side: int = 480, patch: int = 1) -> tuple[int, int]:
    """(height, width) that a frame is shown at: the shorter side at `side`, the longer rounded
    down to a multiple of 64; a square loses in width. Both are multiples of the patch: one that lies
    in the frame by a part would lend its label to the part beyond."""
    side = nearest_multiple(side, patch)
    longer = side * max(height, width) // min(height, width) // MULTIPLE * MULTIPLE
    longer = max(longer // patch * patch, patch)
    return (longer, side) if height > width else (side, longer)


def nearest_multiple(side: int, patch: int) -> int:
    """The multiple of the patch nearest to `side`, one at least."""
    return max((side + patch // 2) // patch, 1) * patch


def resize_linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [height, width, C], bilinear without antialiasing.

    To the bit what OpenCV's `resize` gives, which the published evaluation uses: weights of 11 bits,
    sums shortened by 4 and 16 bits on the way. Near ties between patches follow every level.
    """
    rows, columns = (
        _taps(before, after)
        for before, after in ((image.shape[0], height), (image.shape[1], width))
    )
    x = image.astype(np.int32)
    across = (
        x[:, columns.first] * columns.weight[:, None] + x[:, columns.second] * columns.rest[:, None]
    ) >> 4  # [H, width, C]
    down = (across[rows.first] * rows.weight[:, None, None]) >> 16
    down += (across[rows.second] * rows.rest[:, None, None]) >> 16
    return ((down + 2) >> 2).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Taps:
    """The two pixels each output pixel lies between, and their weights in 1/2048; int32."""

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    rest: np.ndarray


def _taps(before: int, after: int) -> Taps:
    # OpenCV divides twice: the last bit of the position may decide what a weight is rounded to.
    position = ((np.arange(after) + 0.5) * (1 / (after / before)) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int32)
    fraction = position - first.astype(np.float32)
    weights = (np.rint(part * np.float32(2048)) for part in (np.float32(1) - fraction, fraction))
    weight, rest = (values.astype(np.int32) for values in weights)
    return Taps(first.clip(0, before - 1), (first + 1).clip(0, before - 1), weight, rest)


# --- propagation ------------------------------------------------------------------------------


def propagate(
    target: Tensor, sources: Tensor, labels: Tensor, grid: tuple[int, int], how: Propagation
) -> Tensor:
    """The labels of a frame's patches from those of the context, `[N, K]`.

    A patch sums the labels of the `topk` patches with the largest exp(cosine / temperature) among
    all context frames and within `radius` of its place, weighted by it. Ties with the last vote too.

    Args:
        target: patch tokens `[N, D]`. sources: `[M, N, D]`. labels: `[M, N, K]`.
    """
    M, N, _ = sources.shape
    target, sources = F.normalize(target, dim=-1), F.normalize(sources, dim=-1).flatten(0, 1)
    votes = labels.flatten(0, 1)
    out = []
    for rows in torch.arange(N, device=target.device).split(max(1, LARGEST // (M * N))):
        affinity = (target[rows] @ sources.T / how.temperature).exp()  # [rows, M N]
        if how.radius:
            affinity *= within_radius(rows, grid, min(how.radius, max(grid))).repeat(1, M)
        last = affinity.topk(min(how.topk, M * N), dim=1).values[:, -1:]
        affinity[affinity < last] = 0
        affinity /= affinity.sum(1, keepdim=True)
        out.append(affinity @ votes)
    return torch.cat(out)


def within_radius(rows: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """bool [rows, N]: which patches lie at most `radius` rows and columns from those in `rows`."""
    h, w = grid
    place = torch.arange(h * w, device=rows.device)
    far = (rows[:, None] // w - place // w).abs().maximum((rows[:, None] % w - place % w).abs())
    return far <= radius


def decide(labels: Tensor, patch: int) -> np.ndarray:
    """Soft labels `[h, w, K]` -> uint8 [h * patch, w * patch]: stretched, levelled, the largest.

    Levelled: each label's map runs from 0 to 1, or a small object would never win.
    """
    maps = labels.permute(2, 0, 1)[None]
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = torch.where(high > low, high - low, 1)
    maps = torch.where(high > 0, (maps - low) / span, maps)
    return maps.argmax(0).to(torch.uint8).cpu().numpy()


def one_hot(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """uint8 [H, W] -> float32 [h, w, K], by the nearest pixel; `VOID` is background."""
    labels = np.where(mask == VOID, 0, mask).astype(np.uint8)
    small = Image.fromarray(labels).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    indices = torch.from_numpy(np.array(small)).long()
    return F.one_hot(indices, int(labels.max()) + 1).float()


def segment(
    backbone: Backbone,
    video: Video,
    how: Propagation,
    side: int = 480,
    precision: str = "fp32",
) -> Iterator[np.ndarray]:
    """The labels of every frame, uint8 [H, W] each; those of the first are the given mask.

    Args:
        side: the shorter side of a frame as it is shown to the network, in pixels.

    Raises:
        RunFailed: a file is damaged, or a patch token is not finite.
    """
    device, patch = device_of(backbone), backbone.require_patches()
    transform = transform_of(backbone)
    mask = read_mask(video.masks[0], video.labels)
    height, width = mask.shape

    def tokens(path: Path) -> Tensor:  # [h, w, D]
        image = resize_linear(
            read_frame(path, len(transform.mean)), *frame_size(height, width, side, patch)
        )
        pixels = torch.from_numpy(image)[None].to(device)
        with autocast(device, precision):
            found = backbone.tokens(transform.normalise(pixels))[1][0].float()
        if not found.isfinite().all():
            raise RunFailed(f"a patch token of {path} is not finite")
        return found

    yield mask
    first = tokens(video.frames[0])
    h, w = first.shape[:2]
    given = first.flatten(0, 1), one_hot(mask, (h, w)).flatten(0, 1).to(device)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=min(how.context, len(video.frames)))
    for path in video.frames[1:]:
        target = tokens(path).flatten(0, 1)
        sources, labels = zip(given, *before, strict=True)
        soft = propagate(target, torch.stack(sources), torch.stack(labels), (h, w), how)
        before.append((target, soft))
        large = Image.fromarray(decide(soft.unflatten(0, (h, w)), patch))
        yield np.array(large.resize((width, height), Image.Resampling.NEAREST))


def transform_of(backbone: Backbone) -> EvalTransform:
    """How a frame is normalised; with the published slip where the backbone asks for ImageNet's."""
    std = PUBLISHED_STD if tuple(backbone.std) == IMAGENET_STD else tuple(backbone.std)
    return EvalTransform.of(backbone, std=std)
