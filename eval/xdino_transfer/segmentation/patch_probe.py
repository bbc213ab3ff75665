"""How much of a segmentation frozen patch tokens hold, in minutes: k-NN or a linear map over patches.

Every patch of the training pictures is kept with the shares of classes among its pixels. Of another
picture each patch gets a number for each class, from its nearest ones by cosine similarity (dense
nearest neighbours as in Hummingbird, arXiv 2306.01667, but exact and with the pictures as they are)
or from a linear map that was fitted to them; pixels take theirs from the four patches around them.
With `shots` that few pictures are learned from, in several draws.

The linear map is fitted to patches, to its minimum; DINOv3's probe, which trains on pixels of crops
with BatchNorm and dropped channels, is `heads.LinearMap`.

Letters: N patches of a picture, M of the bank, K classes, D width.
"""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

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
from xdino_transfer.segmentation.maps import Maps
from xdino_transfer.segmentation.patches import patches_of

_UNREADABLE = (UnreadableImage, OSError)


@dataclass(frozen=True)
class Bank:
    """What is learned from: unit tokens float32 [M, D], and shares of classes [M, K]."""

    tokens: np.ndarray
    shares: np.ndarray


#: Unit tokens float32 [N, D] -> a number for each class float32 [N, K], the larger the likelier.
Votes = Callable[[np.ndarray], np.ndarray]


class Method(Protocol):
    """How a bank answers. protocol: what its rows are called."""

    protocol: ClassVar[str]

    def fitted(self, bank: Bank) -> Votes: ...

    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class KNN:
    """The k nearest patches vote, with the weights exp(similarity / temperature)."""

    k: int = 30
    temperature: float = 0.02
    protocol: ClassVar[str] = "dense k-NN"

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise UsageError("k must be at least 1, and the temperature above 0")

    def fitted(self, bank: Bank) -> Votes:
        def votes(tokens: np.ndarray) -> np.ndarray:
            near, rows = nearest_neighbours(bank.tokens, tokens, min(self.k, len(bank.tokens)))
            weights = np.exp((near - near[:, :1]) / self.temperature)
            weights /= weights.sum(1, keepdims=True)
            return np.einsum("nk,nkc->nc", weights, bank.shares[rows]).astype(np.float32)

        return votes

    def settings(self) -> dict[str, Any]:
        return {"k": self.k, "temperature": self.temperature}


@dataclass(frozen=True)
class Linear:
    """A linear map of standardised tokens, by cross-entropy to the shares, to its minimum (L-BFGS).

    weight_decay: of the sum of squared weights, beside the mean loss. The same minimum whatever the
    order: no random number, no learning rate.
    """

    weight_decay: float = 1e-4
    iterations: int = 200
    protocol: ClassVar[str] = "dense linear"

    def fitted(self, bank: Bank) -> Votes:
        x, shares = torch.from_numpy(bank.tokens), torch.from_numpy(bank.shares)
        mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        x = (x - mean) / spread
        weight = torch.zeros(shares.shape[1], x.shape[1], requires_grad=True)
        bias = torch.zeros(shares.shape[1], requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=self.iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            optimiser.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), shares)
            loss = loss + self.weight_decay * weight.square().sum()
            loss.backward()
            return loss.item()

        with torch.enable_grad():
            optimiser.step(closure)

        def votes(tokens: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return F.linear((torch.from_numpy(tokens) - mean) / spread, weight, bias).numpy()

        return votes

    def settings(self) -> dict[str, Any]:
        return {"weight_decay": self.weight_decay}


METHODS: dict[str, Callable[[], Method]] = {"knn": KNN, "linear": Linear}


@dataclass(frozen=True)
class PatchProbe:
    """The protocol: give it a frozen backbone and two splits, and it gives one row.

    Args:
        method: how the patches of train answer for those of val.
        size: shorter side of the pictures in pixels; None = the backbone's own.
        bank: patches at most that are learned from, the same number of each picture.
        shots: pictures that are learned from; None = all. draws: how often they are drawn anew.
        seed: which pictures and which patches those are.
        progress: is told how many pictures of how many are done.
    """

    method: Method = field(default_factory=KNN)
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
            answers = [
                self.method.fitted(
                    self._bank(backbone, train, self._chosen(len(train), draw), skipped)
                )
                for draw in range(self.draws)
            ]
            matrices = [ConfusionMatrix(len(train.classes)) for _ in answers]
            count = self._score(backbone, val, answers, matrices, skipped)
        scores = [matrix.scores() for matrix in matrices]
        settings = {**self.method.settings(), "classes": len(train.classes)}
        if self.shots is not None:
            settings |= {"shots": self.shots, "draws": self.draws, "seed": self.seed}
        notes = [f"{len(skipped)} pictures could not be read ({skipped[0]})"] if skipped else []
        side = backbone.preprocessing.at(self.size).input_size
        row = Row(
            protocol=self.method.protocol,
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
        if min(self.bank, self.draws) < 1:
            raise UsageError("bank and draws must be at least 1")
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
        answers: list[Votes],
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
            for answer, matrix in zip(answers, matrices, strict=True):
                height, width = labels.shape
                found = patches.pixels(answer(patches.tokens), (height, width))
                matrix.add(found, labels)
            count += 1
            self._tell(index + 1, len(val))
        if not count:
            raise RunFailed(f"no picture of {val.where} could be read")
        return count

    def _tell(self, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(done, of)


def _metrics(scores: list[Scores]) -> dict[str, float]:
    """In per cent; of several draws the mean, and the standard deviation of mIoU."""
    told = {
        name: 100 * statistics.fmean(getattr(each, key) for each in scores)
        for name, key in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))
    }
    if len(scores) > 1:
        told["mIoU sd"] = 100 * statistics.stdev(each.miou for each in scores)
    return told
