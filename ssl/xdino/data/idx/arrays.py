"""IDX, the format of MNIST and Fashion-MNIST: magic 0 0 8 rank, big-endian sizes, then bytes."""

import gzip
import hashlib
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from xdino.config.bands import Bands
from xdino.data.idx.scattered import scattered
from xdino.data.source import Source, only_pictures, png
from xdino.errors import UsageError
from xdino.runtime.places import DATA_SETS

NAMES = DATA_SETS
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
_SAMPLE_FOLDER = Path(__file__).parents[2] / "assets" / "fashion_mnist_sample"


class ArraySource(Source):
    """Images in memory, all of one size: grey, uint8 [N, H, W], or colour, uint8 [N, H, W, 3].

    Three channels of grey repeat the one; one channel of colour is its luma.
    """

    batch_reads = 64  # crops of 28 pixels are all interpreter: threads that take turns double it

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        channels: int = 1,
        split: str = "train",
    ) -> None:
        if isinstance(channels, Bands) and (channels not in (1, 3) or channels.range):
            raise only_pictures(name)
        super().__init__(name, int(channels), labels, classes)
        self._images, self._split = images, split

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> np.ndarray:
        image = self._images[index]
        if image.ndim == 3:
            return image if self.channels == 3 else _luma(image)[:, :, None]
        image = image[:, :, None]
        return image if self.channels == 1 else np.repeat(image, 3, axis=2)

    def encoded(self, index: int) -> bytes:
        return png(self._images[index])

    def member(self, index: int) -> bytes:
        assert self.labels is not None
        assert self.classes is not None
        folder = re.sub(r"[^A-Za-z0-9]+", "_", self.classes[self.labels[index]])
        return f"{folder}/{index:05}.png".encode()

    def describe(self, index: int) -> str:
        return f"{self._split} image {index} of {self.name}"

    def _content(self) -> Iterator[bytes]:
        yield self._images.tobytes()

    def stamps(self) -> bytes:
        digest = hashlib.blake2b(self._images.tobytes(), digest_size=32)
        return str(self._images.shape).encode() + digest.digest()


def _luma(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [H, W] (ITU-R 601), in whole numbers as Pillow's "L" rounds them."""
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65,536
    return ((image.astype(np.uint32) @ weights + 0x8000) >> 16).astype(np.uint8)


def open_named(data: str, split: str | None, channels: int | None) -> Source | None:
    """One of `NAMES`, "fashion_mnist:FOLDER" included; None where `data` is none of them."""
    name, _, place = data.partition(":")
    split = split or "train"
    if data == "fashion_mnist_sample":
        return _open(data, _SAMPLE_FOLDER, split, split, channels)
    if data == "fashion_mnist_scattered":
        return _open(data, _SAMPLE_FOLDER, split, split, channels, scatter=True)
    if name == "fashion_mnist":
        folder = place or os.environ.get("XDINO_FASHION_MNIST") or _FASHION_FOLDER
        prefix = {"val": "t10k"}.get(split, split)
        return _open(data, Path(folder).expanduser(), prefix, split, channels)
    return None


def _open(
    data: str,
    folder: Path,
    prefix: str,
    split: str,
    channels: int | None,
    scatter: bool = False,
) -> Source:
    images = _read(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
    if len(images) != len(labels):
        raise UsageError(
            f"{folder} holds {len(images):,} {split} images but {len(labels):,} labels"
        )
    if len(images) == 0 or labels.max() >= len(FASHION_CLASSES):
        raise UsageError(f"{folder} holds no {split} images with labels from 0 to 9")
    if scatter:
        images = scattered(images, seed=("train", "val").index(split))
    return ArraySource(data, images, labels, FASHION_CLASSES, channels or 1, split)


def _read(folder: Path, name: str, rank: int) -> np.ndarray:
    """uint8 of `rank` dimensions from FOLDER/NAME.gz or FOLDER/NAME."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise UsageError(
            f"Fashion-MNIST is not here: {folder / name}(.gz) does not exist; get it with `apt-get "
            "install dataset-fashion-mnist`, or name its folder: fashion_mnist:FOLDER, or in the "
            "environment variable XDINO_FASHION_MNIST"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _parse(path, file.read, rank)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read whole ({error}); fetch it again") from error


def _parse(path: Path, read: Callable[[int], bytes], rank: int) -> np.ndarray:
    header = read(4 + 4 * rank)
    if len(header) < 4 + 4 * rank or header[:4] != bytes([0, 0, 8, rank]):
        raise UsageError(f"{path} is no IDX file of bytes with {rank} dimensions")
    shape = struct.unpack_from(f">{rank}I", header, 4)
    expected = math.prod(shape)
    # In pieces, so that memory follows what is there and not what a header announces. A bytearray,
    # because torch warns about arrays that cannot be written.
    content = bytearray()
    while len(content) <= expected and (piece := read(1 << 20)):
        content += piece
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(header) + len(content):,} bytes"
        raise UsageError(
            f"{path} holds {found} where its header announces {len(header) + expected:,} bytes; "
            "fetch it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
