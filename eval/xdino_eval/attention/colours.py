"""The colours of attention: what is even is grey, and only what is more than that has a colour.

A map is compared with the one that says nothing, where each patch has the same weight, its share of
the whole (1 / N). Up to that share colours are greys; above, they run from violet to bright yellow at
the scale's end. One scale holds for all heads and images of a picture, or of a command: so weights
that know nothing do not glow, however little their maps vary, and a head that attends to everything
looks like it.

Letters: H x W pixels, h x w patches.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xdino_eval.sheets import matplotlib

LEAST_TOP = 4.0  # times the even share, at the bright end of the colours at least
STOPS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # ends of scales, round numbers
LEVELS = 512
EVEN = 0.25  # of the colours are greys, below the even share


def _colours() -> "matplotlib.colors.LinearSegmentedColormap":
    greys = [(EVEN * i / 8, (0.42 * i / 8,) * 3) for i in range(9)]
    bright = matplotlib.colormaps["inferno"]
    warm = [(EVEN + (1 - EVEN) * (i / 16), bright(0.35 + 0.62 * i / 16)[:3]) for i in range(2, 17)]
    return matplotlib.colors.LinearSegmentedColormap.from_list(
        "attention", [*greys, *warm], N=LEVELS
    )


COLOURS = _colours()
TABLE = np.rint(COLOURS(np.arange(LEVELS))[:, :3] * 255).astype(np.uint8)


@dataclass(frozen=True)
class Scale:
    """Colours from 0 to `top` times the even share."""

    top: float = LEAST_TOP

    @classmethod
    def of(cls, maps: Iterable[np.ndarray]) -> "Scale":
        """For all of these maps, float [h, w]: up to the 99th percentile of all, a round number.

        One patch must not blacken the rest, so a hundredth is cut off.
        """
        every = [times_even(one).ravel() for one in maps]
        if not every:
            return cls()
        need = float(np.quantile(np.concatenate(every), 0.99))
        return cls(float(next((stop for stop in STOPS if stop >= need), STOPS[-1])))

    def level(self, ratio: np.ndarray) -> np.ndarray:
        """Multiples of the even share -> where their colour is, 0..1: EVEN for the even share."""
        below = EVEN * ratio
        above = EVEN + (1 - EVEN) * (ratio - 1) / (self.top - 1)
        return np.clip(np.where(ratio <= 1, below, above), 0, 1)

    def more(self, ratio: np.ndarray) -> np.ndarray:
        """How far above the even share, 0..1 at the end of the scale."""
        return np.clip((ratio - 1) / (self.top - 1), 0, 1)


def times_even(attention: np.ndarray) -> np.ndarray:
    """float [.., h, w] in multiples of the map's mean, the even share of each patch; 0 for no map."""
    mean = attention.mean((-2, -1), keepdims=True)
    return np.divide(attention, mean, out=np.zeros_like(attention), where=mean > 0)


def colour(ratio: np.ndarray, scale: Scale) -> np.ndarray:
    """Multiples of the even share, float [H, W] -> uint8 [H, W, 3]."""
    return TABLE[np.rint(scale.level(ratio) * (LEVELS - 1)).astype(np.int16)]


def overlay(photograph: np.ndarray, ratio: np.ndarray, scale: Scale) -> np.ndarray:
    """uint8 [H, W, 3] and float [H, W] -> uint8 [H, W, 3]: colour where attention is above even.

    Elsewhere the photograph stays, in grey, and darker where there is less attention.
    """
    opacity = (0.85 * scale.more(ratio) ** 0.5)[..., None].astype(np.float32)
    grey = photograph.mean(2, keepdims=True, dtype=np.float32)
    grey = grey * (0.35 + 0.45 * np.clip(ratio, 0, 1)[..., None].astype(np.float32))
    return np.rint(grey * (1 - opacity) + colour(ratio, scale) * opacity).astype(np.uint8)
