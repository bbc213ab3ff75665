"""What `xdino bench pipeline` times: from JPEG files to crops, this code's way and the published.

Letters: B images.
"""

import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xdino import augment, data
from xdino.data.sources import FileSource
from xdino.errors import UsageError
from xdino.pretraining import to_device
from xdino_launch.bench import reference as published
from xdino_launch.bench.timing import Arm, Protocol, Ratio, Report, again, divided, on_cores, timed


def pipeline(
    folder: str | None, reference: str | None, batch: int, images: int, protocol: Protocol
) -> Report:
    """Milliseconds an image from JPEG files to crops: 2 x 224 and 8 x 96, published parameters.

    Args:
        folder: images; None for tiles of two photographs, written as JPEG to a temporary folder.
        reference: a checkout of facebookresearch/dino, or None.
        batch: images of a batch. images: of an arm's round, rounded to whole batches.
    """
    dino = published.load_dino(reference) if reference else None
    with ExitStack() as stack:
        where = folder or stack.enter_context(_photographs())
        source = data.open_source(where, split="train", channels=3)
        if not isinstance(source, FileSource):
            raise UsageError(f"{folder} holds no image files; bench pipeline reads files")
        stack.enter_context(on_cores(protocol.used_threads, pinned=True))
        batches = max(1, images // batch)
        loader = data.CropLoader(
            source, augment.multi_crop(), batch, seed=0, workers=protocol.used_threads
        )
        ours, complete = _our_pipelines(loader, batches)
        arms = [ours, complete, again(ours)]
        ratios = [Ratio("ours, all / ours, uint8 crops", complete.name, ours.name)]
        if dino is not None:
            paths = [source.path(i) for i in range(len(source))]
            theirs = published.PublishedPipeline(dino, paths, batch, protocol.used_threads)
            stack.callback(theirs.close)
            reference_arms = _their_pipelines(theirs, loader, batches)
            arms += reference_arms
            ratios += [
                Ratio(f"{over.name} / {under.name}", over.name, under.name)
                for over in reference_arms
                for under in (ours, complete)
            ]
        values = protocol.measure(arms)
        settings = {
            "images": len(source),
            "data": folder or "tiles of scikit-learn's two photographs",
            **_typical(source),
            "batch": batch,
            "images an arm and round": batches * batch,
            "threads": protocol.used_threads,
            "cores": f"pinned to {protocol.used_threads}, worker processes included",
            "crops": "2 x 224, 8 x 96",
        }
        return Report("pipeline", settings, "ms an image", values, divided(values, ratios))


def _our_pipelines(loader: data.CropLoader, batches: int) -> list[Arm]:
    """Crops left as uint8 for the device, and everything done on the CPU."""
    unit = batches * loader.batch_size / 1e3  # seconds -> milliseconds an image

    def crops(number: int) -> None:
        for _ in loader.iterate(number * batches, (number + 1) * batches):
            pass

    def everything(number: int) -> None:
        for batch in loader.iterate(number * batches, (number + 1) * batches):
            to_device(batch, loader.crops, torch.device("cpu"))

    return [Arm("ours, uint8 crops", timed(crops, unit)), Arm("ours, all", timed(everything, unit))]


def _their_pipelines(
    theirs: published.PublishedPipeline, loader: data.CropLoader, batches: int
) -> list[Arm]:
    """The published augmentation in its loader and without, on the images of our same batches."""
    unit, B = batches * loader.batch_size / 1e3, loader.batch_size

    def indices(number: int) -> list[int]:
        found: list[int] = []
        for iteration in range(number * batches, (number + 1) * batches):
            epoch, step = divmod(iteration, loader.steps_per_epoch)
            order = data.epoch_order(len(loader.source), loader.seed, epoch)
            found += order[step * B : (step + 1) * B].tolist()
        return found

    return [
        Arm("published loader", timed(lambda number: theirs.load(indices(number)), unit)),
        Arm("published, no loader", timed(lambda number: theirs.augment(indices(number)), unit)),
    ]


@contextmanager
def _photographs(count: int = 64, width: int = 512, height: int = 400) -> Iterator[str]:
    """A folder of `count` JPEG tiles (0.2 megapixels, quality 90) of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # two of [427, 640, 3]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            photograph = photographs[i % len(photographs)]
            top = generator.integers(photograph.shape[0] - height + 1)
            left = generator.integers(photograph.shape[1] - width + 1)
            tile = photograph[top : top + height, left : left + width]
            Image.fromarray(tile).save(Path(folder) / f"{i:03}.jpg", quality=90)
        yield folder


def _typical(source: FileSource) -> dict[str, float]:
    """Median size of (at most 32 of) the files, in kB and in megapixels."""
    some = range(0, len(source), max(1, len(source) // 32))
    pixels = [math.prod(source.read(i).shape[:2]) / 1e6 for i in some]
    kilobytes = [Path(source.path(i)).stat().st_size / 1e3 for i in some]
    return {
        "median kB": round(statistics.median(kilobytes), 1),
        "median megapixels": round(statistics.median(pixels), 3),
    }
