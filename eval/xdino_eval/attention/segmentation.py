"""How well attention finds objects: the Jaccard index of its masks with those drawn by people.

The published measure (DINO, https://arxiv.org/abs/2104.14294, section 4.2.2 and figure 4, on
PASCAL VOC12): each head's map, thresholded to 60 % of its mass, is compared with the foreground,
and the head that fits an image best counts for it. Choosing a head by the answer flatters; so the
heads' mean, the mean map, every head alone and chance stand beside it.

Folder layout, checked before anything is computed:

    FOLDER/images/NAME.jpg      any image format
    FOLDER/masks/NAME.png       the same stem and the same size in pixels

In a palette PNG (PASCAL VOC's own) 0 is background, 255 the void border, which is left out of every
count, and anything else object. In other files whatever is not 0 is object; where 255 stands beside
other classes in a grey file, `ignore` has to say whether it is void (255) or object ("none").

Letters: H x W pixels, J images with an object.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from xdino.backbone import Backbone
from xdino.data import image_files
from xdino.data.image_files import DAMAGED, Unreadable, printable
from xdino.errors import UsageError
from xdino.runtime.atomic import write_text
from xdino_eval.attention import captions
from xdino_eval.attention.maps import MASS, class_attention_maps, mask
from xdino_eval.attention.sizes import Shown, shown
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform

PROTOCOL = "segmentation by attention"
VOID = 255


@dataclass(frozen=True)
class Pair:
    """An image file and the file of its mask."""

    name: str
    image: Path
    mask: Path


def find_pairs(folder: Path | str) -> list[Pair]:
    """The images of a folder with their masks, by name; every mask's size is that of its image.

    Files that cannot be read are left for `score` to name.

    Raises:
        UsageError: a folder is missing or empty, an image has no mask or a mask no image, two
            files share a stem, or a mask has another size than its image.
    """
    folder = Path(folder)
    images, masks = (_stems(folder, name) for name in ("images", "masks"))
    for have, want, what in ((images, masks, "mask"), (masks, images, "image")):
        lacking = sorted(have.keys() - want.keys())
        if lacking:
            rest = f" and {len(lacking) - 3:,} more" if len(lacking) > 3 else ""
            raise UsageError(
                f"{folder}/{what}s has no {what} for {', '.join(lacking[:3])}{rest}: "
                "an image and its mask have the same name before the suffix"
            )
    pairs = [Pair(stem, images[stem], masks[stem]) for stem in sorted(images)]
    for pair in pairs:
        try:
            first, second = (image_files.shown_size(path) for path in (pair.image, pair.mask))
        except Unreadable:
            continue
        if first != second:
            raise UsageError(
                f"{pair.mask} has {second[0]} x {second[1]} pixels and its image "
                f"{first[0]} x {first[1]}: a mask must be as large as its image"
            )
    return pairs


def _stems(folder: Path, name: str) -> dict[str, Path]:
    place = folder / name
    if not place.is_dir():
        raise UsageError(
            f"{folder} must hold the folders images and masks, with the same names in both; "
            f"it has no {name}"
        )
    found: dict[str, Path] = {}
    for path in image_files.listed(place):
        if path.stem in found:
            raise UsageError(f"{path} and {found[path.stem].name} have the same stem")
        found[path.stem] = path
    if not found:
        raise UsageError(f"{place} holds no image")
    return found


def read_mask(path: Path, ignore: int | str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(object, counted), both bool [H, W], of a mask file; the module's docstring says how.

    Args:
        ignore: a value that is left out, "none", or None = 255 in palette files alone.

    Raises:
        Unreadable: no mask can be read. UsageError: a grey file whose 255 may be either.
    """
    try:
        with Image.open(path) as image:
            palette = image.mode == "P"
            values = np.asarray(ImageOps.exif_transpose(image))
    except DAMAGED as error:
        raise Unreadable(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    if values.ndim == 3:  # colours, their transparency left out; grey with transparency
        values = values[..., : 1 if values.shape[2] == 2 else 3].max(2)
    if ignore is None:
        if palette:
            ignore = VOID
        elif (values == VOID).any() and ((values > 0) & (values < VOID)).any():
            raise UsageError(
                f"{path} holds 255 beside other values: say --ignore 255 if that is the void of "
                "PASCAL VOC, --ignore none if it is object too"
            )
    counted = np.ones(values.shape, bool) if ignore in (None, "none") else values != ignore
    return (values != 0) & counted, counted


def jaccard(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray | None = None) -> float:
    """|A and B| / |A or B| of two bool [H, W], over the pixels in `counted`; 0..1.

    Raises:
        ValueError: both are empty, where it is not defined.
    """
    if counted is not None:
        predicted, truth = predicted & counted, truth & counted
    union = int((predicted | truth).sum())
    if not union:
        raise ValueError("two empty masks have no Jaccard index")
    return int((predicted & truth).sum()) / union


def chance(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> float:
    """The Jaccard index of as many pixels as `predicted` has, laid anywhere: expected counts."""
    total = int(counted.sum())
    a, b = int((predicted & counted).sum()), int((truth & counted).sum())
    both = a * b / total
    return both / (a + b - both)


@dataclass(frozen=True)
class Scores:
    """Jaccard indices of one layer, 0..1. heads: [J, heads]; mean_map and chance: [J]."""

    layer: str
    names: list[str]
    heads: np.ndarray
    mean_map: np.ndarray
    chance: np.ndarray

    def summary(self) -> dict[str, float]:
        """Means over the images, in per cent, the published figure first.

        best head: of each image the head that fits it best. mean head: over heads. one head: the
        head that is best over all images. mean map: one mask, of the heads' mean. chance: as many
        pixels as that mask has, laid anywhere.
        """
        per_head = self.heads.mean(0)
        figures = {
            "jaccard best head": float(self.heads.max(1).mean()),
            "jaccard mean head": float(self.heads.mean()),
            "jaccard one head": float(per_head.max()),
            "jaccard mean map": float(self.mean_map.mean()),
            "jaccard chance": float(self.chance.mean()),
        }
        figures |= {f"jaccard head {i}": float(value) for i, value in enumerate(per_head, 1)}
        return {name: 100 * value for name, value in figures.items()}


def score(
    backbone: Backbone,
    pairs: Sequence[Pair],
    mass: float = MASS,
    size: int | None = None,
    layers: Sequence[int] | None = None,
    ignore: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    seen: list[Shown] | None = None,
) -> tuple[list[Scores], list[str], list[str]]:
    """The Jaccard indices of every layer and head, and what was left out: the names of masks
    without an object, and a sentence for each image or mask that cannot be read.

    Args: as for `attention.class_attention_maps` and `read_mask`, but
        size: None = of each image what `sizes.shown` chooses.
        seen: how large each image was shown is added here.

    Raises:
        UsageError: as those; no mask with an object, or none that can be read.
    """
    found: dict[str, list[tuple[list[float], float, float]]] = {}
    names: list[str] = []
    empty: list[str] = []
    damaged: list[str] = []
    for done, pair in enumerate(pairs, 1):
        try:
            image = image_files.read(pair.image, backbone.in_chans)
            truth, counted = read_mask(pair.mask, ignore)
        except Unreadable as error:
            damaged.append(str(error))
            continue
        height, width = truth.shape
        if truth.any():
            how = shown(backbone, image.shape, size)
            maps = class_attention_maps(backbone, image, how.shorter, layers)
            if seen is not None:
                seen.append(how)
            names.append(pair.name)
            for i, heads in enumerate(maps.layers):
                everything = [*heads, heads.mean(0)]
                masks = [mask(one, maps.lattice, height, width, mass) for one in everything]
                values = [jaccard(one, truth, counted) for one in masks]
                line = (values[:-1], values[-1], chance(masks[-1], truth, counted))
                found.setdefault(maps.name(i), []).append(line)
        else:
            empty.append(pair.name)
        if progress:
            progress(done, len(pairs))
    if not names:
        raise UsageError(damaged[0] if damaged else "no mask holds an object")
    scores = [
        Scores(layer, names, *(np.array(column) for column in zip(*lines, strict=True)))
        for layer, lines in found.items()
    ]
    return scores, empty, damaged


def evaluate(
    backbone: Backbone,
    folder: Path | str,
    mass: float = MASS,
    size: int | None = None,
    layers: Sequence[int] | None = None,
    ignore: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Row], list[Scores]]:
    """One row a layer, to be signed, and the indices behind it.

    Raises:
        UsageError: as `find_pairs` and `score`.
    """
    began = time.monotonic()
    pairs = find_pairs(folder)
    seen: list[Shown] = []
    scores, empty, damaged = score(backbone, pairs, mass, size, layers, ignore, progress, seen)
    transform = EvalTransform.of(backbone, size)
    large = f"shorter side {size}" if size else captions.inputs(backbone, seen)
    told = (
        f"whole image, {large} (PIL bicubic); masks by nearest patch at the "
        f"image's own size; mean {transform.mean}, std {transform.std}, fp32"
    )
    notes = [f"{len(empty)} masks without an object were left out"] if empty else []
    if damaged:
        notes.append(f"{len(damaged)} images could not be read, the first: {printable(damaged[0])}")
    rows = [
        Row(
            protocol=PROTOCOL,
            settings={
                "layer": one.layer,
                "mass": mass,
                "size": size or _longer(seen),
                "heads": one.heads.shape[1],
                "ignore": "255 in palette files" if ignore is None else ignore,
            },
            top1=None,
            top5=None,
            data=printable(folder),
            transform=told,
            train_size=0,
            val_size=len(one.names),
            seconds=round(time.monotonic() - began, 3),
            notes=notes,
            metrics={name: round(value, 4) for name, value in one.summary().items()},
        )
        for one in scores
    ]
    return rows, scores


def _longer(seen: Sequence[Shown]) -> str:
    """ "longer 480", "longer 56-480"."""
    sides = sorted({max(one.width, one.height) for one in seen})
    return f"longer {'-'.join(map(str, dict.fromkeys((sides[0], sides[-1]))))}"


def save_details(path: Path, scores: Sequence[Scores]) -> None:
    """Every image's Jaccard indices as JSON: layer -> [{image, heads, mean map, chance}].

    Raises:
        RunFailed: the file cannot be written.
    """
    tree: dict[str, list[dict[str, Any]]] = {
        one.layer: [
            {
                "image": printable(name),
                "heads": [round(float(v), 6) for v in heads],
                "mean map": round(float(mean), 6),
                "chance": round(float(guess), 6),
            }
            for name, heads, mean, guess in zip(
                one.names, one.heads, one.mean_map, one.chance, strict=True
            )
        ]
        for one in scores
    }
    write_text(path, json.dumps(tree, indent=1) + "\n")
