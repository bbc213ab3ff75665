"""How large an image is shown to a network that is looked at, where nobody says a size.

Scores are taken at the network's own input size; pictures at it are of few patches (14 x 14 of 16
pixels). DINO's pictures of attention are of images at 480 pixels
(https://arxiv.org/abs/2104.14294, figure 1), and so are these: the longer side is at `LONGER`
pixels, or at as many as make `GRID` patches. An image is not blown up for that: more than `ENLARGED`
times its own size there is nothing to see that was not there, and nothing that the network ever saw.
It is never shown smaller than at the network's own input size, and never larger than memory allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from xdino.backbone import Backbone
from xdino.errors import UsageError
from xdino.plan.feasibility import check_memory, free_memory
from xdino_eval.features import device_of

LONGER = 480  # pixels
GRID = 30  # patches along the longer side, at least
ENLARGED = 2.0  # times an image's own size, at most
NUMBERS = 30  # float32 that are alive at once for each channel of a token: measured 20 to 30
SHARE = 0.5  # of the memory that is free


@dataclass(frozen=True)
class Shown:
    """An image as a network sees it: its sides in pixels, its patches, and why it is so large.

    `shorter` is what `network_input` takes.
    """

    shorter: int
    height: int
    width: int
    grid: tuple[int, int]
    why: str

    @property
    def told(self) -> str:
        """ "480 x 320 pixels, 30 x 20 patches"."""
        return f"{self.width} x {self.height} pixels, {self.grid[1]} x {self.grid[0]} patches"


def shown(backbone: Backbone, shape: Sequence[int], size: int | None = None) -> Shown:
    """How an image [H, W, ..] is shown: its shorter side at `size`, or as the module says.

    Raises:
        UsageError: a backbone without patches, or of one size only; a `size` that is less than a
            patch, or that takes more memory than there is.
    """
    height, width = shape[:2]
    if size is not None:
        found = _at(backbone, height, width, size, "as asked for")
        _check_room(backbone, found)
        return found
    own, shorter, longer = backbone.input_size, min(height, width), max(height, width)
    patch = backbone.require_patches()
    wanted = max(LONGER, GRID * patch)
    why = f"the longer side at {wanted}"
    if ENLARGED * longer < wanted:
        wanted, why = round(ENLARGED * longer), f"{ENLARGED:g} times their own size"
    room = _most_pixels(backbone)
    if room is not None and wanted**2 * shorter / longer > room:
        wanted, why = int((room * longer / shorter) ** 0.5), "as large as memory allows"
    side = round(wanted * shorter / longer)
    if side > own:
        return _at(backbone, height, width, side, why)
    return _at(backbone, height, width, own, f"the network's own size, {own}")


def _at(backbone: Backbone, height: int, width: int, shorter: int, why: str) -> Shown:
    longer = int(shorter * max(height, width) / min(height, width))  # as `resize_shorter` rounds
    h, w = (shorter, longer) if height <= width else (longer, shorter)
    if shorter < (patch := backbone.require_patches()):
        raise UsageError(f"size must be at least a patch of {patch} pixels, got {shorter}")
    return Shown(shorter, h, w, backbone.grid(h, w), why)


def _bytes_of_a_pixel(backbone: Backbone) -> float:
    return 4 * NUMBERS * backbone.embed_dim / backbone.require_patches() ** 2


def _most_pixels(backbone: Backbone) -> float | None:
    free = free_memory(device_of(backbone))
    return None if free is None else SHARE * free / _bytes_of_a_pixel(backbone)


def _check_room(backbone: Backbone, found: Shown) -> None:
    needed = round(found.height * found.width * _bytes_of_a_pixel(backbone))
    what = f"images of {found.width} x {found.height} pixels"
    check_memory(what, needed, device_of(backbone), "lower --size")
