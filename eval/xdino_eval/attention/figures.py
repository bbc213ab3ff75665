"""Pictures of attention, of principal components and of channel matrices; contact sheets.

Nothing is computed here that is scored: maps are stretched smoothly and coloured, for the eye.
Colours run from weight 0 to the map's 99th percentile, but never to less than `LEAST_TOP` times the
weight that each patch has when all have the same (the map's mean). So what is nearly flat looks
flat: attention that says nothing must not be drawn as vivid structure. Sheets say the upper end.

Every PNG says that it was drawn here (`drawn_here`), so that no command takes its own pictures for
photographs.

Letters: H x W pixels, h x w patches, d channels of a head.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch.nn import functional as F

from xdino.errors import world
from xdino_eval import plotting
from xdino_eval.attention.maps import MASS, Maps, mask
from xdino_eval.backbone_tokens import Lattice
from xdino_eval.image_files import DAMAGED, printable
from xdino_eval.plotting import Figure, FigureCanvasAgg, matplotlib

COLOURS = matplotlib.colormaps["inferno"]
COLUMNS = 4
BLANK = np.full((1, 1, 3), 255, dtype=np.uint8)
LARGE, TILE = 320, 176  # pixels, the longer side of a picture on an image's and a folder's sheet
ROW, GAP = 18, 12  # pixels of a line of text, and between pictures
PAGE = 60  # images on a page of a folder's sheet
LEAST_TOP = 3.0  # times the uniform weight, at the bright end of a map's colours at least
DRAWN = {"Software": "xdino"}  # in the header of every picture from here


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
    sheet: list[tuple[str, np.ndarray]] = []
    written: list[Path] = []

    def put(name: str, picture: np.ndarray) -> None:
        written.append(out_dir / f"{stem}-{name}.png")
        save(Image.fromarray(picture), written[-1])

    for i, heads in enumerate(maps.layers):
        name = maps.name(i)
        tiles = []
        for number, attention in enumerate(heads, 1) if head is None else ():
            one = view(attention, photograph, maps.lattice, mass)
            put(f"{name}-head{number}", one.heat)
            put(f"{name}-head{number}-mask", black_white(one.mask))
            tiles.append((f"head {number}, to {times_uniform(attention):.1f}x", one.heat))
        mean = one_map(heads, head)
        main = view(mean, photograph, maps.lattice, mass)
        prefix, what = ("", "mean of heads") if head is None else (f"head{head}-", f"head {head}")
        put(f"{name}-{prefix or 'mean'}".rstrip("-"), main.heat)
        put(f"{name}-{prefix}overlay", main.overlay)
        put(f"{name}-{prefix}mask", black_white(main.mask))
        sheet += [
            ("image", photograph),
            (f"{_title(name)}: {what}, to {times_uniform(mean):.1f}x", main.heat),
            (f"{what}, laid over", main.overlay),
            (f"{mass:.0%} of its mass", dimmed(photograph, main.mask)),
            *tiles,
            *[("", BLANK)] * (-len(tiles) % COLUMNS),
        ]
    path = out_dir / f"{stem}-sheet.png"
    contact_sheet(sheet, path, SCALE)
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


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray]], path: Path, note: str = "") -> None:
    """Write (title, uint8 [H, W, 3]) pictures as rows of `COLUMNS`; an untitled one is a gap.

    All are as large as the first; a column is as wide as the longest title needs. `note` stands
    below.
    """
    first = _shrunk(pictures[0][1], LARGE)
    font = ImageFont.load_default(14)
    titles = max(math.ceil(font.getlength(title)) for title, _ in pictures)
    width, height = max(first.width, titles) + GAP, first.height + 2 * ROW
    rows = math.ceil(len(pictures) / COLUMNS)
    lines = _lines(note, lambda line: font.getlength(line) > COLUMNS * width - GAP)
    size = (COLUMNS * width + GAP, rows * height + GAP + len(lines) * ROW)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, picture) in enumerate(pictures):
        if title:
            left, top = GAP + i % COLUMNS * width, GAP + i // COLUMNS * height
            pen.text((left, top), title, fill="black", font=font)
            sheet.paste(_shrunk(picture, LARGE), (left, top + ROW))
    for i, line in enumerate(lines):
        pen.text(
            (GAP, GAP + rows * height + (i - 1) * ROW + GAP // 2), line, fill="#444444", font=font
        )
    save(sheet, path)


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG that says it was drawn here; its folder is made.

    Raises:
        RunFailed: it cannot be written.
    """
    header = PngImagePlugin.PngInfo()
    for name, value in DRAWN.items():
        header.add_text(name, value)
    with world(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", pnginfo=header)


def drawn_here(path: Path) -> bool:
    """Whether a file is a picture that was drawn here, by its header."""
    if path.suffix.lower() != ".png" or not path.is_file():
        return False
    with contextlib.suppress(*DAMAGED), Image.open(path, formats=["PNG"]) as image:
        return all(image.info.get(name) == value for name, value in DRAWN.items())
    return False


def folder_sheets(
    rows: Iterable[tuple[str, Sequence[np.ndarray]]], out_dir: Path, stem: str = "sheet"
) -> Iterator[Path]:
    """Write the images of a folder side by side, `PAGE` of them a page; yields each page.

    Args:
        rows: (name, uint8 [H, W, 3] pictures of one image, as many for each).
        stem: of the files' names: "sheet.png", then "sheet-2.png" and so on.
    """
    cells: list[Image.Image] = []
    pages = 0

    def page() -> Path:
        nonlocal pages
        pages += 1
        path = out_dir / (f"{stem}.png" if pages == 1 else f"{stem}-{pages}.png")
        save(_page(cells), path)
        cells.clear()
        return path

    for name, pictures in rows:
        cells.append(_cell(name, pictures))
        if len(cells) == PAGE:
            yield page()
    if cells:
        yield page()


def _cell(name: str, pictures: Sequence[np.ndarray]) -> Image.Image:
    """The pictures of one image in a row, its name below."""
    small = [_shrunk(picture, TILE) for picture in pictures]
    cell = Image.new("RGB", (len(small) * (TILE + 4), TILE + ROW), "white")
    for i, tile in enumerate(small):
        cell.paste(tile, (i * (TILE + 4) + (TILE - tile.width) // 2, (TILE - tile.height) // 2))
    pen, name = ImageDraw.Draw(cell), printable(name)
    while len(name) > 4 and pen.textlength(name) > cell.width:
        name = "..." + name[4:]  # the end of a path tells images apart
    pen.text((0, TILE + 3), name, fill="black")
    return cell


def _shrunk(picture: np.ndarray, side: int) -> Image.Image:
    """With its longer side at `side` pixels; made larger, it shows its own pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(picture).resize(size, method)


def _page(cells: Sequence[Image.Image]) -> Image.Image:
    width, height = cells[0].size
    columns = max(1, min(len(cells), round(1600 / width)))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * height + GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (GAP + i % columns * (width + GAP), GAP + i // columns * height))
    return sheet


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
    lines = _lines(NOTE, lambda line: len(line) > size[0] * 14)
    figure.suptitle("\n".join(lines), fontsize=8)
    with world(f"write {path}"), plotting.quiet():
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path, metadata=DRAWN)


def _lines(words: str, too_long: Callable[[str], bool]) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and not too_long(longer):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W, 3]: the first three channels, or the first as grey."""
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


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
