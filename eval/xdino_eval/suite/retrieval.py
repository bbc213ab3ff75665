"""Image retrieval on revisited Oxford and Paris, as DINO evaluates it.

The benchmark is Radenović et al. 2018 (https://arxiv.org/abs/1803.11285): a query ranks all images
of the set, junk leaves the ranking, and the positives are the easy ones, the easy and the hard ones
(medium), or the hard ones. DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 4.2.1
and the published `eval_image_retrieval.py`) ranks by the cosine of class tokens. It shows the
network whole query images; the benchmark's own protocol crops them to the box of the query.

The folder, as both sets are distributed:

    FOLDER/roxford5k/gnd_roxford5k.pkl     imlist, qimlist, gnd (bbx, easy, hard, junk a query)
    FOLDER/roxford5k/jpg/NAME.jpg          every name of the two lists
    FOLDER/rparis6k/...                    likewise

Letters: N images of the set, Q queries, D width, C channels, H x W pixels.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from xdino.backbone import Backbone
from xdino.data.sources import FileSource
from xdino.errors import RunFailed, UsageError, asked, nearest
from xdino_eval.accuracy import average_precision
from xdino_eval.features import Progress
from xdino_eval.results import Row
from xdino_eval.suite import safe_pickle
from xdino_eval.suite.descriptors import SCALES, Describer, class_token, multi_scale
from xdino_eval.transform import EvalTransform

DATASETS = ("roxford5k", "rparis6k")
PROTOCOLS = {  # difficulty -> (what counts as positive, what leaves the ranking)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
KAPPAS = (1, 5, 10)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Query:
    """name: of its image. box: (left, top, right, bottom) in pixels. relevant: "easy", "hard" and
    "junk" to int64 indices into the set's images."""

    name: str
    box: Box
    relevant: dict[str, np.ndarray]


@dataclass(frozen=True)
class Benchmark:
    """Names of the set's images, its queries, and the folder that holds all of them."""

    name: str
    images: tuple[str, ...]
    queries: tuple[Query, ...]
    folder: Path

    def source(self, names: list[str], channels: int) -> FileSource:
        """The images called `names`."""
        paths = [os.fsencode(f"{name}.jpg") for name in names]
        return FileSource(self.name, self.folder, paths, channels)


def open_benchmark(folder: Path | str, dataset: str) -> Benchmark:
    """The ground truth of `dataset` and its images, all of which are there.

    Raises:
        UsageError: a folder or an image is missing, or there is no query.
        RunFailed: the ground truth is damaged, no ground truth, or asks for code.
    """
    if dataset not in DATASETS:
        raise UsageError(f'no retrieval set "{dataset}": {nearest(dataset, DATASETS)}')
    root = Path(folder) / dataset
    truth, images = root / f"gnd_{dataset}.pkl", root / "jpg"
    for path, there in ((root, root.is_dir()), (truth, truth.is_file()), (images, images.is_dir())):
        if not there:
            raise UsageError(
                f"{path} is missing: {folder} must hold {dataset}/gnd_{dataset}.pkl and "
                f"{dataset}/jpg/*.jpg"
            )
    names, queries = _parse(safe_pickle.load(truth), truth)
    if not queries or not names:
        raise UsageError(f"{truth} names no {'image' if queries else 'query'}")
    with asked(f"{images} cannot be listed"):
        present = {entry.name for entry in os.scandir(images) if entry.is_file()}
    wanted = [*names, *(query.name for query in queries)]
    missing = [name for name in wanted if f"{name}.jpg" not in present]
    if missing:
        raise UsageError(
            f"{images} lacks {len(missing):,} of the {len(wanted):,} images that {truth.name} "
            f"names, the first {missing[0]}.jpg"
        )
    return Benchmark(dataset, names, queries, images)


def _parse(tree: Any, path: Path) -> tuple[tuple[str, ...], tuple[Query, ...]]:
    try:
        names, asked_for, entries = tree["imlist"], tree["qimlist"], tree["gnd"]
        for name in (*names, *asked_for):
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"an image called {name!r}")
        queries = tuple(
            _query(name, entry, len(names)) for name, entry in zip(asked_for, entries, strict=True)
        )
        if any("\0" in name for name in (*names, *asked_for)):
            raise ValueError("a name with a zero byte")
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RunFailed(
            f"{path} is no ground truth of revisited Oxford or Paris "
            f"({type(error).__name__}: {error})"
        ) from None
    return tuple(names), queries


def _query(name: str, entry: Any, count: int) -> Query:
    relevant = {}
    for kind in ("easy", "hard", "junk"):
        indices = np.asarray(entry[kind])
        if indices.size and (indices.dtype.kind not in "iu" or indices.ndim != 1):
            raise ValueError(f"{kind} images of {name} are no list of numbers")
        if indices.size and not (indices.min() >= 0 and indices.max() < count):
            raise ValueError(f"{kind} images of {name} lie outside of the {count} of the set")
        relevant[kind] = indices.astype(np.int64).reshape(-1)  # empty ones too
    left, top, right, bottom = (float(value) for value in entry["bbx"])
    if not np.isfinite((left, top, right, bottom)).all():
        raise ValueError(f"the box of {name} is not finite")
    return Query(name, (left, top, right, bottom), relevant)


# --- scores -----------------------------------------------------------------------------------


def score(ranking: np.ndarray, queries: tuple[Query, ...]) -> dict[str, float]:
    """mAP and mean precision at 1, 5 and 10 of each difficulty, in per cent.

    A query without positives of a difficulty does not count there; a difficulty without any query
    is left out. Precision at k looks no further than the last positive.

    Args:
        ranking: int [Q, N], the indices of the set's images, best first.
    """
    scores: dict[str, float] = {}
    for difficulty, (good, ignored) in PROTOCOLS.items():
        rows = []
        for order, query in zip(ranking, queries, strict=True):
            positive = np.unique(np.concatenate([query.relevant[kind] for kind in good]))
            junk = np.concatenate([query.relevant[kind] for kind in ignored])
            if not len(positive):
                continue
            # An image in both lists counts as the published code counts it: found, and not ahead of
            # itself.
            relevant, skipped = np.isin(order, positive), np.isin(order, junk)
            ranks = (np.arange(len(order)) - (np.cumsum(skipped) - skipped))[relevant]
            depths = [min(int(ranks.max()) + 1, kappa) for kappa in KAPPAS]
            precisions = [float((ranks < depth).sum() / depth) for depth in depths]
            rows.append([average_precision(ranks, len(positive)), *precisions])
        if rows:
            names = [f"mAP {difficulty}", *(f"mP@{kappa} {difficulty}" for kappa in KAPPAS)]
            means = 100 * np.mean(rows, axis=0)
            scores |= {name: float(mean) for name, mean in zip(names, means, strict=True)}
    return scores


# --- the evaluation ---------------------------------------------------------------------------


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] shrunk to at most `size` pixels a side in its proportions, never enlarged.

    Pillow's thumbnail with Lanczos, as published.
    """
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """uint8 [H, W, C] -> the part in `box`, rounded to pixels, as far as it lies in the image.

    Raises:
        ValueError: nothing of the image lies in the box.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = (round(value) for value in box)
    part = image[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    if not part.size:
        raise ValueError(f"the box {box} lies outside of the {width} x {height} pixels")
    return part


def describe_benchmark(
    backbone: Backbone,
    benchmark: Benchmark,
    size: int,
    scales: bool,
    crop_queries: bool,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Descriptors of length 1 of the set `[N, D]` and of the queries `[Q, D]`, where the network is.

    Args:
        size: longer side in pixels, at most.
        scales: average the class tokens of three scales.
        crop_queries: show the network the box of a query instead of the whole image.

    Raises:
        UsageError, RunFailed: as `Describer`; a box outside of its image.
    """
    channels = len(backbone.mean)
    pool = multi_scale if scales else class_token
    transform = EvalTransform.of(backbone, size)
    describer = Describer(backbone, pool, transform, 1, workers, precision, progress)
    queries = benchmark.queries

    def query(image: np.ndarray, index: int) -> np.ndarray:
        if crop_queries:
            try:
                image = crop(image, queries[index].box)
            except ValueError as error:
                raise UsageError(f"query {queries[index].name}: {error}") from None
        return shrink(image, size)

    database = describer(
        benchmark.source(list(benchmark.images), channels), lambda image, _: shrink(image, size)
    )
    asked = describer(benchmark.source([query.name for query in queries], channels), query)
    return F.normalize(database, dim=1), F.normalize(asked, dim=1)


def evaluate_retrieval(
    backbone: Backbone,
    benchmark: Benchmark,
    size: int = 224,
    scales: bool = False,
    crop_queries: bool = False,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Row:
    """mAP and precision at 1, 5 and 10 as an unsigned row of results; arguments as `describe_benchmark`.

    Raises:
        UsageError, RunFailed: as `describe_benchmark`; no query has a positive.
    """
    start = time.monotonic()
    database, queries = describe_benchmark(
        backbone, benchmark, size, scales, crop_queries, workers, precision, progress
    )
    ranking = torch.argsort(queries @ database.T, dim=1, descending=True, stable=True).numpy()
    metrics = score(ranking, benchmark.queries)
    if not metrics:
        raise UsageError(f"no query of {benchmark.name} has an easy or a hard positive")
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (backbone.mean, backbone.std))
    return Row(
        protocol="retrieval",
        settings={
            "size": size,
            "scales": ", ".join(f"{scale:.3g}" for scale in (SCALES if scales else (1.0,))),
            "queries": "cropped" if crop_queries else "whole",
        },
        top1=None,
        top5=None,
        data=benchmark.name,
        transform=f"longer side at most {size} (PIL Lanczos), mean ({mean}), std ({std}), "
        f"{precision}",
        train_size=len(benchmark.images),
        val_size=len(benchmark.queries),
        seconds=time.monotonic() - start,
        notes=[
            f"no query has a positive: {difficulty}"
            for difficulty in PROTOCOLS
            if f"mAP {difficulty}" not in metrics
        ],
        metrics=metrics,
    )
