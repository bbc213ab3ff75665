"""From a network and images, without labels, to a row of results with the measures of quality.

Letters: N images, B of a batch, q views of each, D width of a feature, s side of a crop.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xdino import augment
from xdino.augment.photometric import photometric
from xdino.backbone import Backbone
from xdino.config import Crops
from xdino.data.loader import epoch_order
from xdino.data.sources import Source
from xdino.errors import RunFailed
from xdino.plan import photometric_of
from xdino.runtime import transfer, turns
from xdino_eval import results
from xdino_eval.extraction import Options
from xdino_eval.features import (
    NOTHING,
    Batch,
    autocast,
    device_of,
    evaluating,
    in_turn,
    read_batches,
)
from xdino_eval.quality.alarms import alarms
from xdino_eval.quality.measures import DELTA, agreement, feature_std, lidar, rankme
from xdino_eval.results import Row

PROTOCOL = "quality without labels"
MEASURES = ("rankme", "lidar", "feature_std", "agreement")
IMAGES = 25_600  # RankMe's paper


def global_views(
    crops: Crops, views: int, mean: Sequence[float], std: Sequence[float]
) -> augment.MultiCrop:
    """`views` global crops an image, the two published kinds in turn."""
    kinds = [place % 2 for place in range(views)]
    return augment.multi_crop(
        crops.global_size,
        crops.global_scale,
        local_count=0,
        global_blur=tuple(crops.global_blur[kind] for kind in kinds),
        global_solarize=tuple(crops.global_solarize[kind] for kind in kinds),
        **photometric_of(crops),
        mean=tuple(mean),
        std=tuple(std),
    )


def view_features(
    backbone: Backbone,
    source: Source,
    views: augment.MultiCrop,
    indices: np.ndarray,
    options: Options,
    seed: int = 0,
) -> Tensor:
    """The features of augmented views: float32 [N, q, D] of the images that could be read.

    The views of an image follow from (seed, index) alone, as in pretraining. At least one image's
    views go through the network at a time, whatever the batch size.

    Args:
        views: q views of one size.
        indices: places in the source, int64.
    """
    q, size = len(views.views), views.views[0].size
    device = options.device or device_of(backbone)
    progress = options.counter("features of views")

    def crop(image: np.ndarray, index: int) -> np.ndarray:
        table = augment.draw(views, seed, 0, index)
        found = augment.boxes(table, image.shape[0], image.shape[1], views.ratio)
        return np.stack([augment.crop(image, box, size) for box in found])  # [q, s, s, C]

    def look(batch: Batch) -> Tensor:
        table = augment.draw_batch(views, seed, 0, batch.indices).T.reshape(-1)  # [B * q]
        pixels = transfer.to_device(batch.images, device).flatten(0, 1)
        return backbone(photometric(pixels, table, views))

    out, done, step = [], 0, max(1, options.batch_size // q)
    own = turns.mine(indices, step) if options.shared else indices
    batches = read_batches(source, crop, own, step, options.workers, device)
    with evaluating(backbone), torch.inference_mode(), autocast(device, options.precision):
        looked_at = in_turn(batches, look)
        if options.shared:
            bare = ((replace(batch, images=NOTHING), found) for batch, found in looked_at)
            answers = turns.of_all(bare, -(-len(indices) // step))
        else:
            answers = looked_at
        for batch, features in answers:
            done += len(batch.indices) + len(batch.skipped)
            if len(features):
                out.append(features.unflatten(0, (-1, q)))
            if progress:
                progress(done, len(indices))
    if not out:
        raise RunFailed(f"no image of {source.name} could be read")
    found = torch.cat(out)
    if not found.isfinite().all():
        raise RunFailed(f"features of augmented views of {source.name} are not finite")
    return found


def evaluate(
    backbone: Backbone,
    source: Source,
    options: Options,
    crops: Crops | None = None,
    lidar_images: int = 1_000,
    views: int = 50,
    seed: int = 0,
) -> Row:
    """The four measures on images without labels, a row not signed yet; the numbers are the papers'.

    Args:
        options: `limit` images at most (None: RankMe's 25,600), the same ones for one seed.
        crops: whose global crops LiDAR's views are drawn by; None = the published ones at the
            backbone's own size.
        lidar_images: for LiDAR, with so many `views` of each, the first two for agreement.

    Raises:
        RunFailed: no image could be read, or a feature is not finite.
        ValueError: fewer than 2 images or views.
    """
    began = time.perf_counter()
    crops = crops or replace(Crops(), global_size=backbone.input_size)
    chosen = epoch_order(len(source), seed, 0)[: options.limit or IMAGES]
    part = f"{len(chosen)} images by seed {seed}"
    found = options.features_of(backbone, "the images", source, np.sort(chosen), part)
    multi = global_views(crops, views, backbone.mean, backbone.std)
    several = view_features(backbone, source, multi, np.sort(chosen[:lidar_images]), options, seed)
    N, D = found.features.shape
    told = {
        "rankme": rankme(found.features),
        "lidar": lidar(several),
        "feature_std": feature_std(found.features),
    }
    notes = alarms(**told, images=N, lidar_images=len(several), dim=D)
    notes += [f"{len(found.skipped)} images could not be read"] if found.skipped else []
    told["agreement"] = agreement(several)
    return Row(
        protocol=PROTOCOL,
        settings={
            "images": N,
            "embed_dim": D,
            "lidar_images": len(several),
            "views": views,
            "view_size": crops.global_size,
            "view_scale": list(crops.global_scale),
            "delta": DELTA,
            "seed": seed,
        },
        top1=None,
        top5=None,
        data=found.data,
        transform=found.transform,
        train_size=N,
        val_size=0,
        seconds=round(time.perf_counter() - began, 3),
        notes=notes,
        metrics={name: float(f"{value:.6g}") for name, value in told.items()},
    )


def rows_of(run: Path) -> list[Row]:
    """The measures of quality among the results of a run; none without any.

    Raises:
        RunFailed: as `results.load`.
    """
    return [row for row in results.load(run / "results.json") if row.protocol == PROTOCOL]
