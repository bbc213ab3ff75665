"""The images that a linear probe is trained on: augmented anew in every epoch, then features.

The published probe (DINO, https://arxiv.org/abs/2104.14294, `eval_linear.py`) trains on
torchvision's RandomResizedCrop and a flip. Here what an image gets follows from (seed, epoch,
index) alone, whatever the number of threads.

Letters: N images, B images of a batch, D width, s side of a crop.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xdino.data.sources import Source
from xdino.errors import RunFailed
from xdino.runtime import rng, transfer, turns
from xdino_eval.features import NOTHING, Batch, Features, autocast, read_batches
from xdino_eval.transform import EvalTransform, resample


def crop_parameters(
    height: int, width: int, draws: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of a RandomResizedCrop with torchvision's defaults.

    8 to 100 % of the area and an aspect of 3/4 to 4/3, uniform in its logarithm; ten tries, then
    the largest central crop of an allowed aspect.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * draws.uniform(0.08, 1.0)
        aspect = math.exp(draws.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def augment(image: np.ndarray, size: int, draws: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [s, s, C]: a random resized crop (PIL bilinear), flipped or not."""
    box = crop_parameters(image.shape[0], image.shape[1], draws)
    crop = resample(image, (size, size), Image.Resampling.BILINEAR, box)
    return crop[:, ::-1] if draws.random() < 0.5 else crop


@dataclass(frozen=True)
class AugmentedImages:
    """Features of some images of `source`, augmented anew in every epoch.

    classes: int64 [N], of every image of the source. indices: int64, those to train on.
    shared: as of `OverImages`. unreadable: the places of images that could not be read, as they are
    met.
    """

    backbone: nn.Module
    source: Source
    transform: EvalTransform
    classes: np.ndarray
    indices: np.ndarray
    batch_size: int
    seed: int
    device: torch.device
    workers: int
    precision: str
    shared: bool = False
    unreadable: set[int] = field(default_factory=set)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features float32 [B, D], classes int64 [B]) of one epoch, in its own order.

        Raises:
            RunFailed: a feature is not finite.
        """
        seed, size = self.seed, self.transform.size

        def crop(image: np.ndarray, index: int) -> np.ndarray:
            return augment(image, size, rng.probe_image(seed, epoch, index))

        order = self.indices[rng.probe_order(seed, epoch).permutation(len(self.indices))]
        own = turns.mine(order, self.batch_size) if self.shared else order
        batches = read_batches(self.source, crop, own, self.batch_size, self.workers, self.device)
        looked_at: Iterator[tuple[Batch, Tensor]]
        looked_at = ((batch, self._look(batch)) for batch in batches)
        if self.shared:
            here = ((replace(batch, images=NOTHING), out.cpu()) for batch, out in looked_at)
            looked_at = turns.of_all(here, -(-len(order) // self.batch_size))
        before: tuple[Batch, transfer.Arriving] | None = None
        for batch, features in looked_at:
            self.unreadable.update(index for index, _ in batch.skipped)
            if not len(batch.indices):
                continue
            features = features.to(self.device)
            if before is not None:
                self._refuse_broken(*before, epoch)
            before = batch, transfer.Arriving(~features.isfinite().all(1))
            target = torch.from_numpy(self.classes[batch.indices])
            yield features, transfer.to_device(target, self.device)
        if before is not None:
            self._refuse_broken(*before, epoch)

    def _look(self, batch: Batch) -> Tensor:
        """The features of a batch, [0] where none of it could be read."""
        if not len(batch.indices):
            return torch.empty(0)
        with torch.no_grad(), autocast(self.device, self.precision):
            images = transfer.to_device(batch.images, self.device)
            return self.backbone(self.transform.normalise(images)).float()

    def _refuse_broken(self, batch: Batch, broken: transfer.Arriving, epoch: int) -> None:
        """Else every head would take the blame. A device is asked of a batch during the next."""
        places = broken.wait().nonzero()[:, 0].tolist()
        if places:
            raise RunFailed(
                f"{len(places)} features of a batch are not finite in epoch {epoch}, the first "
                f"of {self.source.describe(int(batch.indices[places[0]]))}"
            )

    def describe(self) -> str:
        return f"RandomResizedCrop({self.transform.size}, bilinear) + flip"

    def trained_on(self) -> Features:
        """What a results row says of the training split; no features.

        Raises:
            RunFailed: no image could be read.
        """
        read = len(self.indices) - len(self.unreadable)
        if not read:
            raise RunFailed(f"no image of {self.source.name} could be read")
        return Features(
            features=torch.empty(read, 0),
            labels=None,
            indices=torch.empty(0, dtype=torch.int64),
            skipped=[(self.source.describe(index), "") for index in sorted(self.unreadable)],
            data=self.source.name,
        )
