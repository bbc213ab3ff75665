"""How good features are, measured without a label: how many directions they use, and for what.

Three numbers, each from its paper. RankMe counts the directions that features use. LiDAR counts
those that tell images from their own augmented views, so noise that a view adds does not count.
The standard deviation of features on the unit sphere is zero where a network says the same of every
image. None of them is an accuracy: compare them between checkpoints of one kind, measured alike.

Letters: N images, B of a batch, q views of each, D width of a feature, C channels, s side of a crop.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdino import augment, config, data
from xdino.augment.photometric import photometric
from xdino.checkpoint import BACKBONE_FILE, load_backbone
from xdino.config import Crops
from xdino.data.loader import epoch_order
from xdino.data.sources import Source
from xdino.errors import RunFailed
from xdino.plan import photometric_of
from xdino.run_directory import CONFIG_FILE
from xdino.runtime import transfer
from xdino.runtime.atomic import write_text
from xdino.runtime.device import resolve_device
from xdino_eval import results
from xdino_eval.features import (
    Batch,
    Progress,
    autocast,
    device_of,
    evaluating,
    extract,
    in_turn,
    read_batches,
)
from xdino_eval.transform import EvalTransform, Judged

EPSILON = 1e-7  # RankMe's, for features in float32
DELTA = 1e-4  # keeps the within-image covariance invertible
FILE = "quality.json"
MEASURES = ("rankme", "lidar", "feature_std")

# Below these shares of what is possible an alarm is raised. They are ours, not the papers': an
# orientation, set where a network has lost nearly everything, not where one is merely worse.
FLAT = 0.1  # of the standard deviation 1 / sqrt(D) of evenly spread features
NARROW = 0.05  # of the highest rank that so many images and dimensions allow


# --- the measures, on features ----------------------------------------------------------------


def rankme(features: Tensor, epsilon: float = EPSILON) -> float:
    """The effective rank of features.

    RankMe (Garrido et al. 2023, https://arxiv.org/abs/2210.02885, equation 1), with sigma_k the
    singular values of the matrix of features Z, not centred:

        RankMe(Z) = exp(-sum_k p_k log p_k),    p_k = sigma_k(Z) / ||sigma(Z)||_1 + epsilon

    r equal singular values give r, features that are all the same give 1, and none exceeds
    min(N, D). The paper takes 25,600 images; fewer than D cannot show D directions.

    Args:
        features: float [N, D], as the network gave them.

    Returns:
        From 1 to min(N, D), but for `epsilon`; 0 where every feature is zero.
    """
    return _effective_rank(torch.linalg.svdvals(_matrix(features, 2).double()), epsilon)


def lidar(features: Tensor, delta: float = DELTA, epsilon: float = EPSILON) -> float:
    """The effective rank of what tells images from their own views.

    LiDAR (Thilak et al. 2023, https://arxiv.org/abs/2312.04000, section 4): every image is a class,
    its augmented views are the members, mu_i is the mean of image i and mu that of all. With

        Sigma_b = E_i (mu_i - mu)(mu_i - mu)^T
        Sigma_w = E_i E_j (z_ij - mu_i)(z_ij - mu_i)^T + delta I
        lambda  = eigenvalues of Sigma_w^(-1/2) Sigma_b Sigma_w^(-1/2)

        LiDAR = exp(-sum_k p_k log p_k),    p_k = lambda_k / ||lambda||_1 + epsilon

    The paper takes 1,000 images with 50 views; N images show at most N - 1 directions. With
    Sigma_w = L L^T the eigenvalues are those of L^-1 Sigma_b L^-T, which is what is computed.

    Args:
        features: float [N, q, D], q views of each image.
        delta: in the features' own units squared, so it matters where features are tiny.

    Returns:
        From 1 to min(N - 1, D), but for `epsilon`; 0 where all images have the same mean.
    """
    z = _matrix(features, 3).double()
    N, q, D = z.shape
    if N < 2 or q < 2:
        raise ValueError(f"LiDAR needs 2 images with 2 views of each, got {N} with {q}")
    means = z.mean(1)  # [N, D]
    between = means - means.mean(0)
    within = (z - means[:, None]).flatten(0, 1)  # [N * q, D]
    # Means of equal views differ by rounding; without views to divide by, that would look like rank.
    if between.abs().max() <= 1e-12 * z.abs().max():
        return 0.0
    sigma_b = between.T @ between / N
    sigma_w = within.T @ within / (N * q) + delta * torch.eye(D, dtype=z.dtype, device=z.device)
    L = torch.linalg.cholesky(sigma_w)
    half = torch.linalg.solve_triangular(L, sigma_b, upper=False)  # L^-1 Sigma_b
    whitened = torch.linalg.solve_triangular(L, half.T, upper=False)
    eigenvalues = torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp_min(0)
    return _effective_rank(eigenvalues, epsilon)


def feature_std(features: Tensor) -> float:
    """The standard deviation of features on the unit sphere, the mean over dimensions.

    SimSiam's measure of collapse (Chen & He 2021, https://arxiv.org/abs/2011.10566, section 4.1):

        std = mean_d std_i (z_i / ||z_i||_2)_d

    Features spread evenly over the sphere give 1 / sqrt(D); the same feature for every image, 0.

    Args:
        features: float [N, D].
    """
    unit = F.normalize(_matrix(features, 2).double(), dim=1)
    return unit.std(0, correction=0).mean().item()


def alarms(
    rankme: float, lidar: float, feature_std: float, images: int, lidar_images: int, dim: int
) -> list[str]:
    """What the numbers warn of, a sentence each; empty where nothing looks lost.

    Args:
        images: that RankMe and the standard deviation were measured on; `lidar_images` for LiDAR.
        dim: the features' width D.
    """
    found = []
    even, most, most_lidar = 1 / math.sqrt(dim), min(images, dim), min(lidar_images - 1, dim)
    if feature_std < FLAT * even:
        found.append(
            f"every image has nearly the same feature: their standard deviation is {feature_std:.2g}"
            f" where evenly spread ones have {even:.2g}. Collapse, or one direction common to all"
        )
    if rankme < NARROW * most:
        found.append(
            f"RankMe is {rankme:.3g} of {most} possible: the features use few of their dimensions"
        )
    if lidar < NARROW * most_lidar:
        found.append(
            f"LiDAR is {lidar:.3g} of {most_lidar} possible: few directions tell images from "
            "their own views"
        )
    few = [name for name, n in (("RankMe", images), ("LiDAR", lidar_images - 1)) if n < dim]
    if few:
        found.append(
            f"too few images for the {dim} dimensions of the features: "
            f"{' and '.join(few)} cannot reach that, so compare with equal numbers only"
        )
    return found


def _effective_rank(spectrum: Tensor, epsilon: float) -> float:
    """exp of the entropy of a spectrum, float [K], none negative."""
    total = spectrum.sum()
    if total == 0:
        return 0.0
    p = spectrum / total + epsilon
    return (-(p * p.log()).sum()).exp().item()


def _matrix(features: Tensor, dimensions: int) -> Tensor:
    if features.ndim != dimensions or not features.numel():
        raise ValueError(f"features need {dimensions} dimensions, got {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite")
    return features


# --- from a network and images to the measures ------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """The measures of one set of weights, and how they were taken. Origin as in `results.Row`."""

    rankme: float
    lidar: float
    feature_std: float
    settings: dict[str, Any]
    alarms: list[str]
    data: str
    transform: str
    checkpoint: str = ""
    features: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


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
    backbone: nn.Module,
    source: Source,
    views: augment.MultiCrop,
    indices: np.ndarray,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Tensor:
    """The features of augmented views: float32 [N, q, D] of the images that could be read.

    The views of an image follow from (seed, index) alone, as in pretraining.

    Args:
        views: q views of one size.
        indices: places in the source, int64.
        batch_size: views that go through the network at a time, at least one image's.
    """
    q, size, device = len(views.views), views.views[0].size, device_of(backbone)

    def crop(image: np.ndarray, index: int) -> np.ndarray:
        table = augment.draw(views, seed, 0, index)
        found = augment.boxes(table, image.shape[0], image.shape[1], views.ratio)
        return np.stack([augment.crop(image, box, size) for box in found])  # [q, s, s, C]

    out, done = [], 0
    batches = read_batches(source, crop, indices, max(1, batch_size // q), workers, device)

    def look(batch: Batch) -> Tensor:
        table = augment.draw_batch(views, seed, 0, batch.indices).T.reshape(-1)  # [B * q]
        pixels = transfer.to_device(batch.images, device).flatten(0, 1)
        return backbone(photometric(pixels, table, views))

    with evaluating(backbone), torch.inference_mode(), autocast(device, precision):
        for batch, features in in_turn(batches, look):
            done += len(batch.indices) + len(batch.skipped)
            if len(features):
                out.append(features.unflatten(0, (-1, q)))
            if progress:
                progress(done, len(indices))
    if not out:
        raise RunFailed(f"no image of {source.name} could be read")
    return torch.cat(out)


def measure(
    backbone: nn.Module,
    source: Source,
    crops: Crops,
    limit: int = 25_600,
    lidar_images: int = 1_000,
    views: int = 50,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 2,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Quality:
    """The three measures of `backbone` on images without labels; the numbers are the papers'.

    Args:
        crops: the global crops that LiDAR's views are drawn by.
        limit: images at most, the same ones for one seed; LiDAR takes `lidar_images` of them.
        views: of each image, for LiDAR.

    Raises:
        RunFailed: no image could be read, or a feature is not finite.
        ValueError: fewer than 2 images or views.
    """
    began = time.perf_counter()
    network = cast(Judged, backbone)
    chosen = epoch_order(len(source), seed, 0)[:limit]
    transform = EvalTransform.of(network)
    found = extract(
        backbone, source, transform, batch_size, None, workers, precision, np.sort(chosen), progress
    )
    multi = global_views(crops, views, network.mean, network.std)
    several = view_features(
        backbone, source, multi, np.sort(chosen[:lidar_images]),
        seed, batch_size, workers, precision, progress,
    )  # fmt: skip
    if not several.isfinite().all():
        raise RunFailed(f"features of augmented views of {source.name} are not finite")
    N, D = found.features.shape
    rank, told, spread = rankme(found.features), lidar(several), feature_std(found.features)
    warned = alarms(rank, told, spread, images=N, lidar_images=len(several), dim=D)
    return Quality(
        rankme=float(f"{rank:.6g}"),
        lidar=float(f"{told:.6g}"),
        feature_std=float(f"{spread:.6g}"),
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
        alarms=warned,
        data=found.data,
        transform=found.transform,
        seconds=round(time.perf_counter() - began, 3),
        notes=[f"{len(found.skipped)} images could not be read"] if found.skipped else [],
    )


def judge(
    weights: str,
    data_name: str,
    split: str = "train",
    out: Path | None = None,
    arch: str | None = None,
    role: str = "teacher",
    device: str = "auto",
    tell: Callable[[Quality], None] = lambda quality: None,
    **how: Any,
) -> Quality:
    """The measures of a weights file or a run, added to the run's quality.json or to `out`.

    LiDAR's views are the global crops of the run that the weights lie in, or, where there is none,
    the published ones at the network's size.

    Args:
        tell: gets the measures before they are written, which may fail.
        how: the rest goes to `measure`.

    Raises:
        UsageError, RunFailed: as `load_backbone`, `open_source` and `measure`.
    """
    backbone = load_backbone(weights, arch, role)
    source = data.open_source(data_name, split, channels=cast(int, backbone.in_chans))
    backbone.to(resolve_device(device))
    crops = _crops_of_run(Path(weights))
    if crops is None:
        crops = replace(Crops(), global_size=cast(int, backbone.input_size))
    facts = cast(dict[str, Any], backbone.weights)
    quality = replace(
        measure(backbone, source, crops, **how),
        checkpoint=facts["sha256"],
        features=results.features_name(facts),
    )
    tell(quality)
    if out is None and Path(weights).is_dir():
        out = Path(weights) / FILE
    if out is not None:
        append(out, quality)
    return quality


def _crops_of_run(weights: Path) -> Crops | None:
    """The crops of RUN for RUN itself, RUN/backbone.safetensors and RUN/checkpoints/FILE."""
    for folder in (weights, weights.parent, weights.parent.parent):
        if (folder / CONFIG_FILE).is_file() and (folder / BACKBONE_FILE).is_file():
            return config.load(str(folder / CONFIG_FILE)).crops
    return None


def load(path: Path) -> list[dict[str, Any]]:
    """The entries of a quality.json; none if there is no such file.

    Raises:
        RunFailed: the file is damaged, cannot be read, or holds something else.
    """
    try:
        found = results.entries(path)
    except ValueError as error:
        raise RunFailed(f"{path} is damaged ({error}): move it away, or mend it by hand") from error
    for entry in found:
        told = [entry.get(name) for name in MEASURES] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, int | float) for value in told):
            raise RunFailed(f"{path} does not hold measures of quality: move it away")
    return found


def append(path: Path, quality: Quality) -> None:
    """Add one entry to the file at `path`, making it if need be; see `results.append`."""
    with results.locked(path):
        write_text(path, results.as_json([*load(path), asdict(quality)]))
