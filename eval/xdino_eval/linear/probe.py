"""A trained linear classifier of frozen features: kept in a file, and applied to other images.

The file is safetensors: weight [K, D], bias [K], classes int64 [K] (the labels of the training
split), and a header that says which features the classifier reads, what the classes are called, and
where it comes from. All protocols write the same file; that of logistic regression has its
standardisation folded into weight and bias.

Letters: N images, D width, K classes.
"""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xdino.errors import RunFailed, UsageError, asked, nearest
from xdino.runtime.atomic import written_beside
from xdino_eval.accuracy import class_indices, ranks, top1_top5
from xdino_eval.backbone_tokens import FEATURES
from xdino_eval.features import Features, labels_of
from xdino_eval.linear.probe_state import Unfinished
from xdino_eval.results import Row, row_of

FACTS = ("protocol", "data", "train_size", "checkpoint")


@dataclass(frozen=True)
class Probe:
    """Scores of K classes: features [N, D] -> features @ weight.T + bias, [N, K].

    weight: [K, D]. bias: [K]. Both float32, or float64 of a logistic regression.
    labels: int64 [K], of the training split, ascending.
    features: which a head reads, "class", "patches" or "both" (see `PooledTokens`).
    names: of the K classes, or () where they have none.
    facts: where it comes from: protocol, data, train_size, checkpoint (SHA-256 of the backbone).
    """

    weight: Tensor
    bias: Tensor
    labels: np.ndarray
    features: str = "class"
    names: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def signed(self, names: Sequence[str] | None, checkpoint: str) -> "Probe":
        """With the names of the source's classes (by label), and the backbone's SHA-256."""
        of_rows = tuple(names[label] for label in self.labels) if names else ()
        return replace(self, names=of_rows, facts={**self.facts, "checkpoint": checkpoint})

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all."""
        tensors = {
            "weight": self.weight.detach().cpu().contiguous(),
            "bias": self.bias.detach().cpu().contiguous(),
            "classes": torch.from_numpy(np.asarray(self.labels, np.int64)),
        }
        header = {"features": self.features, "names": json.dumps(self.names), **self.facts}
        header = {n: v.encode("utf-8", "backslashreplace").decode() for n, v in header.items()}
        with written_beside(Path(path)) as beside:
            save_file(tensors, beside, header)

    @classmethod
    def load(cls, path: Path | str) -> "Probe":
        """Read what `save` wrote.

        Raises:
            UsageError: no such file, or one that holds no probe.
        """
        path = Path(path)
        with asked(f"cannot read {path}"):
            if not path.is_file():
                raise UsageError(f"there is no probe {path}; --save-head writes one")
            open(path, "rb").close()
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                weight, bias, labels = (file.get_tensor(n) for n in ("weight", "bias", "classes"))
            names = tuple(json.loads(header.get("names", "[]")))
            K = len(labels)
            if weight.ndim != 2 or len(weight) != K or bias.shape != (K,):
                raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)}")
            if labels.dtype != torch.int64 or labels.ndim != 1 or len(names) not in (0, K):
                raise ValueError(f"{K} classes, {len(names)} names")
            if not (weight.isfinite().all() and bias.isfinite().all()):
                raise ValueError("a weight is not finite")
            if not all(isinstance(name, str) for name in names):
                raise ValueError("names that are no text")
            if header.get("features", "class") not in FEATURES:
                raise ValueError(f"features {header['features']:.40}")
            if not header.get("train_size", "0").isdecimal():
                raise ValueError(f"trained on {header['train_size']:.40} images")
        except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path} is not a saved probe ({error}); --save-head writes one"
            ) from None
        facts = {name: header[name] for name in FACTS if name in header}
        features = header.get("features", "class")
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return cls(weight.to(kind), bias.to(kind), labels.numpy(), features, names, facts)

    def scores(self, features: Tensor) -> Tensor:
        """float32 [N, D] -> [N, K], on the probe's device and as precise as it.

        Raises:
            UsageError: features of another width.
        """
        if features.shape[1] != self.width:
            raise UsageError(
                f"the probe reads {self.width} numbers an image, and here are {features.shape[1]}: "
                "apply it to the backbone that it was trained on"
            )
        with torch.no_grad():
            return torch.addmm(self.bias, features.to(self.weight), self.weight.T)

    def score(self, features: Tensor, classes: np.ndarray) -> tuple[float, float]:
        """Top-1 and top-5 in per cent. classes: rows of the probe, int64 [N]; -1 is none of them."""
        return top1_top5(ranks(self.scores(features).cpu(), torch.from_numpy(classes)))


@dataclass(frozen=True)
class Trained:
    """What training a probe gives: the row that is reported (not signed yet), and the probe.

    unfinished: the last state that was kept; remove it by `settled` once row and probe are safe.
    """

    row: Row
    probe: Probe
    unfinished: Unfinished | None = None

    def settled(self) -> None:
        if self.unfinished:
            self.unfinished.done()


def apply(probe: Probe, found: Features, names: Sequence[str] | None = None) -> Row:
    """The row (not signed yet) of a saved probe on a labelled split.

    Classes are matched by name where the probe and the split have names, else by label.

    Args:
        names: of the split's classes, by label.

    Raises:
        UsageError: no labels, features of another width, or classes that the probe does not know.
    """
    score = probe.score(found.features, rows_of(probe, labels_of(found).numpy(), names, found.data))
    trained_on = replace(
        found,
        features=torch.empty(int(probe.facts.get("train_size", 0)), 0),
        data=probe.facts.get("data", found.data),
        skipped=[],
    )
    settings: dict[str, object] = {
        "trained by": probe.facts.get("protocol", "unknown"),
        "features": probe.features,
        "classes": len(probe.labels),
    }
    return row_of("linear, saved probe", settings, score, trained_on, found, 0.0)


def rows_of(probe: Probe, labels: np.ndarray, names: Sequence[str] | None, data: str) -> np.ndarray:
    """Labels of a split, int64 [N] -> rows of the probe, int64 [N].

    Raises:
        UsageError: the split has classes that the probe does not know.
    """
    unique, place = np.unique(labels, return_inverse=True)
    present = unique.tolist()
    if names and probe.names:
        known: dict[object, int] = {name: row for row, name in enumerate(probe.names)}
        keys: dict[int, object] = {label: names[label] for label in present}
    else:
        known = {int(label): row for row, label in enumerate(probe.labels)}
        keys = {label: label for label in present}
    strange = [keys[label] for label in present if keys[label] not in known]
    if strange:
        hint = nearest(str(strange[0]), [str(key) for key in list(known)[:1000]])
        raise UsageError(
            f"{data} has {len(strange)} classes that the probe was not trained on, the first "
            f'"{strange[0]}"' + (f"; {hint}" if hint.startswith("did you") else "")
        )
    return np.array([known[keys[label]] for label in present], np.int64)[place]


def write_predictions(
    path: Path | str,
    probe: Probe,
    found: Features,
    images: Sequence[str],
    names: Sequence[str] | None = None,
) -> None:
    """A CSV file, a line an image: image, prediction, probability, label.

    Args:
        images: how a person finds each image of `found`. names: of the split's classes, by label.

    Raises:
        UsageError: features of another width. RunFailed: the file cannot be written.
    """
    scores = probe.scores(found.features).cpu()
    probability, best = scores.softmax(1).max(1)
    called = probe.names or [str(label) for label in probe.labels]
    labels = [""] * len(scores)
    if found.labels is not None:
        labels = [names[label] if names else str(label) for label in found.labels.tolist()]
    with (
        written_beside(Path(path)) as beside,
        open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", "prediction", "probability", "label"])
        for image, row, share, label in zip(
            images, best.tolist(), probability.tolist(), labels, strict=True
        ):
            writer.writerow([image, called[row], f"{share:.6g}", label])


class Trial:
    """A probe in training: the clock and the classes at its beginning, the row at its end.

    classes: labels that occur in training, int64 [K], ascending. train_class: int64 [N], in 0..K-1.
    """

    def __init__(self, protocol: str, train_labels: np.ndarray) -> None:
        self.protocol, self.began = protocol, time.perf_counter()
        self.classes, self.train_class = np.unique(train_labels, return_inverse=True)

    def end(
        self,
        probe: Probe,
        settings: dict[str, object],
        train: Features,
        val: Features,
        notes: Sequence[str] = (),
        unfinished: Unfinished | None = None,
    ) -> Trained:
        """Score `val`, and say in the row what a reader must know."""
        _, _, val_class = class_indices(self.classes, labels_of(val).numpy())
        score = probe.score(val.features, val_class)
        unknown = int((val_class < 0).sum())
        single = int((np.bincount(self.train_class) == 1).sum())
        told = list(notes)
        if unknown:
            told.append(f"{unknown} images of val have a class that train lacks: counted as wrong")
        if single:
            told.append(f"{single} classes have one training image, which is not held out")
        seconds = time.perf_counter() - self.began
        row = row_of(self.protocol, settings, score, train, val, seconds, told)
        facts = {"protocol": row.protocol, "data": train.data, "train_size": str(row.train_size)}
        return Trained(row, replace(probe, facts={**probe.facts, **facts}), unfinished)


def check(train: Features, val: Features) -> np.ndarray:
    """The labels of `train`, if the two splits can be used.

    Raises:
        UsageError: a split without labels or images, or splits of different widths.
        RunFailed: features that are not finite.
    """
    labels, _ = labels_of(train).numpy(), labels_of(val)
    if not len(train.features) or not len(val.features):
        raise UsageError(f"{(val if len(train.features) else train).data} has no image")
    if train.features.shape[1] != val.features.shape[1]:
        raise UsageError(
            f"features of {train.data} have {train.features.shape[1]} numbers, those of {val.data} "
            f"{val.features.shape[1]}: extract both from one backbone"
        )
    for split in (train, val):
        broken = (~split.features.isfinite().all(1)).nonzero()[:, 0]
        if len(broken):
            raise RunFailed(
                f"{len(broken)} of {len(split.features)} features of {split.data} are not finite, "
                f"the first that of image {int(split.indices[broken[0]])}"
            )
    return labels
