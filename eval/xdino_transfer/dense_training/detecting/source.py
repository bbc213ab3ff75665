"""The annotated pictures that a detector learns from, as a source of images.

As published, pictures without an object to learn from, and those with a side below 32 pixels, are left
out.

Letters: N pictures, M objects, H x W pixels.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from xdino.data.listing import ByteStrings, printable
from xdino.data.source import StoredSource, names_and_sizes, settle_bands
from xdino.errors import UsageError
from xdino_transfer.detection.layouts.annotations import Annotations
from xdino_transfer.detection.objects import Objects

SHORTEST = 32  # pixels of a picture's shorter side that is learned from


class AnnotatedSource(StoredSource):
    """Those pictures of `annotations` that can be learned from, N of them.

    asked: channels, `Bands`, or None for what there is; `self.annotations` are read so.

    Raises:
        UsageError: there is none.
    """

    lies_apart = True

    batch_reads = 1  # pictures are large

    def __init__(self, annotations: Annotations, asked: int | None = None) -> None:
        super().__init__(annotations.where, asked or annotations.channels)
        self.annotations = annotations
        self.remarks = list(annotations.notices)
        large = annotations.sizes.min(axis=1, initial=1 << 30) >= SHORTEST
        owners = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
        some = np.bincount(owners[~annotations.crowd], minlength=len(annotations)) > 0
        self.numbers = np.flatnonzero(large & some)  # of our pictures among all
        if not len(self.numbers):
            what = "an object" if not some.any() else f"both sides of {SHORTEST} pixels or more"
            raise UsageError(f"{annotations.where} has no picture with {what} to learn from")
        left_out = len(annotations) - len(self.numbers)
        if left_out:
            self.remarks.append(
                f"{annotations.where}: {left_out:,} of {len(annotations):,} pictures have no object "
                f"to learn from, or a side below {SHORTEST} pixels, and are left out"
            )
        H, W = annotations.sizes[self.numbers].T
        self.portrait = H > W  # bool [N]
        settle_bands(self, asked)
        self.annotations = dataclasses.replace(annotations, channels=self.channels)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> np.ndarray:
        return self.annotations.read(int(self.numbers[index]), self.max_pixels)

    def encoded(self, index: int) -> bytes:
        return self._path(index).read_bytes()

    def _ends(self, index: int, most: int) -> bytes:
        whole = self.encoded(index)
        return whole[:most] + whole[-most:]

    def sizes(self) -> np.ndarray:
        paths = map(self._path, range(len(self)))
        return np.array([path.stat().st_size if path.is_file() else -1 for path in paths])

    def _path(self, index: int) -> Path:
        return self.annotations.paths[int(self.numbers[index])]

    def objects(self, index: int) -> Objects:
        """Of a picture, without its crowds, in its own pixels."""
        number = int(self.numbers[index])
        rows = self.annotations.of(number)
        masks = np.stack([self.annotations.mask(number, int(row)) for row in rows])
        return Objects(
            torch.from_numpy(self.annotations.boxes[rows]),
            torch.from_numpy(self.annotations.labels[rows]),
            torch.from_numpy(masks),
        )

    def member(self, index: int) -> bytes:
        return self._path(index).name.encode("utf-8", "replace")

    def describe(self, index: int) -> str:
        return printable(bytes(self._path(index)))

    def _content(self) -> Iterator[bytes]:
        """Names and sizes of the files, and all columns of what is known of them."""
        known = self.annotations
        paths = [known.paths[number] for number in self.numbers.tolist()]
        yield names_and_sizes(ByteStrings.of(map(bytes, paths)), self.sizes())
        told = hashlib.blake2b(digest_size=32)
        for column in (known.sizes, known.starts, known.boxes, known.labels, known.areas):
            told.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).tobytes())
        told.update(known.crowd.tobytes())
        told.update("\0".join(known.classes).encode("utf-8", "surrogatepass"))
        yield told.digest()
