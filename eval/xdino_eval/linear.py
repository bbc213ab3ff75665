"""Linear probes: how far a linear classifier on frozen features gets.

`sgd_probe` is the published protocol (DINO, section 3.2 and `eval_linear.py`): SGD on a new
augmentation of every image in every epoch. Two things differ. The reported figure is that of the
last epoch; the published script keeps the best epoch of the reported split. And one class token is
the feature, whatever the backbone (the published ViT-S joins four). `sgd_probe_features` is the
same without augmentation, on features extracted once. `logistic_probe` is the newer practice
(DINOv2, https://arxiv.org/abs/2304.07193, appendix B.3): L2-regularised logistic regression, its
strength chosen on images held out of the training split.

Letters: N images, B images of a batch, D width, K classes, s side of a crop.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from xdino.data import Source
from xdino.errors import RunFailed, UsageError, nearest
from xdino_eval.accuracy import class_indices, ranks, top1_top5
from xdino_eval.features import (
    Features,
    Progress,
    autocast,
    device_of,
    evaluating,
    extract,
    read_batches,
)
from xdino_eval.knn import labels_of, row_of
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform, resample

GRIDS = {
    "default": tuple(10.0 ** np.linspace(-4, 2, 7)),
    "dino": tuple(10.0 ** np.linspace(-6, 5, 45)),
}
"""Inverse strengths of the regularisation. "dino" is DINOv2's; the other takes a sixth of it."""

MAX_ITER = 1000  # of L-BFGS
THREADS_PAY = 1e9  # multiplications in one product of features [B, D] and weights [D, K]


@dataclass(frozen=True)
class Sgd:
    """How the SGD probe is trained; the defaults are the published ones.

    lr is for a batch of 256 and scaled with the batch; it follows a cosine to 0, epoch by epoch.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(f"epochs, batch_size and lr must be positive, got {self}")

    def lr_at(self, epoch: int) -> float:
        """The learning rate of `epoch` = 0, 1, ..."""
        peak = self.lr * self.batch_size / 256
        return peak * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


def crop_parameters(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of a RandomResizedCrop with torchvision's defaults.

    8 to 100 % of the area and an aspect of 3/4 to 4/3, uniform in its logarithm; ten tries, then
    the largest central crop of an allowed aspect.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def augment(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [s, s, C]: a random resized crop (PIL bilinear), flipped or not."""
    box = crop_parameters(image.shape[0], image.shape[1], rng)
    crop = resample(image, (size, size), Image.Resampling.BILINEAR, box)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def draw(seed: int, epoch: int, stream: int, index: int = 0) -> np.random.Generator:
    """The random numbers of one image in one epoch (stream 0), or of an epoch's order (stream 1).

    Counter-based: what an image gets depends on nothing that was drawn before it.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, index]))


def train_head(
    head: nn.Linear,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    how: Sgd,
    progress: Progress | None = None,
) -> None:
    """Train `head` in place on the (features [B, D], classes int64 [B]) that an epoch yields.

    Raises:
        RunFailed: the loss is no longer finite.
    """
    optimizer = torch.optim.SGD(
        head.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay
    )
    for epoch in range(how.epochs):
        optimizer.param_groups[0]["lr"] = how.lr_at(epoch)
        total = torch.zeros((), device=head.weight.device)
        for features, target in batches(epoch):
            loss = F.cross_entropy(head(features), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if not total.isfinite():
            raise RunFailed(f"the probe's loss is not finite in epoch {epoch}; lower its lr")
        if progress:
            progress(epoch + 1, how.epochs)


def new_head(width: int, classes: int, seed: int, device: torch.device | str) -> nn.Linear:
    """Linear(width -> classes), weights from N(0, 0.01), no bias to begin with."""
    head = nn.utils.skip_init(nn.Linear, width, classes)
    with torch.no_grad():
        head.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head.to(device)


def sgd_probe(
    backbone: nn.Module,
    train_source: Source,
    val_source: Source,
    transform: EvalTransform,
    how: Sgd | None = None,
    device: torch.device | str | None = None,
    workers: int = 2,
    precision: str = "fp32",
    save_to: Path | str | None = None,
    progress: Progress | None = None,
) -> Row:
    """The published protocol: a linear head on the frozen `backbone`, augmented anew every epoch.

    Training images go through `augment` at the transform's size, validation images through the
    transform; `val_source` is read once, after the last epoch. The backbone is in evaluation mode
    throughout. The same arguments give the same row on the same device.

    Args:
        backbone: float32 [B, C, s, s] -> [B, D]; moved to `device` (None = where it is).
        save_to: keeps the head as safetensors: weight [K, D], bias [K], classes int64 [K].

    Raises:
        UsageError: a split without labels. RunFailed: nothing could be read, or the loss is not
            finite.
    """
    how = how or Sgd()
    if train_source.labels is None or val_source.labels is None:
        bare = train_source if train_source.labels is None else val_source
        raise UsageError(f"{bare.name} has no labels to train a probe or to score it")
    began = time.perf_counter()
    device = device_of(backbone) if device is None else torch.device(device)
    val = extract(
        backbone, val_source, transform, how.batch_size, device, workers, precision
    )  # also moves the backbone
    classes, train_class, _ = class_indices(train_source.labels, np.empty(0, np.int64))
    head = new_head(val.features.shape[1], len(classes), how.seed, device)
    unreadable: set[int] = set()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        def crop(image: np.ndarray, index: int) -> np.ndarray:
            return augment(image, transform.size, draw(how.seed, epoch, 0, index))

        order = draw(how.seed, epoch, 1).permutation(len(train_source))
        for batch in read_batches(train_source, crop, order, how.batch_size, workers):
            unreadable.update(index for index, _ in batch.skipped)
            if not len(batch.indices):
                continue
            with torch.no_grad(), autocast(device, precision):
                features = backbone(transform.normalise(batch.images.to(device)))
            target = torch.from_numpy(train_class[batch.indices])
            yield features.float(), target.to(device)

    with evaluating(backbone):
        train_head(head, batches, how, progress)
    if save_to is not None:
        save_head(save_to, head, classes)
    read = len(train_source) - len(unreadable)
    if not read:
        raise RunFailed(f"no image of {train_source.name} could be read")
    train = Features(
        features=torch.empty(read, 0),
        labels=None,
        indices=torch.empty(0, dtype=torch.int64),
        skipped=[(train_source.describe(index), "") for index in sorted(unreadable)],
        data=train_source.name,
        transform="",
    )
    settings = _settings(how, f"RandomResizedCrop({transform.size}, bilinear) + flip")
    score = _score(head, classes, val)
    return row_of("linear, SGD", settings, score, train, val, seconds=time.perf_counter() - began)


def sgd_probe_features(
    train: Features,
    val: Features,
    how: Sgd | None = None,
    device: torch.device | str = "cpu",
    save_to: Path | str | None = None,
    progress: Progress | None = None,
) -> Row:
    """`sgd_probe` on features extracted once: no augmentation, seconds instead of hours.

    Raises:
        UsageError: a split without labels. RunFailed: the loss is not finite.
    """
    how = how or Sgd()
    began = time.perf_counter()
    classes, train_class, _ = class_indices(labels_of(train).numpy(), labels_of(val).numpy())
    table, target = train.features.to(device), torch.from_numpy(train_class).to(device)
    head = new_head(table.shape[1], len(classes), how.seed, device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(draw(how.seed, epoch, 1).permutation(len(table)))
        for rows in order.to(device).split(how.batch_size):
            yield table[rows], target[rows]

    with _threads(how.batch_size * head.weight.numel()):
        train_head(head, batches, how, progress)
    if save_to is not None:
        save_head(save_to, head, classes)
    score = _score(head, classes, val)
    return row_of(
        "linear, SGD on features",
        _settings(how, "none"),
        score,
        train,
        val,
        seconds=time.perf_counter() - began,
    )


def save_head(path: Path | str, head: nn.Linear, classes: np.ndarray) -> None:
    """Write weight [K, D], bias [K] and the labels of the classes, int64 [K], as safetensors."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu() for name, value in head.named_parameters()}
    save_file({**tensors, "classes": torch.from_numpy(classes)}, path)


def logistic_probe(
    train: Features,
    val: Features,
    cs: str | Sequence[float] = "default",
    holdout: float = 0.1,
    seed: int = 0,
) -> Row:
    """Logistic regression; C from a held-out part of `train`; `val` is scored once, at the end.

    Features are standardised by the mean and standard deviation of `train` (without it L-BFGS
    takes many times the iterations), and the chosen C, the smallest of equals, is fitted again on
    all of `train`.

    Args:
        cs: inverse strengths of the regularisation, or a name in `GRIDS`.
        holdout: the fraction of `train` that chooses among them, taken evenly from every class.

    Raises:
        UsageError: a split without labels, fewer than two classes, or a grid or a fraction that
            makes no sense.
    """
    began = time.perf_counter()
    grid = _grid(cs)
    if not 0 < holdout < 1:
        raise UsageError(f"holdout must lie between 0 and 1, got {holdout}")
    classes, train_class, val_class = class_indices(
        labels_of(train).numpy(), labels_of(val).numpy()
    )
    if len(classes) < 2:
        raise UsageError(f"{train.data} has one class only: there is nothing to tell apart")
    mean, std = train.features.mean(0), train.features.std(0)
    std = torch.where(std > 0, std, 1.0)
    x_train = ((train.features - mean) / std).numpy()
    x_val = ((val.features - mean) / std).numpy()

    held = held_out(train_class, holdout, seed)
    notes: list[str] = []
    chosen, held_top1 = grid[0], None
    if len(grid) > 1:
        models = _fits(x_train[~held], train_class[~held], grid, notes)
        scores = [_logistic_score(m, x_train[held], train_class[held])[0] for m in models]
        chosen, held_top1 = grid[int(np.argmax(scores))], round(max(scores), 4)
        if chosen in (grid[0], grid[-1]):
            notes.append(f"C = {chosen:g} is an end of the grid")
    (model,) = _fits(x_train, train_class, [chosen], notes)
    score = _logistic_score(model, x_val, val_class)
    settings = {
        "C": chosen,
        "cs": list(grid),
        "holdout": holdout,
        "holdout_top1": held_top1,
        "features": "standardised by train mean and standard deviation",
        "solver": f"lbfgs, at most {MAX_ITER} iterations",
        "seed": seed,
    }
    seconds = time.perf_counter() - began
    return row_of("linear, logistic regression", settings, score, train, val, seconds, notes)


def held_out(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: about `fraction` of the images, the same share of every class, at random.

    Every 1/fraction-th image of a shuffle that is sorted by class; classes may be of any size.
    """
    shuffled = draw(seed, 0, 1).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    mask = np.zeros(len(classes), dtype=bool)
    mask[by_class[np.arange(0.5 / fraction, len(classes), 1 / fraction).astype(int)]] = True
    return mask


def _grid(cs: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(cs, str) and cs not in GRIDS:
        raise UsageError(f'no grid "{cs}"; {nearest(cs, GRIDS)}')
    grid = tuple(sorted(float(c) for c in (GRIDS[cs] if isinstance(cs, str) else cs)))
    if not grid or not grid[0] > 0:
        raise UsageError(f"C must be positive, got {list(grid)}")
    return grid


def _threads(multiplications: float) -> threadpool_limits:
    """One thread for small products: they gain nothing from more.

    On a machine that others use they lose ten- to a hundredfold to threads that wait for another.
    """
    return threadpool_limits(1 if multiplications < THREADS_PAY else None)


def _fits(
    x: np.ndarray, y: np.ndarray, grid: Sequence[float], notes: list[str]
) -> list[LogisticRegression]:
    """One model a value of C, small ones side by side; those that did not converge are noted."""
    multiplications = x.size * (int(y.max()) + 1)
    workers = os.cpu_count() if multiplications < THREADS_PAY else 1
    models = [LogisticRegression(C=c, max_iter=MAX_ITER) for c in grid]
    with (
        warnings.catch_warnings(),
        _threads(multiplications),
        ThreadPoolExecutor(workers) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        list(pool.map(lambda model: model.fit(x, y), models))
    notes += [
        f"C = {model.C:g}: not converged after {MAX_ITER} iterations"
        for model in models
        if model.n_iter_.max() >= MAX_ITER
    ]
    return models


def _logistic_score(
    model: LogisticRegression, x: np.ndarray, target: np.ndarray
) -> tuple[float, float]:
    logits = model.decision_function(x)  # [N, K]; of two classes, [N] for the second
    if logits.ndim == 1:
        logits = np.stack([np.zeros_like(logits), logits], axis=1)
    # A class that the fit never saw, because all of it is held out, is never a prediction.
    scores = np.full((len(x), int(max(model.classes_.max(), target.max())) + 1), -np.inf)
    scores[:, model.classes_] = logits
    return top1_top5(ranks(torch.from_numpy(scores), torch.from_numpy(target)))


def _score(head: nn.Linear, classes: np.ndarray, val: Features) -> tuple[float, float]:
    """Top-1 and top-5 in per cent of `head` on `val`, for classes numbered as in training."""
    _, _, target = class_indices(classes, labels_of(val).numpy())
    with torch.no_grad():
        scores = head(val.features.to(head.weight.device)).cpu()
    return top1_top5(ranks(scores, torch.from_numpy(target)))


def _settings(how: Sgd, augmentation: str) -> dict[str, object]:
    return {
        "epochs": how.epochs,
        "batch": how.batch_size,
        "lr": how.lr,
        "lr_rule": "x batch / 256, cosine per epoch",
        "momentum": how.momentum,
        "weight_decay": how.weight_decay,
        "augmentation": augmentation,
        "seed": how.seed,
        "reported": "last epoch",
    }
