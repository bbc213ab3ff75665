"""Pictures put together on sheets, each under its caption; PNG files that say who drew them.

Attention, principal components, neighbours and the demo all come on sheets from here. Every PNG says
that it was drawn here (`drawn_here`), so that no command takes its own pictures for photographs.

matplotlib comes from here, too, without remarks about folders and fonts: where its folder of settings
cannot be written (a home that is read-only), it makes another and says so, which is nothing a person who
asked for a picture can use. Of a folder that is nowhere to be had it makes an error: a sentence here.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from xdino.config import bands
from xdino.data.image_files import DAMAGED, printable
from xdino.errors import world


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, matplotlib says nothing of its cache, nor of letters that its font lacks."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            warnings.filterwarnings("ignore", message="Matplotlib")
            yield
    finally:
        log.setLevel(level)


with quiet(), world("find a folder for matplotlib's cache"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG as FigureCanvasSVG
    from matplotlib.figure import Figure as Figure

ROW, GAP, BESIDE = 18, 12, 4  # pixels: a line of text, between tiles, between pictures of a tile
LARGEST = 4000  # pixels of a sheet's width and height, about: what every viewer opens at once
NARROWEST = 480  # pixels that a caption below a picture may take at least
BAR = (320, 12)  # pixels of a colour bar
CAPTION = 360  # pixels that a caption may take where its pictures are narrower
FRAME, DASH = 3, 6  # pixels: a frame's width, and a dash of it
DRAWN = {"Software": "xdino"}  # in the header of every picture from here


@dataclass(frozen=True)
class Tile:
    """Pictures side by side, uint8 [H, W, 3] each, under a caption.

    `colour`: of the caption and of the frame; `frame`: "solid", "dashed" or none.
    """

    pictures: Sequence[np.ndarray]
    caption: str = ""
    colour: str = "black"
    frame: str = ""


@dataclass(frozen=True)
class Bar:
    """What colours mean: uint8 [W, 3] from left to right, and numbers at places of 0..1."""

    colours: np.ndarray
    ticks: Sequence[tuple[float, str]]
    title: str


def sheet(
    tiles: Sequence[Tile | None],
    columns: int,
    side: int | None = None,
    note: str = "",
    widest: int = CAPTION,
) -> Image.Image:
    """All tiles in rows of `columns`, None a gap; `note` stands below.

    Columns are as wide as the widest tile, or as the longest caption up to `widest` needs; what is
    longer loses its middle, for a path's end tells images apart.

    Args:
        side: pixels of each picture's longer side; None: as they are.
    """
    font = _font()
    shown = {i: [resized(p, side) for p in tile.pictures] for i, tile in enumerate(tiles) if tile}
    width = max(sum(p.width for p in row) + BESIDE * (len(row) - 1) for row in shown.values())
    captions = [printable(tile.caption) if tile else "" for tile in tiles]
    longest = math.ceil(max(map(font.getlength, captions)))
    width = max(width, min(longest, widest))
    heights = [
        max((p.height for i in range(top, top + columns) for p in shown.get(i, ())), default=0)
        + 2 * ROW * any(captions)
        for top in range(0, len(tiles), columns)
    ]
    across = columns * (width + GAP) + GAP
    lines = wrapped(note, lambda line: font.getlength(line) > across - 2 * GAP)
    out = Image.new("RGB", (across, sum(heights) + GAP + len(lines) * ROW), "white")
    pen = ImageDraw.Draw(out)
    for i, row in shown.items():
        tile = tiles[i]
        assert tile is not None
        left, top = GAP + i % columns * (width + GAP), GAP + sum(heights[: i // columns])
        if any(captions):
            caption = _cut(captions[i], lambda text: font.getlength(text) <= width)
            pen.text((left, top), caption, fill=tile.colour, font=font)
            top += ROW
        for picture in row:
            out.paste(picture, (left, top))
            if tile.frame:
                _frame(pen, (left, top, *picture.size), tile.colour, tile.frame == "dashed")
            left += picture.width + BESIDE
    for i, line in enumerate(reversed(lines), 1):
        pen.text((GAP, out.height - i * ROW - GAP // 2), line, fill="#444444", font=font)
    return out


def captioned(
    picture: Image.Image | np.ndarray, lines: Sequence[str], bar: Bar | None = None
) -> Image.Image:
    """A picture above its caption, each line wrapped to the picture's width, and a colour bar."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    font, width = _font(), max(image.width, NARROWEST)

    def fits(text: str) -> bool:
        return font.getlength(text) <= width - 2 * GAP

    told = broken(lines, fits)
    height = image.height + len(told) * ROW + GAP + (3 * ROW + BAR[1] if bar else 0)
    out = Image.new("RGB", (width, height), "white")
    out.paste(image.convert("RGB"), ((width - image.width) // 2, 0))
    pen, top = ImageDraw.Draw(out), image.height + GAP // 2
    for line in told:
        pen.text((GAP, top), line, fill="#222222", font=font)
        top += ROW
    if bar:
        _draw_bar(out, pen, bar, (GAP, top + 4))
    return out


def _draw_bar(
    out: Image.Image, pen: ImageDraw.ImageDraw, bar: Bar, corner: tuple[int, int]
) -> None:
    left, top = corner
    font, (width, height) = _font(), BAR
    pen.text((left, top), bar.title, fill="#222222", font=font)
    top += ROW
    strip = Image.fromarray(bar.colours[None].astype(np.uint8))
    out.paste(strip.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    for at, label in bar.ticks:
        x = left + round(at * (width - 1))
        pen.line((x, top + height, x, top + height + 4), fill="#222222")
        pen.text(
            (x, top + height + 4), label, fill="#222222", font=font, anchor="ma" if at else "la"
        )


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)


def resized(picture: np.ndarray, side: int | None) -> Image.Image:
    """With its longer side at `side` pixels; made larger, it shows its own pixels."""
    height, width = picture.shape[:2]
    scale = 1.0 if side is None else side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(picture).resize(size, method)


def _cut(text: str, fits: Callable[[str], bool]) -> str:
    """The text, without so much of its middle that it fits."""
    kept = len(text)
    cut = text
    while kept > 1 and not fits(cut):
        kept -= 1
        cut = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return cut


def _frame(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str, dashed: bool
) -> None:
    """A frame just inside of (left, top, width, height)."""
    left, top, width, height = box
    step = 2 * DASH if dashed else DASH
    for x in range(left, left + width, step):
        end = min(x + DASH, left + width) - 1
        pen.rectangle((x, top, end, top + FRAME - 1), fill=colour)
        pen.rectangle((x, top + height - FRAME, end, top + height - 1), fill=colour)
    for y in range(top, top + height, step):
        end = min(y + DASH, top + height) - 1
        pen.rectangle((left, y, left + FRAME - 1, end), fill=colour)
        pen.rectangle((left + width - FRAME, y, left + width - 1, end), fill=colour)


def wrapped(words: str, too_long: Callable[[str], bool]) -> list[str]:
    """The words in lines."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and not too_long(longer):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def broken(lines: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Lines that fit: each wrapped, and a word that is too long without its middle."""
    return [
        _cut(short, fits)
        for line in lines
        for short in wrapped(printable(line), lambda text: not fits(text))
    ]


def as_rgb(image: np.ndarray, channels: int = 3, places: Sequence[int] | None = None) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W, 3]: the first three channels, or the first as grey.

    channels: `Bands` of a sensor's images, whose colours and contrast are `bands.picture`'s; places:
    those that somebody chose, one or three.
    """
    if places is not None or isinstance(channels, bands.Bands):
        return bands.picture(image, channels, places)
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def save(picture: Image.Image | np.ndarray, path: Path) -> None:
    """Write a PNG that says it was drawn here; its folder is made.

    Raises:
        RunFailed: it cannot be written.
    """
    with world(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(picture, path)


def encode(picture: Image.Image | np.ndarray, path: Path) -> None:
    """As `save`, but errors and folders are the caller's."""
    header = PngImagePlugin.PngInfo()
    for name, value in DRAWN.items():
        header.add_text(name, value)
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(path, "PNG", pnginfo=header)


def drawn_here(path: Path) -> bool:
    """Whether a file is a picture that was drawn here, by its header."""
    if path.suffix.lower() != ".png" or not path.is_file():
        return False
    with contextlib.suppress(*DAMAGED), Image.open(path, formats=["PNG"]) as image:
        return all(image.info.get(name) == value for name, value in DRAWN.items())
    return False
