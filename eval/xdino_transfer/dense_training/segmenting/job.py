"""Learning to segment: the job that `train.run` runs. What it shares with detection: `dense_training`.

picture and mask -> fitted, cropped, mirrored, colours changed -> device -> levels -> head
-> logits at the labels' size -> cross-entropy (and the auxiliary head's) -> one update
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from xdino.augment.picture import save_views
from xdino.config.bands import shown_places
from xdino.data import BadImage
from xdino.runtime import distributed, transfer
from xdino_transfer.dense_training import starting
from xdino_transfer.dense_training.job import DenseJob
from xdino_transfer.dense_training.segmenting import plan as planning
from xdino_transfer.dense_training.segmenting.pictures import MaskedBatch, MaskedLoader
from xdino_transfer.dense_training.segmenting.plan import Plan
from xdino_transfer.segmentation.colours import COLOURS
from xdino_transfer.segmentation.losses import VOID
from xdino_transfer.segmentation.scoring import PROTOCOL
from xdino_transfer.segmentation.segmenter import Segmenter
from xdino_transfer.segmentation.views import TestViews

DRAWN = 8  # crops of the picture of the first batch


class SegmentationJob(DenseJob[MaskedBatch]):
    """`xdino.job.Job` of a segmenter on pictures with masks."""

    plan: Plan
    loader: MaskedLoader
    protocol: ClassVar[str] = PROTOCOL
    task: ClassVar[str] = "learning to segment"

    def planned(self, precision: str, spec: dict[str, Any] | None) -> Plan:
        return planning.make_plan(self.config, distributed.world_size(), precision, spec)

    def network(self) -> tuple[Segmenter, list[str]]:
        plan = self.plan
        network = planning.build(self.config, plan.spec, plan.classes, plan.weights)
        return network, starting.take_head(network, plan.weights, plan.classes)

    @staticmethod
    def losses(network: Segmenter, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return network.losses(*batch)

    def open(self, known_bad: list[BadImage]) -> None:
        train = self.config.train
        self.loader = MaskedLoader(
            self.plan.train,
            self.plan.views,
            train.batch_size,
            train.seed,
            accumulate=train.accumulate,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            max_bad_share=self.config.data.max_bad_share,
            **self.loader_options(known_bad),
        )

    def weights_facts(self, iteration: int) -> dict[str, Any]:
        """With how labels are counted, where that is not from 0."""
        begins = {"zero_is_void": True} if self.config.data.zero_is_void else {}
        return super().weights_facts(iteration) | begins

    @property
    def test_views(self) -> TestViews:
        return self.plan.test_views

    def on_device(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        return (
            transfer.to_device(batch.images, self.device),
            transfer.to_device(batch.labels, self.device),
        )

    def draw(self, batch: tuple[Tensor, Tensor], path: Path) -> None:
        """Crops, and beside each its labels in colours."""
        places = [*shown_places(self.plan.train.channels)]
        images, labels = (part[:DRAWN].float().cpu() for part in batch)
        images = images[:, places]
        mean, std = (
            torch.tensor(x)[places].view(-1, 1, 1)
            for x in (self.plan.spec.mean, self.plan.spec.std)
        )
        colours = (
            torch.from_numpy(COLOURS)[labels.long()].movedim(-1, 1)[:, : images.shape[1]] / 255
        )
        known = (labels != VOID)[:, None]
        pixels = images * std + mean
        shown = torch.where(known, 0.4 * pixels + 0.6 * colours, pixels)
        groups = {"crops": images[None], "with their labels": ((shown - mean) / std)[None]}
        save_views(path, groups, mean.flatten().tolist(), std.flatten().tolist())
