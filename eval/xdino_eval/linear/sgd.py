"""Linear probes: how far a linear classifier on frozen features gets.

`sgd_probe` is the published protocol (DINO, section 3.2 and `eval_linear.py`): SGD on a new
augmentation of every image in every epoch. Two things differ. The reported figure is that of the
last epoch; the published script keeps the best epoch of the reported split. And one class token is
the feature, whatever the backbone (the published ViT-S joins four). `sgd_probe_features` is the
same without augmentation, on features extracted once.

Letters: N images, B images of a batch, D width, K classes, s side of a crop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from xdino.backbone import Backbone
from xdino.data.sources import Source, fingerprint
from xdino.errors import RunFailed, UsageError
from xdino.runtime import rng
from xdino_eval.features import Features, Progress, device_of, evaluating, extract
from xdino_eval.linear.probe import Probe, Trained, Trial, check
from xdino_eval.linear.probe_augment import AugmentedImages
from xdino_eval.linear.probe_state import Unfinished, UnfinishedOfAll
from xdino_eval.transform import EvalTransform

THREADS_PAY = 1e9  # multiplications in one product of features [B, D] and weights [D, K]
SECONDS_BETWEEN = 60.0  # at least, between two states kept of a probe on features, whose epochs fly


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

    def settings(self, augmentation: str) -> dict[str, object]:
        """What a results row says of it."""
        return {
            "epochs": self.epochs,
            "batch": self.batch_size,
            "lr": self.lr,
            "lr_rule": "x batch / 256, cosine per epoch",
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "augmentation": augmentation,
            "seed": self.seed,
            "reported": "last epoch",
        }


@dataclass(frozen=True)
class OverImages:
    """The frozen backbone and the labelled images of a probe, and how they are read.

    Training images are augmented at the transform's size, validation images go through the
    transform. The backbone is in evaluation mode throughout and comes back in its own.

    backbone: float32 [B, C, s, s] -> [B, D]; moved to `device` (None = where it is).
    keep_in: a folder for the state after each epoch; the same probe goes on from there.
    progress: told (epochs done, epochs). shared: the processes of a group take the batches in turn,
    and every one of them trains the same head.
    """

    backbone: Backbone
    train: Source
    val: Source
    transform: EvalTransform
    device: torch.device | str | None = None
    workers: int = 2
    precision: str = "fp32"
    keep_in: Path | str | None = None
    progress: Progress | None = None
    shared: bool = False

    @property
    def where(self) -> torch.device:
        return device_of(self.backbone) if self.device is None else torch.device(self.device)

    def labels(self) -> np.ndarray:
        """The labels of `train`. Raises UsageError where either split has none."""
        if self.train.labels is None or self.val.labels is None:
            bare = self.train if self.train.labels is None else self.val
            raise UsageError(f"{bare.name} has no labels to train a probe or to score it")
        return self.train.labels

    def look(
        self,
        network: nn.Module,
        source: Source,
        batch_size: int,
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> Features:
        """Features of a split's centre crops; this also moves the network."""
        return extract(
            network,
            source,
            self.transform,
            batch_size,
            self.where,
            self.workers,
            self.precision,
            indices,
            shared=self.shared,
        )

    def augmented(
        self, network: nn.Module, classes: np.ndarray, indices: np.ndarray, how: Sgd
    ) -> AugmentedImages:
        """The training images `indices`, augmented anew in every epoch."""
        return AugmentedImages(
            network,
            self.train,
            self.transform,
            classes,
            indices,
            how.batch_size,
            how.seed,
            self.where,
            self.workers,
            self.precision,
            self.shared,
        )

    def unfinished(self, *told: object) -> Unfinished | None:
        """Where the state of the probe that `told` describes is kept."""
        if self.keep_in is None:
            return None
        images = fingerprint(self.train), self.transform, self.precision
        kind = UnfinishedOfAll if self.shared else Unfinished
        return kind.of(self.keep_in, self.backbone, *images, *told)


def sgd_probe(images: OverImages, how: Sgd | None = None) -> Trained:
    """The published protocol: a linear head on the frozen backbone, augmented anew every epoch.

    `images.val` is read once, before the first epoch, and scored once, after the last. The same
    arguments give the same row on the same device.

    Raises:
        UsageError: a split without labels. RunFailed: nothing could be read, or a feature or the
            loss is not finite.
    """
    how = how or Sgd()
    trial = Trial("linear, SGD", images.labels())
    val = images.look(images.backbone, images.val, how.batch_size)
    head = new_head(val.features.shape[1], len(trial.classes), how.seed, images.where)
    everything = np.arange(len(images.train))
    views = images.augmented(images.backbone, trial.train_class, everything, how)
    unfinished = images.unfinished(how)
    with evaluating(images.backbone):
        start = train_head(head, views.batches, how, images.progress, unfinished)
    probe = probe_of(head, trial.classes)
    settings = how.settings(views.describe())
    return trial.end(probe, settings, views.trained_on(), val, continued(start), unfinished)


def sgd_probe_features(
    train: Features,
    val: Features,
    how: Sgd | None = None,
    device: torch.device | str = "cpu",
    keep_in: Path | str | None = None,
    progress: Progress | None = None,
) -> Trained:
    """`sgd_probe` on features extracted once: no augmentation, seconds instead of hours.

    Raises:
        UsageError: a split without labels, or splits of different widths. RunFailed: a feature or
            the loss is not finite.
    """
    how = how or Sgd()
    trial = Trial("linear, SGD on features", check(train, val))
    table, target = train.features.to(device), torch.from_numpy(trial.train_class).to(device)
    head = new_head(table.shape[1], len(trial.classes), how.seed, device)
    unfinished = Unfinished.of(keep_in, "sgd", train.features, target, how, seconds=SECONDS_BETWEEN)
    with small_products_alone(how.batch_size * head.weight.numel()):
        start = train_head(head, partial(shuffled, table, target, how), how, progress, unfinished)
    probe = probe_of(head, trial.classes)
    return trial.end(probe, how.settings("none"), train, val, continued(start), unfinished)


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
            if unfinished:
                unfinished.done()  # going on from there would end here again
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


def probe_of(head: nn.Linear, classes: np.ndarray, features: str = "class") -> Probe:
    """A trained head as something to keep and to score with."""
    return Probe(head.weight.detach(), head.bias.detach(), classes, features)


def shuffled(
    table: Tensor, target: Tensor, how: Sgd, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the rows of features [N, D] and classes [N], in the order of `epoch`."""
    order = torch.from_numpy(rng.probe_order(how.seed, epoch).permutation(len(table)))
    for rows in order.to(table.device).split(how.batch_size):
        yield table[rows], target[rows]


def continued(epoch: int) -> list[str]:
    """The note of a row whose probe went on from `epoch`."""
    return [f"went on from epoch {epoch}; seconds are of this part alone"] if epoch else []


def held_out(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: about `fraction` of the images, the same share of every class, at random.

    Every 1/fraction-th image of a shuffle that is sorted by class; classes may be of any size. A
    class is never held out whole: what no head was trained on cannot choose between them.

    Args:
        classes: int64 [N], in 0..K-1.
    """
    shuffled = rng.probe_held_out(seed).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    mask = np.zeros(len(classes), dtype=bool)
    mask[by_class[np.arange(0.5 / fraction, len(classes), 1 / fraction).astype(int)]] = True
    size = np.bincount(classes)
    whole = np.bincount(classes, weights=mask).astype(int) == size
    mask[whole[classes]] = False
    return mask


def small_products_alone(multiplications: float) -> threadpool_limits:
    """One thread for small products: they gain nothing from more.

    On a machine that others use they lose ten- to a hundredfold to threads that wait for another.
    """
    return threadpool_limits(1 if multiplications < THREADS_PAY else None)
