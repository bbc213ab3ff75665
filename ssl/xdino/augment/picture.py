"""views.png: the first batch as the networks see it, each image beside its crops.

An image is a row: the original with a frame where each crop was cut, then the crops, the sizes of one
resolution together, each in a frame of the same colour. What the crops went through since (flips,
colours, blur, resizing) is what there is to look at: crops that show nothing of an object, or colours
that lose what matters, are seen here before hours went into them.

Letters: B images, V views, C channels, H x W of an image, h x w of a crop.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from xdino.augment.multi_crop import boxes
from xdino.config.bands import Bands
from xdino.config.bands import picture as bands_as_rgb
from xdino.runtime.atomic import written_beside

IMAGES = 8  # rows
LEAST, MOST = 128, 224  # pixels of a row's height: a global crop's own, within these
SMALLEST = 40  # pixels of a crop's side
WIDEST = 1.5  # times the height, of an original
GAP, HEAD, FRAME = 8, 20, 2  # pixels between pictures, of the words above, of a frame
COLOURS = (
    (214, 39, 40), (31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (23, 190, 207), (188, 189, 34), (127, 127, 127),
)  # fmt: skip


def save_views(
    path: Path,
    groups: Sequence[Tensor] | Mapping[str, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    originals: Callable[[int], np.ndarray | None] = lambda _: None,
    table: np.ndarray | None = None,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    channels: int = 3,
) -> None:
    """A picture of the views: a row an image, the original where there is one, then its crops.

    Args:
        groups: normalised crops, each `[V_r, B, C, h, w]`, or by their names what is no crop.
        originals: gives image number b of the batch, uint8 [H, W, C], or None where it cannot be
            had; if none of the first can, the picture is of the crops alone.
        table: what was drawn for the crops, [V, B], so that their places can be shown.
        ratio: as of `MultiCrop`. channels: of the source, by which `Bands` say what is seen.

    Raises:
        RunFailed: it cannot be written.
    """
    pairs = (
        [*groups.items()]
        if isinstance(groups, Mapping)
        else [(f"{len(group)} crop{'s' if len(group) > 1 else ''}", group) for group in groups]
    )
    count = pairs[0][1].shape[1]
    found = {b: image for b in range(min(count, IMAGES)) if (image := originals(b)) is not None}
    rows = list(found) or list(range(min(count, IMAGES)))
    largest = max(group.shape[-1] for _, group in pairs)
    height = min(largest * max(1, -(-LEAST // largest)), MOST)
    columns: list[tuple[str, list[Image.Image]]] = []
    if found:
        framed = []
        for b, image in found.items():
            places = (
                None if table is None else boxes(table[:, b], image.shape[0], image.shape[1], ratio)
            )
            framed.append(_original(_rgb(image, channels), places, height))
        columns.append(("original, and its crops" if table is not None else "original", framed))
    first = 0
    for name, group in pairs:
        pixels, size = _rgb(_pixels(group[:, rows], mean, std), channels), group.shape[-1]
        most = min(max(1, round(largest / size)), max(1, height // SMALLEST))
        blocks = [_block(pixels[:, i], first, height, most) for i in range(len(rows))]
        columns.append((f"{name}, {size} px", blocks))
        first += len(group)
    with written_beside(path) as beside:
        _together(columns, height).save(beside)


def _pixels(group: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised [V, B, C, h, w] -> uint8 [V, B, h, w, C]."""
    shape = (1, 1, -1, 1, 1)
    pixels = group.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    array: np.ndarray = (pixels * 255).clamp(0, 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    return array


def _rgb(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [.., C] -> uint8 [.., 3]: declared colours, the first three channels, or the first as grey.

    As the network sees them: nothing is stretched.
    """
    if isinstance(channels, Bands):
        return bands_as_rgb(pixels, channels, stretched=False)
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, -1)


def _resized(picture: np.ndarray, width: int, height: int) -> Image.Image:
    """Made larger, it shows its own pixels."""
    larger = height >= 2 * picture.shape[0]
    method = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), method)


def _original(image: np.ndarray, places: np.ndarray | None, height: int) -> Image.Image:
    """uint8 [H, W, 3] within `height` x `WIDEST * height`, a frame for each place (top, left, h, w)."""
    H, W = image.shape[:2]
    scale = min(height / H, WIDEST * height / W)
    out = _resized(image, max(1, round(W * scale)), max(1, round(H * scale)))
    pen = ImageDraw.Draw(out)
    across, down = out.width / W, out.height / H
    for number, place in enumerate(() if places is None else places):
        top, left, h, w = (float(value) for value in place)
        corner = (round(left * across), round(top * down))
        end = (round((left + w) * across) - 1, round((top + h) * down) - 1)
        pen.rectangle((*corner, *map(max, corner, end)), outline=_colour(number), width=FRAME)
    return out


def _colour(number: int) -> tuple[int, int, int]:
    return COLOURS[number % len(COLOURS)]


def _block(crops: np.ndarray, first: int, height: int, most: int) -> Image.Image:
    """Crops of one image and size, uint8 [V, h, w, 3], in up to `most` rows that fill `height`.

    Their number is a multiple of the rows', so no cell is empty. first: of their colours.
    """
    count = len(crops)
    down = max(rows for rows in range(1, most + 1) if count % rows == 0)
    across = count // down
    side = (height - (down - 1) * GAP // 2) // down
    step = side + GAP // 2
    out = Image.new("RGB", (across * step - GAP // 2, height), "white")
    pen = ImageDraw.Draw(out)
    for i, pixels in enumerate(crops):
        left, top = i % across * step, i // across * step
        out.paste(_resized(pixels, side, side), (left, top))
        box = (left, top, left + side - 1, top + side - 1)
        pen.rectangle(box, outline=_colour(first + i), width=FRAME)
    return out


def _together(columns: Sequence[tuple[str, list[Image.Image]]], height: int) -> Image.Image:
    """Columns of pictures under their titles, a row an image."""
    font = ImageFont.load_default(13)
    widths = [
        max(*(block.width for block in blocks), round(font.getlength(title)))
        for title, blocks in columns
    ]
    rows = len(columns[0][1])
    width = sum(widths) + GAP * (len(columns) + 1)
    out = Image.new("RGB", (width, HEAD + rows * (height + GAP)), "white")
    pen, left = ImageDraw.Draw(out), GAP
    for (title, blocks), wide in zip(columns, widths, strict=True):
        pen.text((left, 2), title, fill="black", font=font)
        for row, block in enumerate(blocks):
            # Portraits, and small crops, stand in the middle of their column.
            x, y = left + (wide - block.width) // 2, (height - block.height) // 2
            out.paste(block, (x, HEAD + row * (height + GAP) + y))
        left += wide + GAP
    return out
