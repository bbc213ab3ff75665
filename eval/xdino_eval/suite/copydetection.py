"""Copy detection on Copydays, as DINO evaluates it.

A copy (printed and scanned, painted on, cropped, compressed) shall find its original among originals
and distractors (Douze et al. 2009, "Evaluation of GIST descriptors for web-scale image search").
DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 4.2.1 and the published
`eval_copy_detection.py`) describes an image by the class token and the GeM of the patch tokens in a
row, whitened by a PCA that is learned on other images, and reports the mAP of the strong copies.

The folder, as Copydays is distributed; names of a copy and its original begin with the same four
characters:

    FOLDER/original/200000.jpg ...         the originals
    FOLDER/strong/200001.jpg ...           the copies that are reported
    FOLDER/jpegqual/75/... , crops/10/...  weaker copies, scored where they are there

Letters: N images, Q queries, D width of a descriptor.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from xdino.backbone import Backbone
from xdino.data import image_files
from xdino.data.centre_view import LARGEST
from xdino.data.decode import SUFFIXES
from xdino.data.image_files import printable
from xdino.data.sources import FileSource
from xdino.errors import UsageError
from xdino_eval.accuracy import average_precision
from xdino_eval.features import Progress
from xdino_eval.results import Row
from xdino_eval.suite.descriptors import GEM, Describer, class_and_gem
from xdino_eval.transform import EvalTransform, resample

BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{share}" for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
KEY = 4  # leading characters that a copy and its original share
RANKED = 20  # images a query is answered with, as published
SMALLEST_EIGENVALUE = 1e-5  # of the largest


@dataclass(frozen=True)
class ImageFolder:
    """The images directly in a folder, sorted by name."""

    path: Path
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> "ImageFolder":
        """Raises UsageError where there is no such folder, or it holds no image."""
        if not path.is_dir():
            raise UsageError(f"there is no folder {path}")
        names = tuple(image.name for image in image_files.listed(path))
        if not names:
            raise UsageError(f"{path} holds no image with the suffix {' '.join(SUFFIXES)}")
        return cls(path, names)

    def source(self, channels: int) -> FileSource:
        paths = [os.fsencode(name) for name in self.names]
        return FileSource(str(self.path), self.path, paths, channels)


@dataclass(frozen=True)
class Copydays:
    """The blocks that are there, "original" and "strong" among them; images that join the originals;
    images that the whitening is learned on."""

    folder: Path
    blocks: dict[str, ImageFolder]
    distractors: ImageFolder | None = None
    whitening: ImageFolder | None = None

    def positives(self, block: str) -> list[np.ndarray]:
        """For each copy of `block` the indices of its originals, int64."""
        keys = np.array([name[:KEY] for name in self.blocks["original"].names])
        return [np.flatnonzero(keys == name[:KEY]) for name in self.blocks[block].names]


def open_copydays(
    folder: Path | str, distractors: Path | None = None, whitening: Path | None = None
) -> Copydays:
    """The blocks of Copydays that are there.

    Args:
        distractors: folder of images that join the originals (published: 10,000 of YFCC100M).
        whitening: folder of images that the whitening is learned on (published: 20,000 of
            YFCC100M); None = none.

    Raises:
        UsageError: originals or strong copies are missing, a copy has no original, or a folder holds
            no image.
    """
    folder = Path(folder)
    for block in ("original", "strong"):
        if not (folder / block).is_dir():
            raise UsageError(
                f"{folder / block} is missing: a Copydays folder holds original/ and strong/, and "
                "may hold jpegqual/QUALITY/ and crops/SHARE/"
            )
    there = [block for block in BLOCKS if (folder / block).is_dir()]
    copydays = Copydays(
        folder,
        {block: ImageFolder.open(folder / block) for block in there},
        ImageFolder.open(distractors) if distractors else None,
        ImageFolder.open(whitening) if whitening else None,
    )
    for block, images in copydays.blocks.items():
        for name, originals in zip(images.names, copydays.positives(block), strict=True):
            if not len(originals):
                raise UsageError(
                    f"{folder / block / name} has no original: no file of {folder / 'original'} "
                    f"begins with {name[:KEY]}"
                )
    return copydays


@dataclass(frozen=True)
class Whitening:
    """mean: float32 [D]. matrix: float32 [D, D]; whitened = (x - mean) matrix^T."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def learn(cls, features: Tensor) -> "Whitening":
        """From descriptors `[N, D]` of other images.

        As published: the second moment is about zero while the descriptors are centred, and
        eigenvalues below 1e-5 of the largest count as that.
        """
        x = features.double()
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        if not values.max() > 0:
            raise UsageError("descriptors that are all zero have no whitening")
        values = values.clamp(min=float(values.max()) * SMALLEST_EIGENVALUE)
        # Largest first: the order changes no similarity, and makes the rows readable.
        matrix = (vectors / values.sqrt()).T.flip(0)
        return cls(x.mean(0).float(), matrix.float())

    def __call__(self, features: Tensor) -> Tensor:
        """`[N, D]` -> `[N, D]`."""
        return (features - self.mean) @ self.matrix.T


def mean_average_precision(ranking: np.ndarray, positives: list[np.ndarray]) -> float:
    """In per cent. ranking: int [Q, R] database indices, best first; what lies beyond R is lost."""
    precisions = []
    for order, positive in zip(ranking, positives, strict=True):
        ranks = np.flatnonzero(np.isin(order, positive))
        precisions.append(average_precision(ranks, len(positive)))
    return 100 * float(np.mean(precisions))


def describe_copydays(
    describer: Describer, copydays: Copydays, size: int, channels: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Descriptors of length 1 of the images of each block, and of originals with distractors."""

    def described(images: ImageFolder) -> Tensor:
        def square(image: np.ndarray, _: int) -> np.ndarray:
            return resample(image, (size, size), Image.Resampling.BICUBIC)

        return describer(images.source(channels), square)

    queries = {block: described(images) for block, images in copydays.blocks.items()}
    database = queries["original"]
    if copydays.distractors:
        database = torch.cat((database, described(copydays.distractors)))
    if copydays.whitening:
        whiten = Whitening.learn(described(copydays.whitening))
        database = whiten(database)
        queries = {block: whiten(found) for block, found in queries.items()}
    queries = {block: F.normalize(found, dim=1) for block, found in queries.items()}
    return queries, F.normalize(database, dim=1)


def evaluate_copydetection(
    backbone: Backbone,
    copydays: Copydays,
    size: int = 320,
    batch_size: int = 16,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Row:
    """mAP of each block that is there, as an unsigned row of results.

    Args:
        size: images are resized to squares of so many pixels, bicubic, whatever their proportions.

    Raises:
        UsageError: no patch tokens in this backbone.
        RunFailed: an image cannot be read.
    """
    if size**2 > LARGEST:
        raise UsageError(
            f"{size} x {size} pixels are more than the limit of {LARGEST / 1e6:,.0f} million: "
            "lower --size"
        )
    start = time.monotonic()
    transform = EvalTransform.of(backbone, size)
    describer = Describer(
        backbone, class_and_gem, transform, batch_size, workers, precision, progress
    )
    queries, database = describe_copydays(describer, copydays, size, len(backbone.mean))
    metrics = {}
    for block, found in sorted(queries.items(), key=lambda item: item[0] != "strong"):
        similarity = found @ database.T
        ranking = similarity.argsort(dim=1, descending=True, stable=True)[:, :RANKED].numpy()
        metrics[f"mAP {block}"] = mean_average_precision(ranking, copydays.positives(block))
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (backbone.mean, backbone.std))
    absent = [block for block in BLOCKS if block not in queries]
    others = {"distractors": copydays.distractors, "whitening": copydays.whitening}
    return Row(
        protocol="copy detection",
        settings={"size": size, "gem": GEM, "ranked": RANKED}
        | {name: len(images.names) if images else 0 for name, images in others.items()},
        top1=None,
        top5=None,
        data=printable(copydays.folder),
        transform=f"{size} x {size} (PIL bicubic), mean ({mean}), std ({std}), {precision}",
        train_size=len(database),
        val_size=sum(len(found) for found in queries.values()),
        seconds=time.monotonic() - start,
        notes=[f"not there, not measured: {', '.join(absent)}"] if absent else [],
        metrics=metrics,
    )
