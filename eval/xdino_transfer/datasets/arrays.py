"""Colour images in memory, all of one size."""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from xdino.data import Source


class ColourArrays(Source):
    """uint8 [N, H, W, 3]; one channel is their luma (ITU-R 601, Pillow's "L")."""

    batch_reads = 64

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        split: str,
        channels: int = 3,
    ) -> None:
        super().__init__(name, channels, labels, classes)
        self._images, self._split = images, split

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> np.ndarray:
        image = self._images[index]
        if self.channels == 3:
            return image
        weights = np.array([19595, 38470, 7471], np.uint32)  # of 65,536, as Pillow rounds
        luma = (image.astype(np.uint32) @ weights + 0x8000) >> 16
        return luma.astype(np.uint8)[..., None]

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
        return hashlib.blake2b(self._images.tobytes(), digest_size=32).digest()
