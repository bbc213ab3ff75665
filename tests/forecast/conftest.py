"""Folders of small pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def write_pictures():
    """write_pictures(folder, count, (height, width), grey=False): PNGs in a new folder."""

    def write(folder: Path, count: int, size: tuple[int, int], grey: bool = False) -> Path:
        folder.mkdir(parents=True)
        generator = np.random.default_rng(0)
        for i in range(count):
            pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("L") if grey else image).save(folder / f"{i:03}.png")
        return folder

    return write
