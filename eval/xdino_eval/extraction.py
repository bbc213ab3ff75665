"""How images are shown to a backbone, the same for every evaluator, and the features it gives then."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from xdino.backbone import Backbone
from xdino.data.sources import Source
from xdino.runtime import rng
from xdino_eval.backbone_tokens import PooledTokens, needs_both
from xdino_eval.feature_cache import cache_key, cached, mapped
from xdino_eval.features import Features, Progress, extract
from xdino_eval.transform import EvalTransform


@dataclass(frozen=True)
class Options:
    """What an evaluator is told besides the backbone and the two sources.

    transform: None = the backbone's own. device: the backbone is moved there; None = where it is.
    limit: at most so many images of a source, the same ones every time; None = all.
    cache: a folder where features are kept for the next command.
    counter: from what is counted ("features of train") to who is told (done, all). notice: is told
    of images that cannot be read. shared: every process of a group is told the same and does its
    part; all get the whole. Without a cache only, which each would look into for itself.
    """

    transform: EvalTransform | None = None
    batch_size: int = 128
    workers: int = 2
    device: torch.device | None = None
    precision: str = "fp32"
    limit: int | None = None
    cache: Path | None = None
    counter: Callable[[str], Progress | None] = lambda verb: None
    notice: Callable[[str], None] = lambda sentence: None
    shared: bool = False

    def transform_for(self, backbone: Backbone) -> EvalTransform:
        return self.transform or EvalTransform.of(backbone)

    def features(
        self, backbone: Backbone, train: Source, val: Source, tokens: Sequence[str] = ("class",)
    ) -> tuple[Features, Features]:
        """Features of both splits."""
        return (
            self.features_of(backbone, "train", train, tokens=tokens),
            self.features_of(backbone, "val", val, tokens=tokens),
        )

    def features_of(
        self,
        backbone: Backbone,
        split: str,
        source: Source,
        indices: np.ndarray | None = None,
        part: str = "",
        tokens: Sequence[str] = ("class",),
        may_be_empty: bool = False,
    ) -> Features:
        """Features of one source, read from the cache where they are in it.

        Args:
            indices: images of it, which the cache calls `part`; None for all, up to the limit.
            tokens: what is read off the backbone, see `PooledTokens`.

        Raises:
            UsageError, RunFailed: as `PooledTokens` and `extract`.
        """
        network = backbone if tuple(tokens) == ("class",) else PooledTokens(backbone, tokens)
        transform, load = self.transform_for(backbone), mapped if part else cached
        if indices is None and self.limit is not None:
            indices, part = fixed_subset(len(source), self.limit), f"at most {self.limit}"
        compute = partial(
            extract,
            network,
            source,
            transform,
            self.batch_size,
            self.device,
            self.workers,
            self.precision,
            indices,
            self.counter(f"features of {split}"),
            may_be_empty,
            self.shared,
        )
        if self.cache is None:
            found = compute()
        else:
            read = ("both",) if needs_both(tokens) else tokens
            key = cache_key(backbone, source, transform, self.precision, read, part)
            found = load(self.cache, key, compute)
        for name, reason in found.skipped:
            self.notice(f"skipped {name}: {reason}")
        return found


def fixed_subset(number: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the indices 0..number-1, ascending, int64; always the same ones."""
    if limit is None or limit >= number:
        return np.arange(number)
    chosen = rng.subset().choice(number, limit, replace=False)
    return np.sort(chosen)
