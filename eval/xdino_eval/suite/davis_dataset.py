"""DAVIS-2017 on disk: its videos, and masks whoever drew them.

The folder, as DAVIS-2017 (480p, semi-supervised) is distributed:

    FOLDER/ImageSets/2017/val.txt                    names of videos, one a line
    FOLDER/JPEGImages/480p/VIDEO/00000.jpg ...       frames, all of one size; any image format
    FOLDER/Annotations/480p/VIDEO/00000.png ...      masks of the frames' size; the first is needed,
                                                     the others are scored against

Masks are palette or grey images whose value is the label, 0 background and 255 void. Those that were
drawn by other means say their objects as the first of a video does (`Labels`): 255 is an object where
nothing else is drawn, grey levels with gaps between them and colours are numbered. Objects that the
first frame does not show are neither followed nor scored, as in the official measure, and named.

Letters: H x W pixels, C channels.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from xdino.data import image_files
from xdino.data.image_files import DAMAGED
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import written_beside
from xdino_eval.suite.davis_scores import VOID

LATER = 254  # the label of what the first frame of drawn masks does not show
MOST_OBJECTS = 100  # of a video whose masks are drawn; more are smoothed edges


@dataclass(frozen=True)
class Labels:
    """What the pixels of a video's masks mean: values (of colours: `_values`) -> labels. None: a
    value is its label."""

    numbers: dict[int, int] | None = None

    def of(self, values: np.ndarray) -> np.ndarray:
        """int64 [H, W] -> uint8 [H, W]; `LATER` for what the first frame does not show."""
        if self.numbers is None:
            return values.astype(np.uint8)
        codes = np.array(sorted(self.numbers))
        labels = np.array([self.numbers[code] for code in codes.tolist()], np.uint8)
        place = np.searchsorted(codes, values).clip(max=len(codes) - 1)
        return np.where(codes[place] == values, labels[place], LATER).astype(np.uint8)


@dataclass(frozen=True)
class Video:
    """frames: the files in order. masks: one for each frame, or the first frame's alone."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    labels: Labels = field(default_factory=Labels)

    @property
    def scored(self) -> bool:
        return len(self.masks) == len(self.frames) > 2


def open_davis(folder: Path | str, split: str = "val") -> list[Video]:
    """The videos of a split, every file of which is there and of the right size.

    Raises:
        UsageError: something is missing, or a mask or frame is of another size than it should be.
    """
    folder = Path(folder)
    listed = folder / "ImageSets" / "2017" / f"{split}.txt"
    needed = {listed: listed.is_file()}
    for place in ("JPEGImages", "Annotations"):
        needed[folder / place / "480p"] = (folder / place / "480p").is_dir()
    for path, there in needed.items():
        if not there:
            raise UsageError(
                f"{path} is missing: a DAVIS-2017 folder holds ImageSets/2017/{split}.txt, "
                "JPEGImages/480p/VIDEO/*.jpg and Annotations/480p/VIDEO/*.png"
            )
    with asked(f"{listed} cannot be read"):
        # A name in no encoding is a name all the same.
        told = listed.read_text(encoding="utf-8-sig", errors="surrogateescape")
    names = [line.strip() for line in told.splitlines() if line.strip()]
    if not names:
        raise UsageError(f"{listed} names no video")
    return [_open_video(folder, name, listed) for name in names]


def _open_video(folder: Path, name: str, listed: Path) -> Video:
    if Path(name).name != name or name == "..":
        raise UsageError(f'{listed} names "{name}", which is no name of a video')
    place = folder / "JPEGImages" / "480p" / name
    if not place.is_dir():
        raise UsageError(f"there is no folder {place}")
    frames = image_files.listed(place)
    if not frames:
        raise UsageError(f"{place} holds no frame (*.jpg)")
    for one, two in pairwise(sorted(frames, key=lambda path: path.stem)):
        if one.stem == two.stem:
            raise UsageError(f"{one} and {two.name} are two frames of one name")
    masks = _masks(folder / "Annotations" / "480p" / name, frames)
    size = image_files.shown_size(frames[0])
    for path in (*frames, *masks):
        if image_files.shown_size(path) != size:
            found = " x ".join(map(str, image_files.shown_size(path)))
            what = "mask" if path in masks else "frame"
            raise UsageError(
                f"the {what} {path} has {found} pixels, and the first frame of {name} "
                f"{size[0]} x {size[1]}"
            )
    kinds = {path: _kind(path) for path in masks}
    for path, kind in kinds.items():
        if kind != kinds[masks[0]]:
            raise UsageError(
                f"{path} is a {kind} image and the first mask of {name} a {kinds[masks[0]]} image"
            )
    return Video(name, tuple(frames), masks, mask_labels(masks[0]))


def _masks(folder: Path, frames: list[Path]) -> tuple[Path, ...]:
    """The mask of each frame, or of the first alone where one is missing."""
    found = {path.stem: path for path in image_files.listed(folder)} if folder.is_dir() else {}
    masks = {stem: path for stem, path in found.items() if path.suffix.lower() == ".png"}
    if frames[0].stem not in masks:
        first = folder / f"{frames[0].stem}.png"
        raise UsageError(f"{first}, the mask of the first frame of {folder.name}, is missing")
    whole = all(frame.stem in masks for frame in frames)
    return tuple(masks[frame.stem] for frame in (frames if whole else frames[:1]))


KINDS = {
    "P": "palette", "L": "grey", "1": "grey", "LA": "grey", "I": "grey", "I;16": "grey",
    "I;16B": "grey", "RGB": "colour", "RGBA": "colour",
}  # fmt: skip


def _kind(path: Path) -> str:
    """Whether a mask is a palette, grey or colour image, by its header."""
    try:
        with Image.open(path) as image:
            mode = image.mode
    except DAMAGED as error:
        raise UsageError(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    if mode not in KINDS:
        raise UsageError(f"{path} is no mask of labels: its pixels are {mode}")
    return KINDS[mode]


def mask_labels(path: Path) -> Labels:
    """What the pixels of a video's masks mean, by its first.

    Raises:
        UsageError: unreadable, or more grey levels or colours than there are objects.
    """
    objects = np.unique(_values(path, UsageError))
    objects = objects[objects > 0].tolist()
    kind, palette = _kind(path), _pascal_numbers()
    if kind == "colour" and palette.keys() >= set(objects):
        return Labels(palette)  # a palette mask that was saved in its colours
    labels = [value for value in objects if value != VOID]
    # Gaps in a palette mask are as distributed: objects that come later.
    numbered = kind == "palette" or labels == [*range(1, len(labels) + 1)]
    numbered &= objects != [VOID] and max(labels, default=0) <= MOST_OBJECTS
    if kind != "colour" and numbered:
        return Labels()
    if len(objects) > MOST_OBJECTS:
        raise UsageError(
            f"{path} is no mask of labels: it holds {len(objects):,} colours or grey levels, and "
            "each stands for an object; are its edges smoothed?"
        )
    return Labels({0: 0, **{value: label for label, value in enumerate(objects, 1)}})


def _pascal_numbers() -> dict[int, int]:
    red, green, blue = (pascal_palette()[channel::3] for channel in range(3))
    colours = zip(red, green, blue, strict=True)
    return {(r << 16) + (g << 8) + b: label for label, (r, g, b) in enumerate(colours)}


def _values(path: Path, failure: type[UsageError | RunFailed] = RunFailed) -> np.ndarray:
    """int64 [H, W]: palette indices, grey levels, or 65536 red + 256 green + blue."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image).astype(np.int64)
    except DAMAGED as error:
        raise failure(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    if values.ndim == 2:
        return values
    if values.shape[2] == 2:  # grey and transparency
        return values[..., 0]
    return (values[..., 0] << 16) + (values[..., 1] << 8) + values[..., 2]


def read_mask(path: Path, labels: Labels = Labels()) -> np.ndarray:
    """Labels, uint8 [H, W].

    Raises:
        RunFailed: the file is damaged.
    """
    return labels.of(_values(path))


def read_frame(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, C].

    Raises:
        RunFailed: the file is damaged.
    """
    try:
        return image_files.read(path, channels)
    except UsageError as error:
        raise RunFailed(str(error)) from None


def palette_of(path: Path) -> list[int]:
    """The colours of a mask's labels, for masks that are written beside it; PASCAL's if it has none."""
    try:
        with Image.open(path) as image:
            colours = image.getpalette()
    except DAMAGED as error:
        raise RunFailed(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    return colours or pascal_palette()


def pascal_palette() -> list[int]:
    """768 values: label n is coloured by spreading its bits over red, green and blue from the top."""
    bits = [[(label >> place) & 1 for place in range(8)] for label in range(256)]
    return [
        sum(b[3 * level + channel] << (7 - level) for level in range(3) if 3 * level + channel < 8)
        for b in bits
        for channel in range(3)
    ]


def write_mask(path: Path, labels: np.ndarray, palette: list[int]) -> None:
    """uint8 [H, W] as a palette PNG, which is what the official scorer reads."""
    image = Image.fromarray(labels)
    image.putpalette(palette)
    with written_beside(path) as beside:
        image.save(beside, format="PNG")


def highest(mask: np.ndarray) -> int:
    """The highest label of an object in uint8 [H, W]; 0 without any."""
    return int(np.where(mask == VOID, 0, mask).max())
