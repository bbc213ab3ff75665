"""RandAugment (Cubuk et al., 2020, arXiv 1909.13719) as the published recipe has it.

"rand-m9-mstd0.5-inc1" in timm's spelling: two of fifteen operations with replacement, each carried
out with probability 1/2 at a magnitude drawn from N(9, 0.5) and clipped to 0..10. The operations on
pixels are timm's; the draws are ours, for timm's come from the process' global generator.

Posterize at magnitude 10 keeps no bit. Pillow made that black when the recipe was published and
refuses it today; here it is black.

Letters: B images, L layers, H x W pixels, C channels.
"""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.special import ndtri
from timm.data.auto_augment import NAME_TO_OP

from xdino.errors import UsageError
from xdino.runtime.rng import Stream
from xdino_transfer.draws import counters, uniforms

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing",
    "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
LARGEST = 10.0  # of magnitudes
# Arguments at the largest magnitude, to either side: degrees, slopes, parts of the side.
_SIGNED = {
    "Rotate": 30.0,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateXRel": 0.45,
    "TranslateYRel": 0.45,
}

#: What is drawn for one layer of one image.
TABLE_DTYPE = np.dtype(
    [
        ("operation", np.int8),  # index into OPERATIONS
        ("applied", np.bool_),
        ("magnitude", np.float64),  # 0..10
        ("sign", np.int8),  # -1 or 1, of operations that have two directions
    ]
)


def argument(name: str, magnitude: float, sign: int = 1) -> tuple[float, ...]:
    """What the operation `name` is called with at a magnitude from 0 to 10: one number, or none."""
    level = magnitude / LARGEST
    if name in _SIGNED:
        return (sign * (level * _SIGNED[name]),)
    if name == "PosterizeIncreasing":
        return (4 - int(level * 4),)
    if name == "SolarizeIncreasing":
        return (256 - min(256, int(level * 256)),)
    if name == "SolarizeAdd":
        return (min(128, int(level * 110)),)
    if name.endswith("Increasing"):  # a factor: 1 changes nothing
        return (1.0 + sign * (level * 0.9),)
    return ()


@dataclass(frozen=True)
class RandAugment:
    """The distribution; the defaults are the published ones.

    fill: what comes in from outside the picture, one value a channel in 0..255: the mean colour.
    rgb: places of red, green and blue among the bands of a sensor; None: of three channels 0, 1, 2.
    """

    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    probability: float = 0.5
    fill: tuple[int, ...] = (124, 116, 104)
    rgb: tuple[int, ...] | None = None

    @classmethod
    def parse(
        cls, text: str, mean: tuple[float, ...], rgb: tuple[int, ...] | None = None
    ) -> "RandAugment":
        """From timm's spelling, "rand-m9-mstd0.5-inc1"; `mean` has one entry a channel, in 0..1.

        Raises:
            UsageError: another spelling, or a variant without "increasing" operations.
        """
        match = re.fullmatch(
            r"rand-m(?P<m>\d+(?:\.\d+)?)(?:-n(?P<n>\d+))?(?:-mstd(?P<s>\d+(?:\.\d+)?))?-inc1", text
        )
        if match is None or float(match["m"]) > LARGEST:
            raise UsageError(
                f'randaugment must be spelt "rand-m9-mstd0.5-inc1" (magnitude up to 10; also '
                f'"-n3" for three operations after the magnitude), or null for none, got "{text}"'
            )
        return cls(
            magnitude=float(match["m"]),
            std=float(match["s"] or 0),
            layers=int(match["n"] or 2),
            fill=tuple(min(255, round(255 * value)) for value in mean),
            rgb=rgb,
        )

    def draw(
        self, seed: int, epoch: int, indices: np.ndarray, repeats: np.ndarray | int = 0
    ) -> np.ndarray:
        """What happens to images `indices` [B] in an epoch: a structured array [B, L]."""
        places = counters(epoch, indices, repeats)
        uniform = uniforms(seed, Stream.RANDAUGMENT, places, 4 * self.layers)
        uniform = uniform.reshape(len(places), self.layers, 4)
        table = np.empty(uniform.shape[:2], TABLE_DTYPE)
        table["operation"] = uniform[..., 0] * len(OPERATIONS)
        table["applied"] = uniform[..., 1] < self.probability
        table["magnitude"] = (self.magnitude + self.std * ndtri(uniform[..., 2])).clip(0, LARGEST)
        table["sign"] = np.where(uniform[..., 3] < 0.5, -1, 1)
        return table

    def apply(self, image: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> the same, by a row `layers` [L] of what `draw` gives.

        Of a sensor's bands red, green and blue are one picture, every other band a grey one of its own.
        """
        chosen = layers[layers["applied"]]
        if not len(chosen):
            return image
        count = image.shape[2]
        if count == 1 or (count == 3 and self.rgb in (None, (0, 1, 2))):
            return self._apply(image, chosen, self.fill)
        out, rgb = np.empty_like(image), self.rgb or ()
        for places in [rgb, *((band,) for band in range(count) if band not in rgb)]:
            if places:
                fill = tuple(self.fill[place] for place in places)
                out[..., places] = self._apply(image[..., places], chosen, fill)
        return out

    def _apply(self, image: np.ndarray, chosen: np.ndarray, fill: tuple[int, ...]) -> np.ndarray:
        """uint8 [H, W, 1 or 3] -> the same."""
        picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
        for layer in chosen:
            name, magnitude = OPERATIONS[layer["operation"]], float(layer["magnitude"])
            picture = operate(name, picture, magnitude, int(layer["sign"]), fill)
        return np.asarray(picture).reshape(image.shape)


def operate(
    name: str, picture: Image.Image, magnitude: float, sign: int, fill: tuple[int, ...]
) -> Image.Image:
    """One operation on an RGB or L picture, bicubic where pixels move. See `argument`, `RandAugment`."""
    arguments = argument(name, magnitude, sign)
    if name == "PosterizeIncreasing" and arguments == (0,):
        return Image.new(picture.mode, picture.size)
    colour = fill if picture.mode == "RGB" else fill[0]
    bicubic = Image.Resampling.BICUBIC
    return NAME_TO_OP[name](picture, *arguments, fillcolor=colour, resample=bicubic)
