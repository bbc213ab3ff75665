"""The colour of a class, in every picture the same."""

import colorsys

import numpy as np

_GOLDEN = 0.61803398875  # of a circle of hues from one class to the next: neighbours differ


def colour(number: int) -> tuple[int, int, int]:
    """Of a class, or of an object: always the same, told apart from its neighbours."""
    hue = (0.02 + number * _GOLDEN) % 1
    saturation, value = (0.85, 0.95) if number // 8 % 2 == 0 else (0.55, 0.75)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


#: Of the classes 0 to 255, uint8 [256, 3].
COLOURS = np.array([colour(number) for number in range(256)], np.uint8)
