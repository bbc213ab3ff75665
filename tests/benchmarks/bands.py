"""Images of bands: how fast crops are made of them, and what their 8 bits cost.

    python tests/benchmarks/bands.py speed      # crops a second beside photographs', interleaved, A/A
    python tests/benchmarks/bands.py precision  # scores by 8 bits of the declared range, and by floats

Speed: published crops (2 of 224, 8 of 96 pixels) of tiles of 256 pixels in one thread, read, cut,
augmented and normalised; CPU time, so that other programs take nothing away. Bytes are those of the
uint8 crops.

Precision: Fashion-MNIST's sample as 13 bands of 12 bits in faint light (the brightest value is an
eighth of the sensor's range), noise of 2 of its steps, by k-NN and a logistic probe on pixels and on
an untrained network's features: what rounding takes away is taken away before anything is learned.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from bands_of_photographs import bands_of, tiles, write_tiff
from sklearn.datasets import load_sample_images

from xdino.augment import cutting, multi_crop
from xdino.backbones import BackboneSpec
from xdino.config.bands import Bands
from xdino.data import CropLoader, open_source
from xdino.pretraining import to_device
from xdino.runtime.device import resolve_device

SIDE, IMAGES, BATCH, ROUNDS = 256, 32, 8, 7


def folders(root: Path) -> dict[str, tuple[Path, int]]:
    """The same tiles as photographs and as bands: a folder of each kind, and what it is opened with."""
    photographs = load_sample_images().images
    rgb = [tile for p in photographs for tile in tiles(p, SIDE, IMAGES // 2, 0)]
    deep = [tile for p in photographs for tile in tiles(bands_of(p), SIDE, IMAGES // 2, 0)]
    bands = Bands(13, [(0, 4095)], (3, 2, 1))
    kinds: dict[str, tuple[list[np.ndarray], Callable[[Path, np.ndarray], object], int]] = {
        "RGB, JPEG": (rgb, lambda p, x: p.with_suffix(".jpg").write_bytes(
            simplejpeg.encode_jpeg(np.ascontiguousarray(x), 90)), 3),
        "RGB, JPEG again": (rgb, lambda p, x: p.with_suffix(".jpg").write_bytes(
            simplejpeg.encode_jpeg(np.ascontiguousarray(x), 90)), 3),
        "RGB, TIFF": (rgb, lambda p, x: write_tiff(p.with_suffix(".tif"), x, photometric="rgb"), 3),
        "13 bands, TIFF": (deep, lambda p, x: write_tiff(p.with_suffix(".tif"), x), bands),
        "13 bands, TIFF again": (deep, lambda p, x: write_tiff(p.with_suffix(".tif"), x), bands),
        "13 bands, deflated": (deep, lambda p, x: write_tiff(
            p.with_suffix(".tif"), x, compression="zlib", predictor=True), bands),
        "13 bands, planes": (deep, lambda p, x: write_tiff(
            p.with_suffix(".tif"), np.ascontiguousarray(x.transpose(2, 0, 1)),
            planarconfig="separate"), bands),
        "13 bands, NPY": (deep, lambda p, x: np.save(p.with_suffix(".npy"), x), bands),
        "13 bands, float32 NPY": (
            deep, lambda p, x: np.save(p.with_suffix(".npy"), x.astype(np.float32)), bands),
    }  # fmt: skip
    found = {}
    for name, (images, write, channels) in kinds.items():
        folder = root / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        for number, image in enumerate(images):
            write(folder / f"{number:02}", image)
        found[name] = (folder, channels)
    return found


def speed() -> None:
    torch.set_num_threads(1)
    device = resolve_device("cpu")
    with tempfile.TemporaryDirectory() as root:
        running = {}
        for name, (folder, channels) in folders(Path(root)).items():
            source = open_source(str(folder), channels=channels)
            count = int(source.channels)
            rgb = channels.rgb if isinstance(channels, Bands) else None
            crops = multi_crop(mean=(0.4,) * count, std=(0.2,) * count, rgb=rgb)
            loader = CropLoader(source, crops, BATCH, seed=0, workers=0)
            running[name] = loader, loader.iterate(0, 1 << 40), crops
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for lap in range(ROUNDS + 1):
            for name, (_, batches, crops) in running.items():
                began = time.process_time()
                batch = next(batches)
                to_device(batch, crops, device)
                if lap:  # the first compiles
                    seconds[name].append((time.process_time() - began) / BATCH)
        views = sum(view.size**2 for view in multi_crop().views)
        base = None
        print(f"{'':24}{'ms an image':>12}{'images/s':>10}{'MB/s':>8}{'of RGB':>8}")
        for name, found in seconds.items():
            middle = statistics.median(found)
            rate = views * running[name][2].channels / middle / 1e6
            base = base or rate
            print(f"{name:24}{1e3 * middle:12.1f}{1 / middle:10.1f}{rate:8.1f}{rate / base:8.0%}")
    resizing()


def resizing() -> None:
    """One crop of 224 pixels of 13 bands, uint8 as here and float32 as it would be."""
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 13), np.uint8)
    cut = cutting.cutter(image)
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy()).float()[None]

    def floats() -> Tensor:
        part = planes[..., 10:210, 10:200]
        return F.interpolate(part, (224, 224), mode="bicubic", antialias=True)

    laps: dict[str, list[float]] = {"uint8": [], "float32": []}
    for _ in range(30):
        for name, work in (("uint8", lambda: cut((10, 10, 200, 190), 224)), ("float32", floats)):
            began = time.process_time()
            work()
            laps[name].append(time.process_time() - began)
    told = ", ".join(
        f"{name} {1e3 * statistics.median(each):.2f} ms" for name, each in laps.items()
    )
    print(f"one crop of 224 pixels, 13 bands: {told}")


def precision() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"embed_dim": 128, "depth": 4, "num_heads": 4}
    spec = BackboneSpec("xcit_nano_12_p4", 13, shape, mean=(0.0,) * 13, std=(1.0,) * 13)
    network = spec.build().eval()
    data = {}
    for split, most in (("train", 4000), ("val", 2000)):
        source = open_source("fashion_mnist_sample", split, labelled=True)
        images = np.concatenate([source.read(i)[None] for i in range(most)])
        assert source.labels is not None
        data[split] = sensor(images), source.labels[:most]
    top = 4095.0
    readings: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "float32": lambda x: x / top,
        "8 bits of 0,4095": lambda x: np.rint(255 * x / top) / 255,
        "8 bits of 0,600": lambda x: np.rint(np.clip(255 * x / 600, 0, 255)) / 255 * (600 / top),
        "8 bits of 0,65535": lambda x: np.rint(255 * x / 65535) / 255 * (65535 / top),
    }
    print(f"{'':20}{'k-NN pixels':>12}{'logistic':>10}{'k-NN network':>14}{'logistic':>10}")
    for name, read in readings.items():
        inputs = {split: read(x.astype(np.float32)) for split, (x, _) in data.items()}
        mean = inputs["train"].mean((0, 1, 2))
        std = inputs["train"].std((0, 1, 2))
        row = []
        for embed in (flat, lambda x: features(network, x)):
            both = {s: embed(((x - mean) / std).astype(np.float32)) for s, x in inputs.items()}
            row += [knn(both, data), logistic(both, data)]
        print(f"{name:20}{row[0]:12.2f}{row[1]:10.2f}{row[2]:14.2f}{row[3]:10.2f}")


def sensor(grey: np.ndarray) -> np.ndarray:
    """uint8 [N, 28, 28, 1] -> uint16 [N, 28, 28, 13], up to an eighth of 4095, noise of 2 steps."""
    random = np.random.default_rng(0)
    gain = random.uniform(0.3, 1, 13)
    values = 20 + 512 * gain * (grey.astype(np.float32) / 255) ** 2
    values += random.normal(0, 2, values.shape)
    return np.clip(np.rint(values), 0, 4095).astype(np.uint16)


def flat(x: np.ndarray) -> np.ndarray:
    return x.mean(-1).reshape(len(x), -1)


def features(network: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        parts = torch.from_numpy(x).permute(0, 3, 1, 2).split(250)
        return torch.cat([network(part) for part in parts]).numpy()


def knn(both: dict[str, np.ndarray], data: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    bank, asked = (torch.from_numpy(both[s]) for s in ("train", "val"))
    near = torch.cdist(asked, bank).argmin(1).numpy()
    return float(100 * (data["train"][1][near] == data["val"][1]).mean())


def logistic(both: dict[str, np.ndarray], data: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    mean, std = both["train"].mean(0), both["train"].std(0) + 1e-6
    fitted = LogisticRegression(C=0.01, max_iter=300)
    fitted.fit((both["train"] - mean) / std, data["train"][1])
    return float(100 * fitted.score((both["val"] - mean) / std, data["val"][1]))


if __name__ == "__main__":
    {"speed": speed, "precision": precision}[sys.argv[1]]()
