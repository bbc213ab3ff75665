"""Pictures with a class for every pixel, in the layouts that data sets come in.

- ADE20K: ADEChallengeData2016/{images,annotations}/{training,validation} and objectInfo150.txt; label
  0 is "other" and counts as void, 1 to 150 become 0 to 149.
- Pascal VOC: JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt; 0 is background,
  255 void.
- Any other: images/{train,val} and masks/{train,val}, flat or with folders below, equal names but for
  the suffix, and classes.txt with a name a line; 255 is void, and 0 too if wanted.

A mask is a picture of one number a pixel: gray, or a palette's indices, of the size of its picture.

Letters: N pictures, K classes, H x W pixels.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from xdino.config import MAX_PIXELS
from xdino.data.decode import decode
from xdino.data.image_files import DAMAGED, why
from xdino.data.listing import left_out_sentence, of_arrays, printable, scan
from xdino.errors import UsageError, asked
from xdino_transfer.segmentation.confusion import zero_is_void
from xdino_transfer.segmentation.losses import VOID

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
ADE = "ADEChallengeData2016"
TEST = "test"
MISSING_SHARE = 0.05  # of the pictures that may lack a file
_ONE_NUMBER = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes


@dataclass(frozen=True)
class Maps:
    """N pictures and their masks.

    masks: none where a test split has none. zero_is_void: labels begin at 1, and 0 is none.
    channels: of the pictures, 1 for grey, or `Bands`. max_pixels: of a picture; a larger one cannot be
    read.
    """

    where: str
    classes: tuple[str, ...]
    images: list[Path]
    masks: list[Path]
    zero_is_void: bool = False
    notices: list[str] = field(default_factory=list)
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        return printable(bytes(self.images[index]))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A picture uint8 [H, W, channels] and its labels uint8 [H, W], VOID where there is none.

        Raises:
            UnreadableImage, OSError: the picture cannot be read.
            UsageError: its mask cannot, is of another size, or has labels that are no classes.
        """
        image = self.picture(index)
        return image, self.labels(index, image.shape[:2])

    def picture(self, index: int) -> np.ndarray:
        """The picture alone. Raises as `read`."""
        return decode(self.images[index].read_bytes(), self.channels, self.max_pixels)

    def labels(self, index: int, size: Sequence[int]) -> np.ndarray:
        """The labels alone, of a picture of this size (H, W). Raises as `read`."""
        path = self.masks[index]
        labels = read_mask(path)
        if labels.shape != tuple(size):
            raise UsageError(
                f"{path} has {labels.shape[1]} x {labels.shape[0]} pixels, and its picture "
                f"{size[1]} x {size[0]} (upright)"
            )
        return self._checked(labels, path)

    def _checked(self, labels: np.ndarray, path: Path) -> np.ndarray:
        K = len(self.classes)
        first = 1 if self.zero_is_void else 0
        void = (labels == VOID) | (labels == 0) if self.zero_is_void else labels == VOID
        outside = labels[~void & ((labels >= K + first) | (labels < first))]
        if len(outside):
            raise UsageError(
                f"{path} has label {outside[0]}, and the classes of {self.where} are {first} to "
                f"{K - 1 + first}, with {VOID} for none"
            )
        labels = labels.astype(np.uint8)
        return zero_is_void(labels) if self.zero_is_void else labels


def read_mask(path: Path) -> np.ndarray:
    """[H, W] of whole numbers: gray values, or a palette's indices (not its colours).

    Raises:
        UsageError: no picture, or one of colours.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _ONE_NUMBER:
                raise UsageError(
                    f"{path} is a picture of colours ({image.mode}): a mask has one number a pixel, "
                    "gray or by a palette"
                )
            if image.format == "JPEG":
                raise UsageError(f"{path} is a JPEG, which changes labels: masks are PNG files")
            labels = np.asarray(image)
            return labels.astype(np.uint8) if image.mode == "1" else labels
    except UsageError:
        raise
    except DAMAGED as error:
        raise UsageError(f"{path} cannot be read as a mask: {why(error)}") from None


# Layouts

_ADE, _VOC = "ADE20K's images/ and annotations/", "VOC's JPEGImages/ and SegmentationClass/"
_PLAIN = "images/ and masks/"


def open_maps(
    data: str, zero_is_void: bool = False, missing_share: float = MISSING_SHARE
) -> tuple[Maps, Maps]:
    """Train and val of a folder in one of the layouts above.

    Raises:
        UsageError: none of them, or more than one; files that are not there; no names of classes.
    """
    with asked(f"{data} cannot be read"):
        kind, root = _layout(data)
        if kind == _VOC:
            train, val = (_voc_split(root, split, missing_share) for split in ("train", "val"))
        elif kind == _ADE:
            train, val = (
                _ade_split(root, part, missing_share) for part in ("training", "validation")
            )
        else:
            train, val = (
                _plain_split(root, part, zero_is_void, missing_share) for part in ("train", "val")
            )
    return train, val


def open_test(data: str, zero_is_void: bool = False, missing_share: float = MISSING_SHARE) -> Maps:
    """The test split of such a folder, whose masks need not be there.

    ADE20K's images/testing, or release_test/testing in or beside it, as it is unpacked; VOC's
    ImageSets/Segmentation/test.txt; images/test, with masks/test or without.

    Raises:
        UsageError: as `open_maps`; there is no such split.
    """
    with asked(f"{data} cannot be read"):
        kind, root = _layout(data)
        if kind == _VOC:
            return _voc_split(root, "test", missing_share)
        if kind == _PLAIN:
            return _plain_split(root, "test", zero_is_void, missing_share)
        places = [root / "images" / "testing"]
        places += [place / "release_test" / "testing" for place in (root, root.parent)]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise UsageError(
                f"the test pictures of {root} are expected in {places[0]} or {places[-1]}, and there "
                "is no such folder"
            )
        pairs, notices = _alone(found)
        names = _ade_names(root)
        return _split(f"testing of {root}", names, pairs, True, missing_share, TEST, notices)


def _layout(data: str) -> tuple[str, Path]:
    """Which of the layouts above a folder has, and where that begins."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to read pictures and masks from")
    plain = folder if (folder / "masks").is_dir() and (folder / "images").is_dir() else None
    found = [
        (name, there)
        for name, there in ((_ADE, _ade(folder)), (_VOC, _voc(folder)), (_PLAIN, plain))
        if there is not None
    ]
    if not found:
        raise UsageError(
            f"{folder} holds no pictures with masks: expected images/ and masks/ with train/ and "
            f"val/ in both, {ADE}, or VOC's JPEGImages/ and SegmentationClass/"
        )
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise UsageError(f"{folder} mixes layouts, so that it is unclear what to read: {names}")
    return found[0]


def _ade(folder: Path) -> Path | None:
    places = (folder, folder / ADE)
    parts = ("images", "annotations")
    there = (p for p in places if all((p / part / "training").is_dir() for part in parts))
    return next(there, None)


def _ade_names(folder: Path) -> list[str]:
    info = folder / "objectInfo150.txt"
    with asked(f"{info} cannot be read"):
        lines = info.read_text("utf-8", "replace").splitlines()
    names = [line.split("\t")[-1].strip() for line in lines[1:] if line.strip()]
    if len(names) < 2:
        raise UsageError(f"{info} names {len(names)} classes")
    return names


def _ade_split(folder: Path, part: str, missing_share: float) -> Maps:
    names = _ade_names(folder)
    pairs, notices = _pairs(folder / "images" / part, folder / "annotations" / part)
    return _maps(f"{part} of {folder}", names, pairs, True, missing_share, notices)


def _voc(folder: Path) -> Path | None:
    places = [folder, *sorted(folder.glob("VOC20*")), *sorted(folder.glob("VOCdevkit/VOC20*"))]
    parts = ("JPEGImages", "SegmentationClass")
    found = [place for place in places if all((place / part).is_dir() for part in parts)]
    if len(found) > 1:
        raise UsageError(f"{folder} holds several years of VOC: name one of {found[0]}, {found[1]}")
    return found[0] if found else None


def _voc_split(folder: Path, split: str, missing_share: float) -> Maps:
    path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    with asked(f"{path} cannot be read"):
        stems = path.read_text("utf-8", "replace").split()
    pairs = [
        (folder / "JPEGImages" / f"{stem}.jpg", folder / "SegmentationClass" / f"{stem}.png")
        for stem in stems
    ]
    return _split(f"{split} of {folder}", VOC_CLASSES, pairs, False, missing_share, split)


def _plain_split(folder: Path, part: str, zero: bool, missing_share: float) -> Maps:
    named = folder / "classes.txt"
    with asked(f"{named} cannot be read"):
        names = [line.strip() for line in named.read_text("utf-8-sig", "replace").splitlines()]
    names = [name for name in names if name]
    if not 2 <= len(names) <= VOID:
        raise UsageError(f"{named} names {len(names)} classes, and 2 to {VOID} can be told apart")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{named} names {printable(os.fsencode(twice[0]))} more than once")
    images, masks = folder / "images" / part, folder / "masks" / part
    alone = part == TEST and images.is_dir() and not masks.is_dir()
    pairs, notices = _alone(images) if alone else _pairs(images, masks)
    return _split(f"{part} of {folder}", names, pairs, zero, missing_share, part, notices)


def _alone(images: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """As `_pairs`, of pictures that have no masks: each stands in for its own."""
    left_out: dict[str, int] = {}
    found = sorted(_pictures(images, left_out))
    where = printable(bytes(images))
    told = [left_out_sentence(where, left_out)] if left_out else []
    return [(images / path, images / path) for path in found], told


def _split(
    where: str,
    names: Sequence[str],
    pairs: list[tuple[Path, Path]],
    zero: bool,
    missing_share: float,
    part: str,
    notices: Sequence[str] = (),
) -> Maps:
    """`_maps`; of a test split without any mask the pictures alone."""
    unmasked = all(mask == image or not mask.is_file() for image, mask in pairs)
    if part == TEST and unmasked:
        alone = [(image, image) for image, _ in pairs]
        return replace(_maps(where, names, alone, zero, missing_share, notices), masks=[])
    return _maps(where, names, pairs, zero, missing_share, notices)


def _pairs(images: Path, masks: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Each picture with the mask of its name, which may not be there; what was no picture.

    Folders below are looked into: a mask lies below `masks` where its picture lies below `images`.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}")
    left_out: dict[str, int] = {}
    there = {path.with_suffix(""): path for path in _below(masks, {})}
    pictures = sorted(_pictures(images, left_out))
    seen: set[Path] = set()
    for path in pictures:
        if path.with_suffix("") in seen:
            raise UsageError(
                f"{images} has several pictures called {printable(bytes(path.with_suffix('')))}"
            )
        seen.add(path.with_suffix(""))
    pairs = [
        (images / path, masks / there.get(path.with_suffix(""), path.with_suffix(".png")))
        for path in pictures
    ]
    where = printable(bytes(images))
    return pairs, [left_out_sentence(where, left_out)] if left_out else []


def _pictures(folder: Path, left_out: dict[str, int]) -> list[Path]:
    """As `_below`; arrays (.npy) where there are no image files."""
    if found := _below(folder, left_out):
        return found
    left_out.clear()
    with of_arrays():
        return _below(folder, left_out)


def _below(folder: Path, left_out: dict[str, int]) -> list[Path]:
    """Image files below a folder, by their paths from it."""
    return [Path(os.fsdecode(name)) for name, _, _ in scan(os.fsencode(folder), left_out)]


def _maps(
    where: str,
    names: Sequence[str],
    pairs: list[tuple[Path, Path]],
    zero: bool,
    missing_share: float,
    notices: Sequence[str] = (),
) -> Maps:
    if not pairs:
        raise UsageError(f"{where} holds no picture")
    missing = [next(p for p in pair if not p.is_file()) for pair in pairs if not _there(pair)]
    kept = [pair for pair in pairs if _there(pair)]
    notices = [*notices]
    if missing:
        told = ", ".join(printable(bytes(path)) for path in missing[:3])
        told += ", ..." if len(missing) > 3 else ""
        sentence = f"{len(missing):,} of the {len(pairs):,} pictures of {where} lack a file: {told}"
        if len(missing) > missing_share * len(pairs):
            raise UsageError(sentence)
        notices.append(f"{sentence}; they are left out")
    images, masks = ([pair[i] for pair in kept] for i in (0, 1))
    return Maps(where, tuple(names), images, masks, zero, notices)


def _there(pair: tuple[Path, Path]) -> bool:
    return all(path.is_file() for path in pair)
