"""Pictures of attention and of channel matrices, and sheets of them.

Nothing is computed here that is scored: maps are stretched smoothly and coloured, for the eye.
Colours run from weight 0 to the map's 99th percentile, but never to less than `LEAST_TOP` times the
weight that each patch has when all have the same (the map's mean). So what is nearly flat looks
flat: attention that says nothing must not be drawn as vivid structure. Sheets say the upper end.

Letters: H x W pixels, h x w patches, d channels of a head.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from xdino.errors import world
from xdino_eval import sheets
from xdino_eval.attention.maps import MASS, Maps, mask
from xdino_eval.backbone_tokens import Lattice
from xdino_eval.sheets import (
    DRAWN,
    Figure,
    FigureCanvasAgg,
    Tile,
    as_rgb,
    matplotlib,
    save,
    sheet,
    wrapped,
)

COLOURS = matplotlib.colormaps["inferno"]
COLUMNS = 4
LARGE, SMALL = 320, 176  # pixels, a picture's longer side on an image's and on a folder's sheet
PAGE, ACROSS = 60, 9  # images on a page of a folder's sheet, and pictures side by side
LEAST_TOP = 3.0  # times the uniform weight, at the bright end of a map's colours at least


@dataclass(frozen=True)
class View:
    """One map drawn: uint8 [H, W, 3] twice, and its mask, bool [H, W]."""

    heat: np.ndarray
    overlay: np.ndarray
    mask: np.ndarray


def view(
    attention: np.ndarray,
    photograph: np.ndarray,
    lattice: Lattice | None = None,
    mass: float = MASS,
    limits: tuple[float, float] | None = None,
) -> View:
    """Draw one map, float [h, w], over uint8 [H, W, 3]; `limits` are its colours' ends."""
    height, width = photograph.shape[:2]
    limits = limits or limits_of(attention)
    wide = stretch(attention, lattice, height, width)
    return View(
        colour(wide, limits),
        overlay(photograph, wide, limits),
        mask(attention, lattice, height, width, mass),
    )


def choose(maps: Maps, head: int | None) -> list[tuple[str, np.ndarray]]:
    """(name, float [h, w]) of one map a layer: head number `head`, from 1, or the mean of all."""
    return [
        (f"{maps.name(i)}-{'mean' if head is None else f'head{head}'}", one_map(heads, head))
        for i, heads in enumerate(maps.layers)
    ]


def one_map(heads: np.ndarray, head: int | None) -> np.ndarray:
    """float [heads, h, w] -> float [h, w]: head number `head`, from 1, or the mean of all."""
    return heads.mean(0) if head is None else heads[head - 1]


def draw(
    maps: Maps,
    image: np.ndarray,
    out_dir: Path | str,
    stem: str,
    mass: float = MASS,
    head: int | None = None,
) -> list[Path]:
    """Write the pictures of `maps` over `image` as PNG files, the contact sheet first.

    For every layer: each head and its mask (black and white), the mean of the heads, the mean laid
    over the image, and its mask; all of the image's size in pixels. With `head`, that head alone
    in the place of the mean.

    Args:
        image: uint8 [H, W, C], the one that the maps are of, at any resolution.
        stem: how the files' names begin.
        head: a number from 1, or None.

    Returns:
        The files written.
    """
    out_dir = Path(out_dir)
    photograph = as_rgb(image)
    tiles: list[Tile | None] = []
    written: list[Path] = []

    def put(name: str, picture: np.ndarray) -> None:
        written.append(out_dir / f"{stem}-{name}.png")
        save(picture, written[-1])

    for i, heads in enumerate(maps.layers):
        name = maps.name(i)
        each: list[Tile | None] = []
        for number, attention in enumerate(heads, 1) if head is None else ():
            one = view(attention, photograph, maps.lattice, mass)
            put(f"{name}-head{number}", one.heat)
            put(f"{name}-head{number}-mask", black_white(one.mask))
            top = times_uniform(attention)
            each.append(Tile([one.heat], f"head {number}, to {top:.1f}x"))
        mean = one_map(heads, head)
        main = view(mean, photograph, maps.lattice, mass)
        prefix, what = ("", "mean of heads") if head is None else (f"head{head}-", f"head {head}")
        put(f"{name}-{prefix or 'mean'}".rstrip("-"), main.heat)
        put(f"{name}-{prefix}overlay", main.overlay)
        put(f"{name}-{prefix}mask", black_white(main.mask))
        tiles += [
            Tile([photograph], "image"),
            Tile([main.heat], f"{_title(name)}: {what}, to {times_uniform(mean):.1f}x"),
            Tile([main.overlay], f"{what}, laid over"),
            Tile([dimmed(photograph, main.mask)], f"{mass:.0%} of its mass"),
            *each,
            *[None] * (-len(each) % COLUMNS),
        ]
    path = out_dir / f"{stem}-sheet.png"
    save(sheet(tiles, COLUMNS, LARGE, SCALE), path)
    return [path, *written]


SCALE = (
    "Colours: from weight 0 (black) to the number behind a title, in multiples of the uniform "
    f"weight that all patches would share alike (bright). It is at least {LEAST_TOP:g}, so that a "
    "map that is nearly flat looks flat."
)


def _title(name: str) -> str:
    """ "layer2" -> "class-attention layer 2"; "block12" -> "block 12"."""
    if name.startswith("layer"):
        return f"class-attention layer {name.removeprefix('layer')}"
    return name.replace("block", "block ")


def folder_sheets(
    rows: Iterable[tuple[str, Sequence[np.ndarray]]], out_dir: Path, stem: str = "sheet"
) -> Iterator[Path]:
    """Write the images of a folder side by side, `PAGE` of them a page; yields each page.

    Args:
        rows: (name, uint8 [H, W, 3] pictures of one image, as many for each).
        stem: of the files' names: "sheet.png", then "sheet-2.png" and so on.
    """
    named = iter(rows)
    for number in itertools.count(1):
        tiles = [Tile(pictures, name) for name, pictures in itertools.islice(named, PAGE)]
        if not tiles:
            return
        columns = max(1, min(len(tiles), round(ACROSS / len(tiles[0].pictures))))
        path = out_dir / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        save(sheet(tiles, columns, SMALL), path)
        yield path


def draw_channels(matrices: Sequence[np.ndarray], out_dir: Path | str, stem: str) -> list[Path]:
    """Write XCA's matrices, float [heads, d, d] a block, as heat maps: one file a block, one of all.

    Returns:
        The files written, the sheet of all blocks first.
    """
    out_dir = Path(out_dir)
    top = max(float(np.quantile(block, 0.999)) for block in matrices)
    written = [out_dir / f"{stem}-xca-sheet.png"]
    _channel_figure(matrices, range(1, len(matrices) + 1), top, written[0])
    for i, block in enumerate(matrices, 1):
        written.append(out_dir / f"{stem}-xca-block{i}.png")
        _channel_figure([block], [i], float(np.quantile(block, 0.999)), written[-1])
    return written


NOTE = (
    "Cross-covariance attention mixes the channels of a head, so its matrices have no map over the "
    "image. Row: channel that is written; column: channel that is read; rows sum to 1."
)


def _channel_figure(
    blocks: Sequence[np.ndarray], numbers: Sequence[int], top: float, path: Path
) -> None:
    rows, columns = len(blocks), max(len(block) for block in blocks)
    inches = 1.7 if rows > 1 else 2.6
    size = (max(7.0, columns * inches + 1.2), rows * inches + 1.3)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, (number, block) in enumerate(zip(numbers, blocks, strict=True)):
        for column, matrix in enumerate(block):
            axes = grid[row, column]
            shown = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=max(top, 1e-12))
            axes.set_xticks([0, len(matrix) - 1])
            axes.set_yticks([0, len(matrix) - 1])
            axes.tick_params(labelsize=6, length=2)
            if row == 0:
                axes.set_title(f"head {column + 1}", fontsize=9)
            if row == rows - 1:
                axes.set_xlabel("key channel", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"block {number}\nquery channel", fontsize=8)
    figure.colorbar(shown, ax=list(grid.flat), label="attention weight", shrink=min(1, 3 / rows))
    lines = wrapped(NOTE, lambda line: len(line) > size[0] * 14)
    figure.suptitle("\n".join(lines), fontsize=8)
    with world(f"write {path}"), sheets.quiet():
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path, metadata=DRAWN)


def black_white(keep: np.ndarray) -> np.ndarray:
    """bool [H, W] -> uint8 [H, W], white where True."""
    return np.where(keep, 255, 0).astype(np.uint8)


def dimmed(photograph: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3], dark where bool [H, W] is False."""
    return np.where(keep[..., None], photograph, photograph // 5)


def stretch(
    values: np.ndarray, lattice: Lattice | None, height: int, width: int, smooth: bool = True
) -> np.ndarray:
    """float [h, w] or [C, h, w] -> float32 of [.., height, width], each patch where it lies.

    Bicubic, or by nearest patch; constant past the outermost patches' centres.
    """
    stack = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(
        1, -1, *values.shape[-2:]
    )
    lattice = lattice or Lattice((0.0, 0.0), (1 / stack.shape[2], 1 / stack.shape[3]))
    axes = []
    for axis, (patches, pixels) in enumerate(((stack.shape[2], height), (stack.shape[3], width))):
        at = (torch.arange(pixels) + 0.5) / pixels - lattice.start[axis]  # shares of the image
        axes.append(2 * at / (lattice.step[axis] * patches) - 1)  # grid_sample's -1..1
    y, x = torch.meshgrid(*axes, indexing="ij")
    wide = F.grid_sample(
        stack,
        torch.stack((x, y), -1)[None],
        mode="bicubic" if smooth else "nearest",
        padding_mode="border",
        align_corners=False,
    )
    return wide[0].numpy().reshape(*values.shape[:-2], height, width)


def limits_of(attention: np.ndarray) -> tuple[float, float]:
    """The ends of a map's colours, see the module: float [h, w] -> (0, the bright end).

    One patch must not blacken the rest, so a hundredth is cut off; and what is less than
    `LEAST_TOP` times the uniform weight is not bright.
    """
    return 0.0, times_uniform(attention) * float(attention.mean())


def times_uniform(attention: np.ndarray) -> float:
    """The bright end of a map's colours in multiples of the uniform weight, its mean."""
    mean = float(attention.mean())
    return max(float(np.quantile(attention, 0.99)) / mean, LEAST_TOP) if mean > 0 else LEAST_TOP


def colour(attention: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """float [H, W] -> uint8 [H, W, 3], dark to bright between `limits`, by default `limits_of`."""
    return np.rint(COLOURS(unit(attention, limits))[..., :3] * 255).astype(np.uint8)


def overlay(
    photograph: np.ndarray, attention: np.ndarray, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """uint8 [H, W, 3] and float [H, W] -> uint8 [H, W, 3]: colour where the attention is."""
    opacity = (0.15 + 0.65 * unit(attention, limits))[..., None]
    grey = photograph.mean(2, keepdims=True) * 0.8
    return np.rint(grey * (1 - opacity) + colour(attention, limits) * opacity).astype(np.uint8)


def unit(attention: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Scaled to 0..1 between `limits`, by default `limits_of`."""
    low, high = limits or limits_of(attention)
    return np.clip((attention - low) / max(high - low, 1e-12), 0, 1)
