"""Images of more (or fewer, or deeper) bands than a photograph: how many, and how they are read.

Sensors see 4, 8 or 13 bands in 10 to 16 bits or in floats. What a file's numbers mean is nowhere in
it, so it is declared: `data.range`, which values are black and white, and `data.rgb`, which bands are
red, green and blue. Both travel with the weights: what judges them reads images in the same way.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from xdino.errors import UsageError

MOST = 16  # bands of an image
_LEAST = 0.25  # of the brightest: what is darker by less is not stretched to black
_PERCENT = (1.0, 99.0)  # of a picture's levels that become black and white, for the eye alone


class Bands(int):
    """How many bands an image has, and how their values are read.

    Where channels are counted it stands for their number: a plain 1 or 3 is a photograph, read as
    ever; of `Bands` the pixels are numbers of a sensor. 0: as many as the images have.

    Args:
        range: black and white of every band, or of each; () for those of the pixels' type.
        rgb: places of red, green and blue, from 0; () for none. None: 0, 1, 2 of three bands.
    """

    range: tuple[tuple[float, float], ...]
    rgb: tuple[int, ...]
    _declared: bool

    def __new__(
        cls,
        count: int,
        range: Sequence[Sequence[float]] = (),
        rgb: Sequence[int] | None = None,
    ) -> "Bands":
        """Raises UsageError for what no image can have."""
        if not 0 <= count <= MOST:
            raise UsageError(f"images have 1 to {MOST} bands here, got {count}")
        self = super().__new__(cls, count)
        self.range = tuple((float(pair[0]), float(pair[1])) for pair in range)
        if count and len(self.range) not in (0, 1, count):
            raise UsageError(
                f"data.range takes black and white of all bands, or of each: 2 or {2 * count} numbers "
                f"for {count} bands, got {2 * len(self.range)}"
            )
        for low, high in self.range:
            if not low < high:
                raise UsageError(
                    f"data.range needs black below white, got {low:g},{high:g}: nothing lies between"
                )
        self._declared = rgb is not None
        if rgb is None:
            rgb = (0, 1, 2) if count == 3 else ()
        self.rgb = tuple(int(place) for place in rgb)
        if self.rgb and (len(self.rgb) != 3 or len(set(self.rgb)) != 3):
            raise UsageError("data.rgb takes the numbers of the red, the green and the blue band")
        if count and any(not 0 <= place < count for place in self.rgb):
            numbers = ",".join(str(place + 1) for place in self.rgb)
            raise UsageError(
                f"data.rgb counts bands from 1, and the images have {count}: got {numbers}"
            )
        return self

    def __getnewargs__(self) -> Any:
        return int(self), self.range, self.rgb if self._declared else None

    def __str__(self) -> str:
        return int.__repr__(self)

    def __repr__(self) -> str:
        return f"Bands({int(self)}, {self.range}, {self.rgb})"

    def counted(self, count: int) -> "Bands":
        """The same of so many bands."""
        return Bands(count, self.range, self.rgb if self._declared else None)

    def of_each(self) -> tuple[tuple[float, float], ...] | None:
        """Black and white, a pair a band; None where the pixels' type says."""
        return self.range * int(self) if len(self.range) == 1 else self.range or None

    def key(self) -> str:
        """What tells one reading of the same files from another."""
        return f"{int(self)} {self.range} {self.rgb}"

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Bands | None":
        """Those of a spec that `told` wrote; None where it is of photographs."""
        own = tree.get("bands")
        return None if own is None else cls(tree["in_chans"], own["range"], own["rgb"])


def told(tree: dict[str, Any]) -> dict[str, Any]:
    """A spec's fields as files keep them, plain; nothing of bands where it is of photographs."""
    plain = {name: value for name, value in tree.items() if name != "bands"}
    bands: Bands | None = tree["bands"]
    if bands is None:
        return plain
    own = {"range": [list(pair) for pair in bands.range], "rgb": list(bands.rgb)}
    return {**plain, "in_chans": int(bands), "bands": own}


def channels_of(count: int, bands: Bands | None) -> int:
    """A network's channels as sources take them: plain 1 and 3 are photographs'."""
    return (
        bands if bands is not None else count if count in (1, 3) or count > MOST else Bands(count)
    )


def asked_bands(
    count: int | None, range: Sequence[float] | None, rgb: Sequence[int] | None
) -> int | None:
    """`model.in_chans`, `data.range` and `data.rgb` as what sources take.

    Plain 1, 3 or None where nothing but photographs was asked for.

    Raises:
        UsageError: values that no image can have.
    """
    if range is None and rgb is None and count in (None, 1, 3):
        return count
    numbers = list(range or ())
    if range is not None and (not numbers or len(numbers) % 2):
        raise UsageError(
            "data.range takes black and white, 0,4095 say, of all bands or of one after the other; "
            f"got {','.join(f'{number:g}' for number in numbers) or 'nothing'}"
        )
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    if rgb is not None and any(number < 1 for number in rgb):
        raise UsageError("data.rgb counts bands from 1")
    places = None if rgb is None else [number - 1 for number in rgb]
    return Bands(count or 0, pairs, places)


#: What a run on images of bands works out where nobody says, and writes into its configuration.
WORKED_OUT = {
    "model": ("in_chans",),
    "data": ("range", "rgb"),
    "crops": ("mean", "std"),
    "view": ("mean", "std"),
}


def completed(config: Any, before: Any) -> Any:
    """A configuration with what `before`, of a run on bands, worked out and this one leaves open."""
    if before.data.rgb is None:  # of photographs, where nothing is
        return config
    changed = {}
    for section, keys in WORKED_OUT.items():
        if own := getattr(config, section, None):
            left = {
                key: getattr(getattr(before, section), key)
                for key in keys
                if getattr(own, key) is None
            }
            changed[section] = dataclasses.replace(own, **left)
    return dataclasses.replace(config, **changed)


def worked_out(
    config: Any, bands: Bands, mean: Sequence[float], std: Sequence[float], views: str = "crops"
) -> Any:
    """A configuration that says all of `bands` and of its statistics; views: the section of these."""
    given: dict[str, dict[str, Any]] = {
        "model": {"in_chans": int(bands)},
        "data": {"rgb": tuple(place + 1 for place in bands.rgb)},
        views: {"mean": tuple(mean), "std": tuple(std)},
    }
    changed = {s: dataclasses.replace(getattr(config, s), **keys) for s, keys in given.items()}
    return dataclasses.replace(config, **changed)


def chosen_places(numbers: Sequence[int], channels: int) -> tuple[int, ...]:
    """Numbers of bands from 1, one (grey) or three, as places.

    Raises:
        UsageError: others, or bands that the images have not.
    """
    if len(numbers) not in (1, 3):
        raise UsageError(f"--bands takes one band or three, 3,2,1 say; got {len(numbers)}")
    for number in numbers:
        if not 1 <= number <= channels:
            raise UsageError(
                f"--bands counts from 1, and the images have {int(channels)}: got {number}"
            )
    return tuple(number - 1 for number in numbers)


def shown_places(channels: int) -> tuple[int, ...]:
    """What a picture is drawn in: the declared colours, else the first three, or the first as grey."""
    declared = channels.rgb if isinstance(channels, Bands) else ()
    return declared or ((0, 1, 2) if channels >= 3 else (0,))


def picture(
    image: np.ndarray, channels: int, places: Sequence[int] | None = None, stretched: bool = True
) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W, 3], for the eye.

    Of photographs the three channels, or the one as grey. Of `Bands` the declared colours, else the
    first three, or one as grey, stretched from the 1st to the 99th hundredth of its levels: a sensor's
    range is wider than a scene. places: others, as of `chosen_places`.
    """
    count = image.shape[-1]
    sensor = isinstance(channels, Bands)
    chosen = tuple(places or shown_places(channels if sensor else count))
    if len(chosen) == 1:
        chosen *= 3
    out = image if count == 3 and chosen == (0, 1, 2) else image[..., list(chosen)]
    if not (sensor and stretched) or not out.size:
        return out
    some = out[:: max(1, len(out) // 256), :: max(1, out.shape[1] // 256)]
    low, high = np.percentile(some, _PERCENT)
    span = max(high - low, _LEAST * high, 1.0)
    levels = (out.astype(np.float32) - max(0, high - span)) * (255 / span)
    return np.asarray(np.clip(levels, 0, 255), np.uint8)
