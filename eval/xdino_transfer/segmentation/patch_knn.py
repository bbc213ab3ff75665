"""How much of a segmentation frozen patch tokens hold, without any training: k-NN over patches.

Every patch of the training pictures is kept with the shares of classes among its pixels. A patch of
another picture asks for its nearest ones by cosine similarity; their shares, weighted by
exp(similarity / temperature), are its own, and pixels take theirs from the four patches around them
(dense nearest neighbours as in Hummingbird, arXiv 2306.01667, but exact and with the pictures as
they are). With `shots` it learns from that few pictures, in several draws.

Letters: N patches of a picture, M of the bank, K classes, D width, (h, w) patch grid, H x W pixels.
"""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from xdino.backbone import Backbone, evaluating
from xdino.data.decode import UnreadableImage
from xdino.errors import RunFailed, UsageError
from xdino.runtime import rng
from xdino_eval.knn.search import nearest_neighbours
from xdino_eval.results import Row, signed
from xdino_transfer.segmentation.confusion import ConfusionMatrix, Scores
from xdino_transfer.segmentation.losses import VOID
from xdino_transfer.segmentation.maps import Maps

PROTOCOL = "dense k-NN"
_STRIP = 1 << 24  # numbers of a strip of pixels' votes
_UNREADABLE = (UnreadableImage, OSError)


@dataclass(frozen=True)
class Patches:
    """Of one picture: unit tokens float32 [N, D] on their grid, and where it lies in the picture.

    scale: patches a pixel of the original, down and across. start: of the first patch, in patches
    from the picture's edge.
    """

    tokens: np.ndarray
    grid: tuple[int, int]
    scale: tuple[float, float]
    start: float

    def places(self, axis: int, side: int) -> np.ndarray:
        """Where the centres of `side` pixels lie on the grid: patch i reaches from i to i + 1."""
        return (np.arange(side) + 0.5) * self.scale[axis] - self.start

    def shares(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Shares of classes among the labelled pixels of each patch, float32 [N, K]; 0 without any."""
        h, w = self.grid
        rows, columns = (
            np.clip(np.floor(self.places(axis, side)).astype(int), 0, cells - 1)
            for axis, (side, cells) in enumerate(zip(labels.shape, self.grid, strict=True))
        )
        patch = rows[:, None] * w + columns[None]
        there = labels != VOID
        flat = patch[there] * classes + labels[there]
        counts = np.bincount(flat, minlength=h * w * classes).reshape(h * w, classes)
        return (counts / np.maximum(counts.sum(1, keepdims=True), 1)).astype(np.float32)

    def pixels(self, votes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Votes [N, K] -> the class of each pixel of the original picture, int64 [H, W]."""
        (h, w), (H, W) = self.grid, size
        maps = torch.from_numpy(votes).T.reshape(1, -1, h, w)
        y, x = (
            torch.from_numpy(self.places(axis, side) / cells * 2 - 1).float()
            for axis, (side, cells) in enumerate(zip(size, self.grid, strict=True))
        )
        strip = max(1, _STRIP // (maps.shape[1] * W))
        found = []
        for rows in y.split(strip):
            grid = torch.stack(torch.meshgrid(rows, x, indexing="ij")[::-1], dim=-1)[None]
            sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
            found.append(sampled[0].argmax(0))
        return torch.cat(found).numpy().reshape(H, W)


@dataclass(frozen=True)
class Bank:
    """What votes: unit tokens float32 [M, D], and shares of classes [M, K]."""

    tokens: np.ndarray
    shares: np.ndarray

    def votes(self, tokens: np.ndarray, k: int, temperature: float) -> np.ndarray:
        """Unit tokens [N, D] -> shares of classes [N, K]."""
        near, rows = nearest_neighbours(self.tokens, tokens, min(k, len(self.tokens)))
        weights = np.exp((near - near[:, :1]) / temperature)
        weights /= weights.sum(1, keepdims=True)
        return np.einsum("nk,nkc->nc", weights, self.shares[rows]).astype(np.float32)


@dataclass(frozen=True)
class PatchKNN:
    """The protocol: give it a frozen backbone and two splits, and it gives one row.

    Args:
        k, temperature: of the vote.
        size: shorter side of the pictures in pixels; None = the backbone's own.
        bank: patches at most that vote, the same number from each picture.
        shots: pictures that are learned from; None = all. draws: how often they are drawn anew.
        seed: which pictures and which patches those are.
        progress: is told how many pictures of how many are done.
    """

    k: int = 30
    temperature: float = 0.02
    size: int | None = None
    bank: int = 200_000
    shots: int | None = None
    draws: int = 1
    seed: int = 0
    progress: Callable[[int, int], None] | None = None

    def __call__(self, backbone: Backbone, train: Maps, val: Maps) -> list[Row]:
        """
        Raises:
            UsageError: no patch tokens, other classes in val, fewer pictures than shots, no label.
            RunFailed: no picture could be read, or a feature is not finite.
        """
        self._check(backbone, train, val)
        begun, skipped = time.perf_counter(), list[str]()
        with evaluating(backbone), torch.no_grad():
            banks = [
                self._bank(backbone, train, self._chosen(len(train), draw), skipped)
                for draw in range(self.draws)
            ]
            matrices = [ConfusionMatrix(len(train.classes)) for _ in banks]
            count = self._score(backbone, val, banks, matrices, skipped)
        scores = [matrix.scores() for matrix in matrices]
        settings = {"k": self.k, "temperature": self.temperature, "classes": len(train.classes)}
        if self.shots is not None:
            settings |= {"shots": self.shots, "draws": self.draws, "seed": self.seed}
        notes = [f"{len(skipped)} pictures could not be read ({skipped[0]})"] if skipped else []
        side = backbone.preprocessing.at(self.size).input_size
        row = Row(
            protocol=PROTOCOL,
            settings=settings,
            top1=None,
            top5=None,
            data=train.where,
            transform=f"whole pictures, shorter side {side}",
            train_size=len(train) if self.shots is None else self.shots,
            val_size=count,
            seconds=round(time.perf_counter() - begun, 3),
            notes=notes,
            metrics=_metrics(scores),
        )
        return signed([row], backbone.origin.sha256, backbone.origin.name)

    def _check(self, backbone: Backbone, train: Maps, val: Maps) -> None:
        backbone.require_patches()
        if train.classes != val.classes:
            raise UsageError("the classes of train and val differ")
        if min(self.k, self.bank, self.draws) < 1 or self.temperature <= 0:
            raise UsageError("k, bank and draws must be at least 1, and the temperature above 0")
        if self.shots is not None and not 1 <= self.shots <= len(train):
            raise UsageError(
                f"shots must be 1 to the {len(train):,} pictures of train, got {self.shots}"
            )

    def _chosen(self, pictures: int, draw: int) -> np.ndarray:
        """The pictures that are learned from in one of the draws, ascending."""
        if self.shots is None:
            return np.arange(pictures)
        numbers = rng.raw(rng.Stream.FEW_SHOT, self.seed, draw, pictures)
        return np.sort(np.argsort(numbers, kind="stable")[: self.shots])

    def _bank(
        self, backbone: Backbone, train: Maps, chosen: np.ndarray, skipped: list[str]
    ) -> Bank:
        most = max(1, self.bank // len(chosen))
        tokens, shares = [], []
        for done, index in enumerate(chosen.tolist(), start=1):
            try:
                image, labels = train.read(index)
            except _UNREADABLE:
                skipped.append(train.describe(index))
                continue
            patches = patches_of(backbone, image, self.size)
            own = patches.shares(labels, len(train.classes))
            labelled = np.flatnonzero(own.any(1))
            key = hashlib.blake2b(f"{self.seed} {index}".encode()).digest()
            kept = labelled[rng.sample(key, most, len(labelled))] if len(labelled) else labelled
            tokens.append(patches.tokens[kept])
            shares.append(own[kept])
            self._tell(done, len(chosen))
        if not sum(map(len, tokens)):
            raise UsageError(f"no pixel of the pictures of {train.where} has a label to learn from")
        return Bank(np.concatenate(tokens), np.concatenate(shares))

    def _score(
        self,
        backbone: Backbone,
        val: Maps,
        banks: list[Bank],
        matrices: list[ConfusionMatrix],
        skipped: list[str],
    ) -> int:
        count = 0
        for index in range(len(val)):
            try:
                image, labels = val.read(index)
            except _UNREADABLE:
                skipped.append(val.describe(index))
                continue
            patches = patches_of(backbone, image, self.size)
            for bank, matrix in zip(banks, matrices, strict=True):
                votes = bank.votes(patches.tokens, self.k, self.temperature)
                height, width = labels.shape
                matrix.add(patches.pixels(votes, (height, width)), labels)
            count += 1
            self._tell(index + 1, len(val))
        if not count:
            raise RunFailed(f"no picture of {val.where} could be read")
        return count

    def _tell(self, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(done, of)


def patches_of(backbone: Backbone, image: np.ndarray, size: int | None = None) -> Patches:
    """The patch tokens of a picture uint8 [H, W, C] as a frozen backbone gives them last.

    Raises:
        RunFailed: they are not finite.
    """
    patch = backbone.require_patches()
    shown = backbone.whole(image, size)
    (found, _), *_ = backbone.forward_intermediates(backbone.fitting(shown))
    if not found.isfinite().all():
        raise RunFailed("the features are not finite: the weights are damaged")
    tokens = F.normalize(found[0].float().flatten(1).T, dim=1)
    (H, W), (h, w) = image.shape[:2], found.shape[2:]
    scale = (shown.shape[2] / H / patch, shown.shape[3] / W / patch)
    start = backbone.patch_start / patch
    return Patches(tokens.cpu().contiguous().numpy(), (h, w), scale, start)


def _metrics(scores: list[Scores]) -> dict[str, float]:
    """In per cent; of several draws the mean, and the standard deviation of mIoU."""
    told = {
        name: 100 * statistics.fmean(getattr(each, key) for each in scores)
        for name, key in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))
    }
    if len(scores) > 1:
        told["mIoU sd"] = 100 * statistics.stdev(each.miou for each in scores)
    return told
