"""What the servers of benchmarks take: a COCO result file, or a PNG of class numbers for each picture.

- Of a detector FILE.json: a list of {image_id, category_id, bbox, score, segmentation} in the numbers of
  the layout's own JSON file, as COCO's server takes it.
- Of a segmenter a folder, or FILE.zip: a gray PNG of each picture, of its size and name, in the numbers
  of the layout's own masks: 1 to 150 for ADE20K, whose 0 ("other") nobody asks for; 0 to 20 for VOC.
"""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xdino.data.listing import printable
from xdino.errors import UsageError, world
from xdino.runtime import distributed
from xdino.runtime.atomic import write_text, written_beside
from xdino_transfer.segmentation.maps import Maps

JSON, ZIP = ".json", ".zip"


def check(path: Path, segments: bool) -> None:
    """Before anything is looked at. Raises UsageError for a name that such a file cannot have."""
    suffix = path.suffix.lower()
    if not segments and (suffix != JSON or path.is_dir()):
        raise UsageError(
            f"--submission of a detector is a COCO result file, FILE{JSON}, and not {path}"
        )
    if segments and suffix not in ("", ZIP):
        raise UsageError(
            f"--submission of a segmenter is a folder or FILE{ZIP} of masks, and not {path}"
        )
    if segments and path.exists() and path.is_dir() == (suffix == ZIP):
        raise UsageError(
            f"{path} is a {'folder' if path.is_dir() else 'file'}: choose another name"
        )


def prepare(path: Path, truth: str) -> None:
    """Make room for a COCO result file. truth: the file of annotations.

    Raises:
        UsageError: it would take that file's place. RunFailed: its folder cannot be made.
    """
    if path.resolve() == Path(truth).resolve():
        raise UsageError(f"--submission {path} is the file of annotations itself")
    with world(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_results(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Detections as COCO's server takes them. Raises RunFailed where they cannot be written."""
    write_text(path, json.dumps(list(results)))


@dataclass
class Masks:
    """PNG files of the pictures `maps`, in a folder or a zip `path`; each process adds its own."""

    path: Path
    maps: Maps
    _held: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._below = _shared_folder(self.maps.images)
        for places in filter(None, (self.maps.images, self.maps.masks)):
            if _shared_folder(places).resolve() == self.path.resolve():
                raise UsageError(f"--submission {self.path} is the folder of the data itself")
        if self.path.suffix.lower() != ZIP:
            with world(f"write {self.path}"):
                self.path.mkdir(parents=True, exist_ok=True)

    def add(self, index: int, classes: np.ndarray) -> None:
        """classes [H, W] of a picture, from 0. Raises RunFailed where it cannot be written."""
        png = io.BytesIO()
        numbers = classes.astype(np.uint8) + np.uint8(self.maps.zero_is_void)
        Image.fromarray(numbers).save(png, "PNG")
        own = self.maps.images[index].relative_to(self._below)
        name = str(own.with_suffix(".png"))  # pictures may lie in folders
        if self.path.suffix.lower() == ZIP:
            self._held[name] = png.getvalue()
            return
        path = self.path / name
        with world(f"write {printable(bytes(path))}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(path) as beside:
                beside.write_bytes(png.getvalue())

    def finish(self, shared: bool) -> None:
        """Of several processes every one calls this; the first writes the zip."""
        if self.path.suffix.lower() != ZIP:
            return
        held = distributed.to_first(self._held) if shared else [self._held]
        if not held:
            return
        with (
            world(f"write {self.path}"),
            written_beside(self.path) as beside,
            zipfile.ZipFile(beside, "w") as archive,
        ):
            for name, png in sorted(item for some in held for item in some.items()):
                archive.writestr(name, png)


def _shared_folder(places: Sequence[Path]) -> Path:
    """The folder that all files lie in or below."""
    return Path(os.path.commonpath([place.parent for place in places]))
