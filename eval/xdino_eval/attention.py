"""What the class token of an XCiT looks at, and pictures of it.

XCiT's own attention (XCA) is between channels and has no map. The maps are those of its class
attention (El-Nouby et al. 2021, https://arxiv.org/abs/2106.09681, section 3.3; inherited from
CaiT, https://arxiv.org/abs/2103.17239): the softmax weights of the class token over the patches,
one map a head. A mask keeps the fewest patches that hold a given mass of the attention, 60 % as in
DINO (https://arxiv.org/abs/2104.14294, section 4.2.2 and figure 4).

Letters: H x W pixels, C channels, h x w patches.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from xdino.errors import UsageError
from xdino_eval.features import device_of, evaluating
from xdino_eval.transform import EvalTransform, Judged, resize_shorter

COLOURS = matplotlib.colormaps["inferno"]


class ClassAttending(Judged, Protocol):
    """What an XCiT backbone has over others."""

    def class_attention(self, images: Tensor) -> list[Tensor]: ...
    def grid(self, height: int, width: int) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Maps:
    """Class-attention maps, one float32 [heads, h, w] a layer, the last layer last.

    The weights are the softmax's, without the class token's own: they sum to less than 1.
    """

    layers: tuple[np.ndarray, ...]


def class_attention_maps(backbone: nn.Module, image: np.ndarray, size: int | None = None) -> Maps:
    """The class-attention maps of one image, whole and in its own proportions.

    Args:
        backbone: an XCiT: `class_attention(images) -> list of [B, heads, 1+N]` and
            `grid(H, W) -> (h, w)`.
        image: uint8 [H, W, C].
        size: the shorter side, in pixels, that the image is resized to (bicubic); None = the
            backbone's input size. It need not be a multiple of the patch.

    Raises:
        UsageError: the backbone has no class attention.
    """
    if not (hasattr(backbone, "class_attention") and hasattr(backbone, "grid")):
        raise UsageError(
            "class-attention maps need an XCiT backbone, and a "
            f"{type(backbone).__name__} has no class attention"
        )
    network = cast(ClassAttending, backbone)
    transform = EvalTransform.of(network, size)
    pixels = torch.from_numpy(resize_shorter(image, transform.size).copy())
    inputs = transform.normalise(pixels[None].to(device_of(backbone)))  # [1, C, H, W]
    with evaluating(backbone), torch.inference_mode():
        weights = network.class_attention(inputs)
    h, w = network.grid(inputs.shape[2], inputs.shape[3])
    return Maps(tuple(layer[0, :, 1:].reshape(-1, h, w).float().cpu().numpy() for layer in weights))


def mass_threshold(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """bool [h, w]: the fewest patches that together hold at least `mass` of the attention.

    Among equal patches the first in reading order is kept.

    Args:
        attention: float [h, w], none negative, not all zero.
        mass: a fraction, 0 < mass <= 1.

    Raises:
        ValueError: anything else.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must lie in (0, 1], got {mass}")
    flat = attention.astype(np.float64).ravel()
    if not (np.isfinite(flat).all() and (flat >= 0).all() and flat.any()):
        raise ValueError("attention must be finite, not negative and not all zero")
    order = np.argsort(-flat, kind="stable")
    held = np.cumsum(flat[order])
    keep = np.zeros(flat.shape, dtype=bool)
    keep[order[: int(np.searchsorted(held, mass * held[-1])) + 1]] = True
    return keep.reshape(attention.shape)


def draw(
    maps: Maps, image: np.ndarray, out_dir: Path | str, stem: str, mass: float = 0.6
) -> list[Path]:
    """Write the pictures of `maps` over `image` as PNG files, the contact sheet first.

    For every layer: each head, the mean of the heads, the mean laid over the image, and the mask
    of the mean (black and white), all of the image's size in pixels. A map is stretched over the
    whole image, though the last patch of a row may reach past its edge.

    Args:
        image: uint8 [H, W, C], the one that the maps are of, at any resolution.
        stem: how the files' names begin.

    Returns:
        The files written.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    photograph = as_rgb(image)
    height, width = photograph.shape[:2]
    sheet: list[tuple[str, np.ndarray]] = []
    written: list[Path] = []
    for number, heads in enumerate(maps.layers, 1):
        mean = heads.mean(0)
        keep = stretch(mass_threshold(mean, mass).astype(np.float32), height, width, smooth=False)
        coloured = {
            f"head{i}": colour(stretch(head, height, width)) for i, head in enumerate(heads, 1)
        }
        coloured["mean"] = colour(stretch(mean, height, width))
        coloured["overlay"] = overlay(photograph, stretch(mean, height, width))
        coloured["mask"] = np.where(keep > 0.5, 255, 0).astype(np.uint8)
        for name, picture in coloured.items():
            written.append(out_dir / f"{stem}-layer{number}-{name}.png")
            Image.fromarray(picture).save(written[-1])
        dimmed = np.where(keep[..., None] > 0.5, photograph, photograph // 5)
        title = f"class-attention layer {number}"
        sheet += [
            ("image", photograph),
            (f"{title}: mean of heads", coloured["mean"]),
            ("mean, laid over", coloured["overlay"]),
            (f"{mass:.0%} of the mean's mass", dimmed),
        ]
        tiles = [(f"head {i}", coloured[f"head{i}"]) for i in range(1, len(heads) + 1)]
        sheet += tiles + [("", BLANK)] * (-len(tiles) % COLUMNS)
    path = out_dir / f"{stem}-sheet.png"
    contact_sheet(sheet, path, height / width)
    return [path, *written]


COLUMNS = 4
BLANK = np.full((1, 1, 3), 255, dtype=np.uint8)


def contact_sheet(pictures: list[tuple[str, np.ndarray]], path: Path, aspect: float) -> None:
    """Write (title, uint8 [H, W, 3]) pictures of one `aspect` (H / W) as rows of `COLUMNS`."""
    rows = math.ceil(len(pictures) / COLUMNS)
    inches = 3.2
    figure = Figure(
        figsize=(COLUMNS * inches, rows * (inches * aspect + 0.3)), dpi=100, layout="constrained"
    )
    for axes, (title, picture) in zip(figure.subplots(rows, COLUMNS).flat, pictures, strict=True):
        axes.set_axis_off()
        if title:
            axes.imshow(picture)
            axes.set_title(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W, 3]: the first three channels, or the first as grey."""
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def stretch(attention: np.ndarray, height: int, width: int, smooth: bool = True) -> np.ndarray:
    """float [h, w] -> float32 [height, width], bicubic or, for masks, by nearest patch."""
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    picture = Image.fromarray(np.ascontiguousarray(attention, dtype=np.float32))
    return np.asarray(picture.resize((width, height), method))


def colour(attention: np.ndarray) -> np.ndarray:
    """float [H, W] -> uint8 [H, W, 3]: its own range, dark to bright."""
    return np.rint(COLOURS(unit(attention))[..., :3] * 255).astype(np.uint8)


def overlay(photograph: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] and float [H, W] -> uint8 [H, W, 3]: colour where the attention is."""
    opacity = (0.15 + 0.65 * unit(attention))[..., None]
    grey = photograph.mean(2, keepdims=True) * 0.8
    return np.rint(grey * (1 - opacity) + colour(attention) * opacity).astype(np.uint8)


def unit(attention: np.ndarray) -> np.ndarray:
    """Scaled to 0..1; the brightest hundredth is cut off, or one patch would blacken the rest."""
    low, high = float(attention.min()), float(np.quantile(attention, 0.99))
    return np.clip((attention - low) / max(high - low, 1e-12), 0, 1)
