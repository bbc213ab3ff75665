"""A table of features: one row an image, a few of them at a time, so that any number fits.

Letters: n rows, D width of a feature, (h, w) the patch grid.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from xdino.backbone import Backbone
from xdino.data.sources import Source
from xdino_eval.extraction import Options
from xdino_eval.features import each_batch, none_read, refuse_broken

PIECE = 4096  # rows of features that are at hand already


@dataclass(frozen=True)
class Part:
    """One source of a table. split: "train", "val", or "" of data that is not divided.

    names: of its images, "cat/1.jpg"; `Names` makes them as they are asked for.
    """

    split: str
    source: Source
    names: Sequence[str]


@dataclass(frozen=True)
class Rows:
    """Some rows of a part.

    indices: int64 [n], places in the source. features: float32 [n, D]. patches: [n, h, w, D].
    """

    part: Part
    indices: np.ndarray
    features: Tensor
    patches: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> list[str]:
        return [self.part.names[i] for i in self.indices.tolist()]

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]; -1 where the source has none."""
        known = self.part.source.labels
        if known is None:
            return np.full(len(self), -1, np.int64)
        return np.asarray(known, np.int64)[self.indices]

    @property
    def class_names(self) -> list[str]:
        """Of the labels; "" where there is none."""
        classes = self.part.source.classes or ()
        return [classes[i] if 0 <= i < len(classes) else "" for i in self.labels.tolist()]


class WithPatches(nn.Module):
    """`[B, C, H, W]` -> the class token and the patch tokens in a row, `[B, (1 + h * w) * D]`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        backbone.require_patches()
        self.backbone, self.grid = backbone, (0, 0)

    def forward(self, images: Tensor) -> Tensor:
        token, patches = self.backbone.tokens(self.backbone.fitting(images))
        self.grid = patches.shape[1], patches.shape[2]
        return torch.cat((token, patches.flatten(1).to(token.dtype)), 1)


def rows_of(backbone: Backbone, part: Part, options: Options, patches: bool) -> Iterator[Rows]:
    """The rows of a part, in the order of its source, without the images that cannot be read.

    Those are named to `options.notice`. A cache keeps features, not patches.

    Raises:
        UsageError: patches of a backbone without any.
        RunFailed: no image could be read, or a feature is not finite.
    """
    label = f"features of {part.split}" if part.split else "features"
    source = part.source
    if options.cache is not None and not patches:
        found = options.features_of(backbone, part.split or "the images", source)
        for start in range(0, len(found.features), PIECE):
            piece = slice(start, start + PIECE)
            yield Rows(part, found.indices[piece].numpy(), found.features[piece])
        return
    network = WithPatches(backbone) if patches else backbone
    looked_at = each_batch(
        network,
        source,
        options.transform_for(backbone),
        np.arange(len(source)),
        options.batch_size,
        options.device,
        options.workers,
        options.precision,
    )
    tell, done, read = options.counter(label), 0, 0
    skipped: list[tuple[str, str]] = []
    with closing(looked_at):
        for batch, out in looked_at:
            for index, reason in batch.skipped:
                skipped.append((source.describe(index), reason))
                options.notice(f"skipped {skipped[-1][0]}: {reason}")
            if len(out):
                refuse_broken(out, source, batch.indices)
                yield _row(part, batch.indices, out, backbone.embed_dim, network)
            read += len(out)
            done += len(out) + len(batch.skipped)
            if tell:
                tell(done, len(source))
    if not read:
        raise none_read(source, skipped)


def _row(part: Part, indices: np.ndarray, out: Tensor, D: int, network: nn.Module) -> Rows:
    if not isinstance(network, WithPatches):
        return Rows(part, indices, out)
    h, w = network.grid
    return Rows(part, indices, out[:, :D], out[:, D:].reshape(-1, h, w, D))
