"""Linear probes: how far a linear classifier on frozen features gets.

`sgd_probe` is the published protocol (DINO, section 3.2 and `eval_linear.py`): SGD on a new
augmentation of every image in every epoch. Two things differ. The reported figure is that of the
last epoch; the published script keeps the best epoch of the reported split. And one class token is
the feature, whatever the backbone (the published ViT-S joins four). `sgd_probe_features` is the
same without augmentation, on features extracted once.

Letters: N images, B images of a batch, D width, K classes, s side of a crop.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from xdino.checkpoint import written_beside
from xdino.data import Source, fingerprint
from xdino.errors import RunFailed, UsageError
from xdino_eval.accuracy import class_indices, ranks, top1_top5
from xdino_eval.features import Features, Progress, device_of, evaluating, extract
from xdino_eval.knn import labels_of, row_of
from xdino_eval.results import Row
from xdino_eval.transform import EvalTransform
from xdino_eval.views import AugmentedImages, draw

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


@dataclass(frozen=True)
class Unfinished:
    """The file that a long probe leaves after every epoch, to go on from, and removes at its end.

    Its name follows from all that the probe depends on: another probe never takes it up.
    """

    path: Path

    @classmethod
    def of(
        cls, folder: Path | str | None, backbone: nn.Module, train: Source, *told: object
    ) -> "Unfinished | None":
        """The file in `folder` (None = nothing is kept) of the probe that `told` describes."""
        if folder is None:
            return None
        digest = hashlib.blake2b(repr((fingerprint(train), *told)).encode(), digest_size=8)
        for name, value in backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return cls(Path(folder) / f"linear-{digest.hexdigest()}.unfinished")

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How many epochs are done, and the tensors of that moment; (0, {}) without a file.

        Raises:
            RunFailed: the file is damaged.
        """
        if not self.path.exists():
            return 0, {}
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return int(file.metadata()["epoch"]), tensors
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise RunFailed(
                f"{self.path}, an unfinished probe, is damaged ({error}): delete it"
            ) from error

    def save(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        with written_beside(self.path) as beside:
            kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(kept, beside, {"epoch": str(epoch)})

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


def train_head(
    head: nn.Linear,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    how: Sgd,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
) -> int:
    """Train `head` in place on the (features [B, D], classes int64 [B]) that an epoch yields.

    Returns:
        The epoch that it began with, 0 unless it was `unfinished`.

    Raises:
        RunFailed: the loss is no longer finite.
    """
    optimizer = torch.optim.SGD(
        head.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay
    )
    start = 0
    if unfinished:
        start, kept = unfinished.load()
        for name, parameter in head.named_parameters():
            if start:
                parameter.data.copy_(kept[name])
                momentum = kept[f"{name}_momentum"].to(parameter.device)
                optimizer.state[parameter]["momentum_buffer"] = momentum
    for epoch in range(start, how.epochs):
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
        if unfinished and epoch + 1 < how.epochs:
            tensors: dict[str, Tensor] = dict(head.named_parameters())
            for name, parameter in head.named_parameters():
                momentum = optimizer.state[parameter].get("momentum_buffer")
                tensors[f"{name}_momentum"] = parameter * 0 if momentum is None else momentum
            unfinished.save(epoch + 1, tensors)
        if progress:
            progress(epoch + 1, how.epochs)
    return start


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
    keep_in: Path | str | None = None,
) -> Row:
    """The published protocol: a linear head on the frozen `backbone`, augmented anew every epoch.

    Training images go through `augment` at the transform's size, validation images through the
    transform; `val_source` is read once, after the last epoch. The backbone is in evaluation mode
    throughout. The same arguments give the same row on the same device.

    Args:
        backbone: float32 [B, C, s, s] -> [B, D]; moved to `device` (None = where it is).
        save_to: keeps the head as safetensors: weight [K, D], bias [K], classes int64 [K].
        keep_in: a folder for the state after each epoch; the same call goes on from there.

    Raises:
        UsageError: a split without labels. RunFailed: nothing could be read, or the loss is not
            finite.
    """
    how = how or Sgd()
    train_labels = both_labelled(train_source, val_source)
    began = time.perf_counter()
    device = device_of(backbone) if device is None else torch.device(device)
    val = extract(
        backbone, val_source, transform, how.batch_size, device, workers, precision
    )  # also moves the backbone
    classes, train_class, _ = class_indices(train_labels, np.empty(0, np.int64))
    head = new_head(val.features.shape[1], len(classes), how.seed, device)
    images = AugmentedImages(
        backbone,
        train_source,
        transform,
        train_class,
        np.arange(len(train_source)),
        how.batch_size,
        how.seed,
        device,
        workers,
        precision,
    )
    unfinished = Unfinished.of(keep_in, backbone, train_source, transform, how, precision)
    with evaluating(backbone):
        start = train_head(head, images.batches, how, progress, unfinished)
    train = images.trained_on()
    if save_to is not None:
        save_head(save_to, head, classes)
    settings = settings_of(how, images.describe())
    score = score_of(head, classes, val)
    if unfinished:
        unfinished.done()
    seconds = time.perf_counter() - began
    return row_of("linear, SGD", settings, score, train, val, seconds, continued(start))


def shuffled(
    table: Tensor, target: Tensor, how: Sgd, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the rows of features [N, D] and classes [N], in the order of `epoch`."""
    order = torch.from_numpy(draw(how.seed, epoch, 1).permutation(len(table)))
    for rows in order.to(table.device).split(how.batch_size):
        yield table[rows], target[rows]


def continued(epoch: int) -> list[str]:
    """The note of a row whose probe went on from `epoch`."""
    return [f"went on from epoch {epoch}; seconds are of this part alone"] if epoch else []


def both_labelled(train: Source, val: Source) -> np.ndarray:
    """The labels of `train`. Raises UsageError where either split has none."""
    if train.labels is None or val.labels is None:
        bare = train if train.labels is None else val
        raise UsageError(f"{bare.name} has no labels to train a probe or to score it")
    return train.labels


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
    with small_products_alone(how.batch_size * head.weight.numel()):
        train_head(head, partial(shuffled, table, target, how), how, progress)
    if save_to is not None:
        save_head(save_to, head, classes)
    score = score_of(head, classes, val)
    return row_of(
        "linear, SGD on features",
        settings_of(how, "none"),
        score,
        train,
        val,
        seconds=time.perf_counter() - began,
    )


def save_head(
    path: Path | str, head: nn.Linear, classes: np.ndarray, features: str = "class"
) -> None:
    """Write weight [K, D], bias [K] and the labels of the classes, int64 [K], as safetensors.

    The header says which `features` the head reads.
    """
    tensors = {name: value.detach().cpu() for name, value in head.named_parameters()}
    tensors["classes"] = torch.from_numpy(classes)
    with written_beside(Path(path)) as beside:
        save_file(tensors, beside, {"features": features})


def held_out(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: about `fraction` of the images, the same share of every class, at random.

    Every 1/fraction-th image of a shuffle that is sorted by class; classes may be of any size.
    """
    shuffled = draw(seed, 0, 1).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    mask = np.zeros(len(classes), dtype=bool)
    mask[by_class[np.arange(0.5 / fraction, len(classes), 1 / fraction).astype(int)]] = True
    return mask


def small_products_alone(multiplications: float) -> threadpool_limits:
    """One thread for small products: they gain nothing from more.

    On a machine that others use they lose ten- to a hundredfold to threads that wait for another.
    """
    return threadpool_limits(1 if multiplications < THREADS_PAY else None)


def score_of(head: nn.Linear, classes: np.ndarray, val: Features) -> tuple[float, float]:
    """Top-1 and top-5 in per cent of `head` on `val`, for classes numbered as in training."""
    _, _, target = class_indices(classes, labels_of(val).numpy())
    with torch.no_grad():
        scores = head(val.features.to(head.weight.device)).cpu()
    return top1_top5(ranks(scores, torch.from_numpy(target)))


def settings_of(how: Sgd, augmentation: str) -> dict[str, object]:
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
