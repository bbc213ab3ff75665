"""Annotated pictures, found by the layout of a folder: COCO's, VOC's, or JSON beside images."""

from collections.abc import Sequence
from pathlib import Path

from xdino.errors import UsageError, asked
from xdino_transfer.detection.layouts import coco, voc
from xdino_transfer.detection.layouts.annotations import MISSING_SHARE, Annotations

TESTS = ("image_info_", "instances_")  # files of a split that need not be annotated begin so
BESIDE = "_annotations.coco.json"  # among the images of a split, as Roboflow exports it
_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


def open_annotated(
    data: str, missing_share: float = MISSING_SHARE
) -> tuple[Annotations, Annotations]:
    """Train and val of a folder.

    ROOT/annotations/instances_train2017.json with ROOT/train2017/ (and val; any year, or none);
    ROOT/train/_annotations.coco.json beside the images (and valid/, val/ or test/); VOC's
    Annotations/, JPEGImages/ and ImageSets/Main/, also below ROOT/VOC2012 or ROOT/VOCdevkit/VOC2012.

    Raises:
        UsageError: no layout, or more than one; a split that is not there; classes that differ.
    """
    with asked(f"{data} cannot be read"):
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder} to read annotated pictures from")
        layouts = {
            "annotations/instances_train*.json": bool(_instances(folder, "train")),
            f"train/{BESIDE}": bool(_beside(folder, "train")),
            "VOC's Annotations/ and JPEGImages/": bool(_voc(folder)),
        }
        found = [name for name, there in layouts.items() if there]
        if not found:
            raise UsageError(
                f"{folder} holds no annotated pictures: expected {', '.join(layouts)} there"
            )
        if len(found) > 1:
            raise UsageError(
                f"{folder} mixes layouts, so that it is unclear what to read: {' and '.join(found)}"
            )
        train, val = _opened(folder, missing_share)
    _compare(train, val, str(folder))
    return train, val


def open_test(data: str, split: str = "test", missing_share: float = MISSING_SHARE) -> Annotations:
    """A split that need not be annotated: "test" or, of COCO, "test-dev".

    ROOT/annotations/image_info_test2017.json (or -dev2017, or instances_) with ROOT/test2017/;
    ROOT/test/_annotations.coco.json beside the images.

    Raises:
        UsageError: VOC's layout, which has no numbers of pictures; no such split, or several.
    """
    with asked(f"{data} cannot be read"):
        folder = Path(data).expanduser()
        check_numbered(data)
        path, beside = _instances(folder, split, TESTS), folder / split / BESIDE
        if path is not None:
            return coco.read(path, _images_of(folder, path), missing_share, annotated=False)
        if beside.is_file():
            return coco.read(beside, beside.parent, missing_share, annotated=False)
    raise UsageError(
        f"{folder} has no {split} split: expected annotations/image_info_{split}*.json, or "
        f"{split}/{BESIDE}"
    )


def check_numbered(data: str) -> None:
    """Raises UsageError where pictures have no numbers of their own, which COCO's result files need."""
    if _voc(Path(data).expanduser()) is not None:
        raise UsageError(
            f"{data} is in VOC's layout, whose pictures have names and no numbers: COCO's result files "
            "are of COCO's layout, or of JSON beside the images"
        )


def open_files(
    train: tuple[str, str], val: tuple[str, str], missing_share: float = MISSING_SHARE
) -> tuple[Annotations, Annotations]:
    """Train and val, each by a JSON file of COCO's kind and the folder of its pictures.

    Raises:
        UsageError: one is not there, or no such file; classes that differ.
    """

    ours, theirs = (open_file(*named, missing_share) for named in (train, val))
    _compare(ours, theirs, f"{train[0]} and {val[0]}")
    return ours, theirs


def open_file(
    told: str, images: str, missing_share: float = MISSING_SHARE, annotated: bool = True
) -> Annotations:
    """One split: a JSON file of COCO's kind and the folder of its pictures.

    Raises:
        UsageError: one is not there, or no such file.
    """
    with asked(f"{told} cannot be read"):
        file, folder = Path(told).expanduser(), Path(images).expanduser()
        if not file.is_file():
            raise UsageError(f"there is no file {file} of annotations")
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}, where the pictures of {file} are")
        return coco.read(file, folder, missing_share, annotated)


def _compare(train: Annotations, val: Annotations, where: str) -> None:
    """Raises UsageError where their classes differ."""
    if train.classes != val.classes:
        ours, theirs = set(train.classes), set(val.classes)
        parts = [
            f"only in {split}: {', '.join(sorted(names)[:5])}"
            for split, names in (("train", ours - theirs), ("val", theirs - ours))
            if names
        ]
        if not parts:
            parts = ["the same names in another order (by the numbers of their categories)"]
        raise UsageError(f"the classes of {where} differ between its splits; {'; '.join(parts)}")


def _opened(folder: Path, missing_share: float) -> tuple[Annotations, Annotations]:
    root = _voc(folder)
    if root is not None:
        train = voc.read(root, "train", None, missing_share)
        listed = root / "ImageSets" / "Main"
        split = "val" if (listed / "val.txt").is_file() else "test"
        return train, voc.read(root, split, train.classes, missing_share)
    found = []
    for split in ("train", "val"):
        path = _instances(folder, split)
        beside = _beside(folder, split)
        if path is not None:
            found.append(coco.read(path, _images_of(folder, path), missing_share))
        elif beside is not None:
            found.append(coco.read(beside / BESIDE, beside, missing_share))
        else:
            raise UsageError(f"{folder} has annotations of train and none of {split}")
    train, val = found
    return train, val


def _instances(folder: Path, split: str, begins: Sequence[str] = ("instances_",)) -> Path | None:
    """ROOT/annotations/instances_SPLIT*.json. Raises UsageError where there are several.

    Behind "test" comes a year or nothing, so that it is not "test-dev".
    """
    later = "[0-9]*" if split == "test" else "*"
    patterns = [f"{begin}{split}{rest}.json" for begin in begins for rest in {later, ""}]
    places = (folder / "annotations").glob
    found = sorted({path for pattern in patterns for path in places(pattern)})
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{folder / 'annotations'} has several annotations of {split}: {names}")
    return found[0] if found else None


def _images_of(folder: Path, path: Path) -> Path:
    """train2017 of instances_train2017.json, below ROOT or ROOT/images."""
    name = path.stem.removeprefix("instances_").removeprefix("image_info_").replace("-dev", "")
    places = [folder / name, folder / "images" / name]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UsageError(f"the pictures of {path} are expected in {places[0]}, which is no folder")
    return found


def _beside(folder: Path, split: str) -> Path | None:
    places = (folder / name for name in _FOLDERS[split])
    return next((place for place in places if (place / BESIDE).is_file()), None)


def _voc(folder: Path) -> Path | None:
    places = [folder, *sorted(folder.glob("VOC20*")), *sorted(folder.glob("VOCdevkit/VOC20*"))]
    found = [place for place in places if voc.is_layout(place)]
    if len(found) > 1:
        raise UsageError(f"{folder} holds several years of VOC: name one of {found[0]}, {found[1]}")
    return found[0] if found else None
