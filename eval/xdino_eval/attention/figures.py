"""Pictures of attention, and sheets of them.

Nothing is computed here that is scored: maps are stretched smoothly and coloured, for the eye, all on
one scale (`colours`). A picture is made at the image's own size within bounds, whatever the size that
the network saw; its caption says both.

Letters: H x W pixels, h x w patches.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from xdino_eval.attention import captions
from xdino_eval.attention.colours import Scale, colour, overlay, times_even
from xdino_eval.attention.maps import MASS, Maps, mask, mass_threshold
from xdino_eval.backbone_tokens import Lattice
from xdino_eval.sheets import (
    GAP,
    LARGEST,
    ROW,
    Bar,
    Tile,
    as_rgb,
    captioned,
    drawn_here,
    resized,
    save,
    sheet,
)

CAPTION = 250  # pixels below a sheet that are kept for words, about
LARGE, SMALL = 400, 224  # pixels, a picture's longer side on one image's and on a sheet of many
LEAST, MOST = 480, 640  # pixels of the longer side of what is drawn on
MOST_OF_EACH = 4096  # the same, where every map has a file of its own
ASPECT = 1.4  # width of a sheet of many over its height, about
INSIDE = (0, 190, 220)  # the colour of a mask


@dataclass(frozen=True)
class View:
    """One map drawn: uint8 [H, W, 3] twice, and its mask, bool [H, W]."""

    heat: np.ndarray
    overlay: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Looked:
    """An image that was looked at: what it is called, its maps, the photograph to draw on (uint8
    [H, W, C]), and the lines of the caption that say what made them."""

    name: str
    photograph: np.ndarray
    maps: Maps
    told: Sequence[str] = ()


def view(
    attention: np.ndarray,
    photograph: np.ndarray,
    lattice: Lattice | None = None,
    mass: float = MASS,
    scale: Scale | None = None,
) -> View:
    """Draw one map, float [h, w], over uint8 [H, W, 3]; on a scale of its own where none is given."""
    height, width = photograph.shape[:2]
    scale = scale or Scale.of([attention])
    wide = stretch(times_even(attention), lattice, height, width)
    return View(
        colour(wide, scale),
        overlay(photograph, wide, scale),
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


def every_map(maps: Maps, head: int | None = None) -> list[np.ndarray]:
    """What one scale must hold for, float [h, w] each: the means, and all heads but for `head`."""
    heads = [one for layer in maps.layers for one in layer] if head is None else []
    return [*(one_map(layer, head) for layer in maps.layers), *heads]


def fitted(photograph: np.ndarray, least: int = LEAST, most: int = MOST) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H', W', 3] with a longer side from `least` to `most` pixels.

    Made larger, it shows its own pixels.
    """
    picture = as_rgb(photograph)
    side = max(picture.shape[:2])
    if least <= side <= most:
        return picture
    return np.asarray(resized(picture, min(max(side, least), most)))


def draw_overlay(
    looked: Looked,
    path: Path,
    scale: Scale,
    mass: float = MASS,
    head: int | None = None,
) -> Path:
    """Write one picture of an image: its last layer's map laid over, and beside it the mask."""
    photograph, maps = fitted(looked.photograph), looked.maps
    attention = one_map(maps.layers[-1], head)
    drawn = view(attention, photograph, maps.lattice, mass, scale)
    pair = sheet([Tile([drawn.overlay, masked(photograph, drawn.mask, attention, mass)])], 1)
    lines = [
        looked.name,
        *looked.told,
        f"{told_map(maps, head)}; right: {captions.kept(share(attention, mass), mass)}",
    ]
    save(captioned(pair, lines, captions.bar(scale)), path)
    return path


def draw_sheet(
    looked: Looked,
    path: Path,
    scale: Scale,
    mass: float = MASS,
    head: int | None = None,
) -> Path:
    """Write one image's sheet: for every layer the mean laid over, its mask, its map, each head."""
    maps = looked.maps
    photograph = fitted(looked.photograph, LARGE, LARGE)
    count = 4 + (len(maps.layers[0]) if head is None else 0)
    columns = columns_of(count, len(maps.layers))
    tiles: list[Tile | None] = []
    for i, heads in enumerate(maps.layers):
        mean = one_map(heads, head)
        main = view(mean, photograph, maps.lattice, mass, scale)
        layer = title(maps.name(i))
        tiles += [
            Tile([photograph], "image"),
            Tile([main.overlay], f"{layer}: {_heads(heads, head)}"),
            Tile(
                [masked(photograph, main.mask, mean, mass)],
                captions.kept(share(mean, mass), mass),
            ),
            Tile([main.heat], f"{layer}: the map alone"),
        ]
        for number, attention in enumerate(heads, 1) if head is None else ():
            one = view(attention, photograph, maps.lattice, mass, scale)
            tiles.append(Tile([one.overlay], f"{layer}: head {number}"))
        tiles += [None] * (-count % columns)
    side = min((LARGEST - CAPTION) // (len(tiles) // columns) - 2 * ROW, LARGEST // columns - GAP)
    side = max(24, min(LARGE, side))
    whole = sheet(tiles, columns, side, widest=side)
    save(captioned(whole, [looked.name, *looked.told], captions.bar(scale)), path)
    return path


def columns_of(count: int, layers: int) -> int:
    """Of one image's sheet with `count` pictures a layer: about a square, with the fewest gaps."""
    least = max(4, round(math.sqrt(count * layers)))
    return min(range(least, least + 3), key=lambda n: (-count % n, n))


def draw_each(
    looked: Looked,
    out_dir: Path | str,
    stem: str,
    scale: Scale,
    mass: float = MASS,
    head: int | None = None,
) -> Iterator[Path]:
    """Write every map of `looked` as a PNG file of its own, without a caption; yields each.

    For every layer: each head and its mask (black and white), the mean of the heads, the mean laid
    over the image, and its mask; all of the photograph's size in pixels, up to `MOST_OF_EACH` along
    the longer side. With `head`, that head alone in the place of the mean.

    Args:
        stem: how the files' names begin.
        head: a number from 1, or None.
    """
    photograph, maps = fitted(looked.photograph, 1, MOST_OF_EACH), looked.maps

    def put(name: str, picture: np.ndarray) -> Path:
        path = Path(out_dir) / f"{stem}-{name}.png"
        save(picture, path)
        return path

    for i, heads in enumerate(maps.layers):
        name = maps.name(i)
        for number, attention in enumerate(heads, 1) if head is None else ():
            one = view(attention, photograph, maps.lattice, mass, scale)
            yield put(f"{name}-head{number}", one.heat)
            yield put(f"{name}-head{number}-mask", black_white(one.mask))
        main = view(one_map(heads, head), photograph, maps.lattice, mass, scale)
        prefix = "" if head is None else f"head{head}-"
        yield put(f"{name}-{prefix or 'mean'}".rstrip("-"), main.heat)
        yield put(f"{name}-{prefix}overlay", main.overlay)
        yield put(f"{name}-{prefix}mask", black_white(main.mask))


def title(name: str) -> str:
    """ "layer2" -> "class-attention layer 2"; "block12" -> "block 12"."""
    if name.startswith("layer"):
        return f"class-attention layer {name.removeprefix('layer')}"
    return name.replace("block", "block ")


def told_map(maps: Maps, head: int | None = None) -> str:
    """ "class-attention layer 2, mean of 4 heads": what is drawn of an image that has one picture."""
    return f"{title(maps.name(len(maps.layers) - 1))}, {_heads(maps.layers[-1], head)}"


def _heads(heads: np.ndarray, head: int | None) -> str:
    return f"mean of {len(heads)} heads" if head is None else f"head {head}"


def row(
    looked: Looked, scale: Scale, mass: float = MASS, head: int | None = None
) -> tuple[str, list[np.ndarray]]:
    """An image on a sheet of many: its name, and itself, overlay and mask of the last layer."""
    photograph = fitted(looked.photograph, SMALL, SMALL)
    one = one_map(looked.maps.layers[-1], head)
    drawn = view(one, photograph, looked.maps.lattice, mass, scale)
    name = f"{looked.name}: {mass:.0%} on {share(one, mass):.0%}"
    return name, [photograph, drawn.overlay, masked(photograph, drawn.mask, one, mass)]


def folder_sheets(
    rows: Iterable[tuple[str, Sequence[np.ndarray]]],
    out_dir: Path,
    stem: str = "sheet",
    told: Callable[[], Sequence[str]] = tuple,
    bar: Bar | None = None,
) -> Iterator[Path]:
    """Write many images side by side on pages of at most about `LARGEST` pixels; yields each page.

    Pages of an earlier, longer list are removed.

    Args:
        rows: (name, uint8 [H, W, 3] pictures of one image, as many for each), drawn `SMALL`.
        stem: of the files' names: "sheet.png", then "sheet-2.png" and so on.
        told: gives the lines below, once the page is full.
    """
    named = ((name, [np.asarray(resized(p, SMALL)) for p in pictures]) for name, pictures in rows)
    for number in itertools.count(1):
        path = out_dir / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        first = next(named, None)
        if first is None:
            break
        across = LARGEST // (len(first[1]) * (SMALL + 4) + GAP) or 1
        rows_down = (LARGEST - CAPTION) // (SMALL + 2 * ROW)
        tiles = [
            Tile(pictures, name)
            for name, pictures in (first, *itertools.islice(named, across * rows_down - 1))
        ]
        wide = max(sum(p.shape[1] for p in tile.pictures) for tile in tiles) + GAP
        down = max(p.shape[0] for tile in tiles for p in tile.pictures) + 2 * ROW
        columns = max(round(math.sqrt(len(tiles) * ASPECT * down / wide)), 1)
        columns = min(max(columns, -(-len(tiles) // rows_down)), LARGEST // wide or 1)
        save(captioned(sheet(tiles, columns), told(), bar), path)
        yield path
    while drawn_here(path):
        path.unlink()
        number += 1
        path = out_dir / f"{stem}-{number}.png"


def black_white(keep: np.ndarray) -> np.ndarray:
    """bool [H, W] -> uint8 [H, W], white where True."""
    return np.where(keep, 255, 0).astype(np.uint8)


def dimmed(photograph: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3], dark where bool [H, W] is False."""
    return np.where(keep[..., None], photograph, photograph // 4)


def masked(
    photograph: np.ndarray, keep: np.ndarray, attention: np.ndarray, mass: float = MASS
) -> np.ndarray:
    """uint8 [H, W, 3]: the photograph, tinted where bool [H, W] is True and dark where it is not.

    The fainter the more even the map, float [h, w], is: the `mass` of a flat one lies on as large a
    share of the patches, anywhere, and such a mask must not look like an object that was found.
    """
    strength = min(1.0, max(0.0, 2 * (1 - share(attention, mass) / mass)))
    inside = photograph * (1 - 0.35 * strength) + np.array(INSIDE) * 0.35 * strength
    outside = photograph * (1 - 0.7 * strength)
    return np.rint(np.where(keep[..., None], inside, outside)).astype(np.uint8)


def share(attention: np.ndarray, mass: float = MASS) -> float:
    """How many of the patches hold `mass` of a map, float [h, w]: 0..1."""
    return float(mass_threshold(attention, mass).mean()) if attention.any() else 0.0


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
