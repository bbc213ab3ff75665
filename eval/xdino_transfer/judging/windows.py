"""A large picture whole, or in tiles that overlap where it would take more memory than there is.

XCiT's cost grows with the pixels, not with their square, so that a whole picture is the rule. Where
it has to be cut, neighbours share a quarter of a tile: pixels are taken from the tile in whose middle
they lie, and an object at an edge is whole in the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from xdino.errors import UsageError
from xdino.plan.feasibility import gigabytes
from xdino_transfer.resizing import fitted

STEP = 32  # pixels: sides of tiles are multiples of it
SMALLEST = 128  # pixels of a tile's side, as the network sees it
OVERLAP = 4  # one over the share of a tile that it has in common with the next
Size = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A part of a picture, in its pixels, and the inner part that is taken from it.

    inner: top, left, bottom, right in the picture; the inner parts of all windows tile it.
    edges: top, left, bottom, right: whether the window ends inside of the picture there.
    """

    top: int
    left: int
    height: int
    width: int
    inner: tuple[int, int, int, int]
    edges: tuple[bool, bool, bool, bool] = (False, False, False, False)


@dataclass(frozen=True)
class Cut:
    """What a picture comes to. scale: pixels that the network sees of one pixel of the picture.

    estimate: bytes for the largest window. whole: bytes for all of it at once. bound: bytes that may be
    taken.
    """

    size: Size
    shown: Size
    windows: list[Window]
    estimate: int
    whole: int
    bound: int

    @property
    def told(self) -> str:
        """In half a sentence, for a person."""
        H, W = self.size
        seen = "" if self.shown == self.size else f", seen at {self.shown[1]:,} x {self.shown[0]:,}"
        if len(self.windows) == 1:
            return (
                f"{W:,} x {H:,} pixels whole{seen}: about {gigabytes(self.estimate)} of the "
                f"{gigabytes(self.bound)} that may be taken"
            )
        first = self.windows[0]
        told = (
            f"{W:,} x {H:,} pixels{seen} in {len(self.windows)} tiles of {first.width:,} x "
            f"{first.height:,}, about {gigabytes(self.estimate)} each"
        )
        if self.whole <= self.bound:
            return f"{told}, as asked"
        return (
            f"{told}: whole it would take about {gigabytes(self.whole)}, and "
            f"{gigabytes(self.bound)} may be taken"
        )

    def seen(self, window: Window) -> Size:
        """The size at which the network sees a window."""
        down, across = self.shown[0] / self.size[0], self.shown[1] / self.size[1]
        return max(round(window.height * down), 1), max(round(window.width * across), 1)


def shown_size(size: Size, longer: float, shorter: float, exactly: bool = False) -> Size:
    """The size at which the network sees a picture: its own, and larger where a test shows it larger.

    Args:
        longer, shorter: what a test fits pictures into.
        exactly: as in a test, smaller ones and larger ones.
    """
    tested = fitted(*size, longer, shorter)
    return tested if exactly or min(tested) > min(size) else size


def cut(
    size: Size,
    shown: Size,
    needed: Callable[[Size, Size], int],
    bound: int,
    tile: int | None = None,
) -> Cut:
    """Whole if that takes at most `bound` bytes, else the largest tiles that do.

    Args:
        needed: bytes for a size as the network sees it, and one as the picture has it.
        tile: a side that a person asked for, in pixels that the network sees.

    Raises:
        UsageError: not even the smallest tile fits.
    """
    whole = needed(shown, size)
    if tile is None and whole <= bound:
        return Cut(size, shown, _windows(size, size), whole, whole, bound)

    def part(side: int) -> Size:
        """Of a tile, in the picture's pixels."""
        down, across = (
            min(max(round(side * own / seen), 1), own)
            for own, seen in zip(size, shown, strict=True)
        )
        return down, across

    def takes(side: int) -> int:
        return needed((min(side, shown[0]), min(side, shown[1])), part(side))

    if tile is None:
        low, high = SMALLEST // STEP, max(shown) // STEP + 1
        if takes(SMALLEST) > bound:
            raise UsageError(
                f"a tile of {SMALLEST} x {SMALLEST} pixels takes about {gigabytes(takes(SMALLEST))}, "
                f"and {gigabytes(bound)} may be taken: give more by --memory"
            )
        while high - low > 1:  # low fits, high does not
            middle = (low + high) // 2
            low, high = (middle, high) if takes(middle * STEP) <= bound else (low, middle)
        tile = low * STEP
    return Cut(
        size,
        shown,
        _windows(size, part(tile), STEP if shown == size else 1),
        takes(tile),
        whole,
        bound,
    )


def _windows(size: Size, part: Size, grid: int = 1) -> list[Window]:
    """grid: pixels that windows begin at multiples of, where a network's own grid is one of them."""
    rows, columns = (_spans(side, own, grid) for side, own in zip(size, part, strict=True))
    return [
        Window(
            top,
            left,
            bottom - top,
            right - left,
            (inner_top, inner_left, inner_bottom, inner_right),
            (top > 0, left > 0, bottom < size[0], right < size[1]),
        )
        for top, bottom, inner_top, inner_bottom in rows
        for left, right, inner_left, inner_right in columns
    ]


def _spans(side: int, part: int, grid: int) -> list[tuple[int, int, int, int]]:
    """Begin and end of each tile along one side, and of what is taken from it."""
    if part >= side:
        return [(0, side, 0, side)]
    step = max(part - part // OVERLAP, 1)
    count = -(-(side - part) // step) + 1
    begins = [-(-i * (side - part) // (count - 1)) for i in range(count)]
    begins = [-(-begin // grid) * grid for begin in begins]
    ends = [min(begin + part, side) for begin in begins]
    middles = [(ends[i] + begins[i + 1]) // 2 for i in range(count - 1)]
    return [*zip(begins, ends, [0, *middles], [*middles, side], strict=True)]
