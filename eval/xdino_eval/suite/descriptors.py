"""One descriptor an image, for searching: class token, several scales, pooled patches.

What retrieval and copy detection of DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294,
section 4.2.1) share: images read in order, none left out, and the pooling of a backbone's tokens.

Letters: N images, B images of a batch, C channels, H x W pixels, (h, w) patch grid, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xdino.backbone import Backbone
from xdino.data.sources import Source
from xdino.errors import RunFailed, UsageError
from xdino.runtime import transfer
from xdino_eval.features import (
    Batch,
    Progress,
    autocast,
    device_of,
    evaluating,
    in_turn,
    read_batches,
)
from xdino_eval.transform import EvalTransform

SCALES = (1.0, 2**-0.5, 0.5)
GEM = 4.0  # exponent of the published copy detection


def gem(patches: Tensor, exponent: float = GEM) -> Tensor:
    """Generalised mean of patch tokens, `[B, h, w, D]` -> `[B, D]`; what is below 1e-6 counts as it.

    Radenović et al. 2018, https://arxiv.org/abs/1711.02512, equation 2.
    """
    return patches.clamp(min=1e-6).pow(exponent).mean((1, 2)).pow(1 / exponent)


def class_token(backbone: Backbone, images: Tensor) -> Tensor:
    """`[B, C, H, W]`, any size -> what the backbone says of the whole image, `[B, D]`."""
    return backbone(backbone.fitting(images))


def class_and_gem(backbone: Backbone, images: Tensor) -> Tensor:
    """`[B, C, H, W]` -> the class token and the GeM of the patch tokens in a row, `[B, 2 D]`."""
    token, patches = backbone.tokens(images)
    return torch.cat((token, gem(patches)), 1)


def multi_scale(backbone: Backbone, images: Tensor) -> Tensor:
    """The mean class token over `SCALES` of one image `[1, C, H, W]`, of length 1: `[1, D]`.

    Images are shrunk bilinearly. As published the tokens are averaged as they are, not normalised
    one by one first.

    Raises:
        UsageError: nothing is left of the image at the smallest scale, or less than a patch.
    """
    H, W = images.shape[2:]
    if min(H, W) * min(SCALES) < 1:
        raise UsageError(f"an image of {W} x {H} pixels is too small for the scale {min(SCALES):g}")
    total = torch.zeros((), device=images.device)
    for scale in SCALES:
        shown = images
        if scale != 1:
            shown = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        total = total + class_token(backbone, shown)
    return F.normalize(total / len(SCALES), dim=1)


@dataclass(frozen=True)
class Describer:
    """How images become descriptors.

    pool: (backbone, float32 [B, C, H, W]) -> [B, D]. prepare: (uint8 [H, W, C], index) -> uint8,
    of one size for all images unless `batch_size` is 1. transform: normalises.
    """

    backbone: Backbone
    pool: Callable[[Backbone, Tensor], Tensor]
    transform: EvalTransform
    batch_size: int = 1
    workers: int = 2
    precision: str = "fp32"
    progress: Progress | None = None

    def __call__(self, source: Source, prepare: Callable[[np.ndarray, int], np.ndarray]) -> Tensor:
        """float32 [N, D] on the CPU, in the order of `source`.

        Raises:
            UsageError: an image is smaller than a patch.
            RunFailed: an image cannot be read (the ground truth counts all of them), or its
                descriptor is not finite.
        """
        device = device_of(self.backbone)
        order, found = np.arange(len(source)), []
        batches = read_batches(source, prepare, order, self.batch_size, self.workers, device)

        def first(batch: Batch) -> str:
            return source.describe(int(batch.indices[0]))

        def look(batch: Batch) -> Tensor:
            images = self.transform.normalise(transfer.to_device(batch.images, device))
            try:
                return self.pool(self.backbone, images)
            except UsageError as error:
                raise UsageError(f"{first(batch)}: {error}") from None

        with (
            evaluating(self.backbone),
            torch.inference_mode(),
            autocast(device, self.precision),
        ):
            for batch, out in in_turn(batches, look):
                for index, reason in batch.skipped:
                    raise RunFailed(f"{source.describe(index)} cannot be read: {reason}")
                if not out.isfinite().all():
                    raise RunFailed(
                        f"a descriptor is not finite: {first(batch)}, or one soon after it"
                    )
                found.append(out)
                if self.progress:
                    self.progress(int(batch.indices[-1]) + 1, len(source))
        return torch.cat(found)
