"""Pictures of what was seen: classes and objects laid over the photograph, and masks with a palette.

Letters: K classes, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xdino.data.image_files import printable
from xdino_eval.sheets import matplotlib
from xdino_transfer.judging.seeing import Instance
from xdino_transfer.segmentation.colours import COLOURS, colour

TINT = 0.5  # of a pixel that has a class or an object
IN_LEGEND = 10  # classes
LEAST_SHARE = 0.001  # of the pixels, for a line of the legend
UNTINTED = ("background", "other", "void", "unlabeled", "unlabelled")


def palette_mask(classes: np.ndarray) -> Image.Image:
    """uint8 [H, W] as a PNG of the same numbers, which viewers show in the classes' colours."""
    image = Image.fromarray(classes)
    image.putpalette(COLOURS.ravel().tolist())  # L to P
    return image


def shares(classes: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Share of the pixels by the name of each class that occurs, the largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(names)) / max(classes.size, 1)
    order = np.argsort(-counts, kind="stable")
    return {names[i]: float(counts[i]) for i in order if counts[i] > 0}


def segmented(
    photograph: np.ndarray, classes: np.ndarray, names: Sequence[str], legend: bool = True
) -> Image.Image:
    """A photograph uint8 [H, W, 3] under the colours of its classes uint8 [H, W].

    legend: colours and names stand below it, with the share of each.
    """
    strength = np.full(256, TINT, np.float32)
    bare = [number for number, name in enumerate(names) if name.lower() in UNTINTED]
    strength[bare] = 0
    opacity = strength[classes][..., None]
    picture = np.rint(photograph * (1 - opacity) + COLOURS[classes] * opacity).astype(np.uint8)
    edges = np.zeros(classes.shape, bool)
    edges[1:] |= classes[1:] != classes[:-1]
    edges[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    picture[edges] = 255
    image = Image.fromarray(picture)
    if not legend:
        return image
    found = [(n, s) for n, s in shares(classes, names).items() if s >= LEAST_SHARE]
    places = {name: number for number, name in reversed([*enumerate(names)])}
    white = (255, 255, 255)
    lines = [
        (white if places[n] in bare else colour(places[n]), f"{printable(n)}  {100 * s:.1f} %")
        for n, s in found[:IN_LEGEND]
    ]
    if len(found) > IN_LEGEND:
        lines.append((white, f"and {len(found) - IN_LEGEND} more"))
    return _with_legend(image, lines)


def _with_legend(
    image: Image.Image, lines: Sequence[tuple[tuple[int, int, int], str]]
) -> Image.Image:
    """Lines in columns below the picture, as many as its width takes."""
    size = _text_size(image)
    font, row, gap = _font(size), round(1.6 * size), round(0.6 * size)
    wide = max((round(font.getlength(text)) for _, text in lines), default=0) + 3 * gap + size
    columns = max(1, min(image.width // max(wide, 1), len(lines)))
    rows = -(-len(lines) // columns)
    out = Image.new("RGB", (max(image.width, wide), image.height + rows * row + 2 * gap), "white")
    out.paste(image, (0, 0))
    pen = ImageDraw.Draw(out)
    for i, (shade, text) in enumerate(lines):
        left = gap + i % columns * wide
        top = image.height + gap + i // columns * row
        pen.rectangle((left, top, left + size, top + size), fill=shade, outline="#888888")
        pen.text((left + size + gap, top + size / 2), text, fill="#222222", font=font, anchor="lm")
    return out


def detected(
    photograph: np.ndarray, objects: Sequence[Instance], names: Sequence[str]
) -> Image.Image:
    """A photograph uint8 [H, W, 3] with the masks, boxes, classes and scores of its objects.

    One colour a class; of one class alone one an object.
    """
    picture = photograph.astype(np.float32)
    shades = [colour(one.label if len(names) > 1 else number) for number, one in enumerate(objects)]
    for one, shade in reversed([*zip(objects, shades, strict=True)]):  # the best lies on top
        height, width = one.mask.shape
        part = picture[one.top : one.top + height, one.left : one.left + width]
        part[one.mask] = part[one.mask] * (1 - TINT) + np.array(shade, np.float32) * TINT
    image = Image.fromarray(np.rint(picture).astype(np.uint8))
    pen, size = ImageDraw.Draw(image), _text_size(image)
    line = max(1, size // 7)
    for one, shade in reversed([*zip(objects, shades, strict=True)]):
        pen.rectangle(_inside(one.box, image.size), outline=shade, width=line)
    small = _font(max(9, round(0.8 * size)))
    for one, shade in reversed([*zip(objects, shades, strict=True)]):
        text = f"{one.score:.2f}" if len(names) == 1 else f"{names[one.label]} {one.score:.2f}"
        _label(pen, image.size, one.box, printable(text), shade, small)
    return image


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    right, bottom = min(right, size[0] - 1), min(bottom, size[1] - 1)
    return min(left, right), min(top, bottom), right, bottom


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    shade: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Above the box, or inside of it at the picture's upper edge; never beyond the picture."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left + 4, bottom - top + 4
    x = max(min(box[0], size[0] - width), 0)
    y = box[1] - height if box[1] >= height else box[1]
    pen.rectangle((x, y, x + width, y + height), fill=shade)
    dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] > 140
    pen.text((x + 2 - left, y + 2 - top), text, fill="black" if dark else "white", font=font)


def _text_size(image: Image.Image) -> int:
    """Pixels of text that can be read on a picture of this size."""
    return max(11, round(max(image.size) / 70))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
