"""Images of bands made from photographs: 13 bands of 12 bits by linear mixes, blur, haze and noise.

Like a satellite's: neighbouring bands are alike, some are coarser, levels differ, and most of 16 bits
is empty. A class is a photograph; training tiles come from its left half, those to judge from the right.
"""

from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

BANDS = 13


def bands_of(photograph: np.ndarray, bands: int = BANDS, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3] -> uint16 [H, W, bands], values up to 4095; bands 4, 3, 2 (from 1) are R, G, B."""
    random = np.random.default_rng(seed)
    rgb = photograph.astype(np.float32) / 255
    linear = np.concatenate([rgb**2.2, 1 - rgb[..., 1:2] * rgb[..., 2:]], -1)
    weights = random.dirichlet(np.ones(4), bands)
    weights[1:4] = np.eye(4)[[2, 1, 0]]
    values = linear @ weights.T
    for band in (0, bands - 3, bands - 1):  # coarser bands
        values[..., band] = gaussian_filter(values[..., band], 2)
    scale = random.uniform(0.4, 1, bands)
    values = 0.03 + values * scale + random.normal(0, 0.005, values.shape)
    return np.clip(values * 4095, 0, 4095).astype(np.uint16)


def tiles(image: np.ndarray, side: int, count: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    corners = random.integers(0, np.array(image.shape[:2]) - side, (count, 2))
    return [image[y : y + side, x : x + side] for y, x in corners]


def write_tiff(path: Path, image: np.ndarray, **how: object) -> None:
    how = {"photometric": "minisblack", "planarconfig": "contig", **how}
    tifffile.imwrite(path, image, **how)


def write_classes(
    folder: Path, side: int = 64, train: int = 24, val: int = 12, bands: int = BANDS
) -> Path:
    """FOLDER/train and FOLDER/val of two classes, TIFFs of uint16."""
    for number, photograph in enumerate(load_sample_images().images):
        image = bands_of(photograph, bands)
        half = image.shape[1] // 2
        for split, part, count in (
            ("train", image[:, :half], train),
            ("val", image[:, half:], val),
        ):
            place = folder / split / ("temple", "flower")[number]
            place.mkdir(parents=True)
            for i, tile in enumerate(tiles(part, side, count, number)):
                write_tiff(place / f"{i:03}.tif", tile)
    return folder
