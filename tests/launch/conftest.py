"""What several files of these tests look at."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def dark_and_bright() -> Callable[[Path], Path]:
    """dark_and_bright(root): images of two classes in root/train/ and root/val/."""

    def make(root: Path) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (("train", 24), ("val", 12)):
            for number in range(count):
                name = "dark" if number % 2 else "bright"
                (root / split / name).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 90, (24, 24, 3)) + 160 * (name == "bright")
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
        return root

    return make
