"""Training of a Mask R-CNN on an XCiT: the job that `train.run` runs.

    path -> bytes -> decoded -> mirrored, cut, resized (uint8) with boxes and masks -> device
    -> normalised -> levels -> proposals -> regions -> five losses, summed -> one update

Which images a step takes, what happens to them, and which anchors and regions of them are learned
from follows from the seed and the step's number alone.

Letters: B images, C channels, M objects, H x W pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from xdino.config.bands import shown_places
from xdino.data import BadImage
from xdino.errors import world
from xdino.runtime import distributed, rng, transfer
from xdino.runtime.atomic import written_beside
from xdino_transfer.dense_training.detecting import plan as planning
from xdino_transfer.dense_training.detecting.loader import DetectionBatch, DetectionLoader
from xdino_transfer.dense_training.detecting.plan import DetectionPlan
from xdino_transfer.dense_training.job import DenseJob
from xdino_transfer.detection.detector import Detector, Drawing
from xdino_transfer.detection.objects import Objects, Shown
from xdino_transfer.detection.scoring import PROTOCOL
from xdino_transfer.detection.views import Views

DRAWN = 4  # images of the first batch in views.png
DRAWN_SIDE = 480  # pixels of their longer side there, at most


@dataclass(frozen=True)
class Given:
    """A micro-batch on its device: images float32 [B, C, H, W], normalised."""

    images: Tensor
    shown: list[Shown]
    objects: list[Objects]
    drawing: Drawing


class DetectionJob(DenseJob[DetectionBatch]):
    """`xdino.job.Job` of a detector on annotated images."""

    plan: DetectionPlan
    loader: DetectionLoader
    protocol = PROTOCOL
    task = "learning to detect"

    def planned(self, precision: str, spec: dict[str, Any] | None) -> DetectionPlan:
        processes = distributed.world_size()
        return planning.make_plan(self.config, processes, precision, spec, self.first)

    def network(self) -> tuple[Detector, list[str]]:
        return planning.build_detector(self.plan)

    def open(self, known_bad: list[BadImage]) -> None:
        self.loader = planning.loader_of(
            self.config,
            self.plan.train,
            self.plan.views,
            distributed.rank(),
            distributed.world_size(),
            first=self.first,
            **self.loader_options(known_bad),
        )

    @staticmethod
    def losses(network: Detector, batch: Given) -> dict[str, Tensor]:
        """`rpn_class`, `rpn_box`, `class`, `box` and `mask`, one number each."""
        H, W = batch.images.shape[2:]
        levels = network.backbone(batch.images)
        found = network.losses_of(levels, (H, W), batch.shown, batch.objects, batch.drawing)
        return {name: loss.sum() for name, loss in found.items()}

    def on_device(self, batch: DetectionBatch) -> Given:
        pixels, shown, objects = batch.together()
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = transfer.to_device(pixels, self.device)
        return Given(
            self.plan.views.finish(pixels, shown),
            shown,
            [own.to(self.device) for own in objects],
            Drawing(
                self._generators(batch),
                distributed.mean if distributed.world_size() > 1 else None,
            ),
        )

    def _generators(self, batch: DetectionBatch) -> list[torch.Generator]:
        """One of each image, whose draws follow from the seed, the step and the image."""
        places = [np.full(len(batch.indices), batch.iteration), batch.indices, batch.repeats]
        seeds = rng.raw_of_places(
            rng.Stream.REGIONS,
            self.config.train.seed,
            np.stack(places, axis=-1).astype(np.uint64),
            1,
        )
        found = []
        for number in seeds[:, 0].tolist():
            generator = torch.Generator(self.device)
            generator.manual_seed(number >> 1)  # it takes 63 bits everywhere
            found.append(generator)
        return found

    def draw(self, batch: Given, path: Path) -> None:
        """The first images, and what is to be found in them."""
        views = self.plan.views
        places = [*shown_places(self.plan.train.channels)]
        places *= 1 if len(places) == 3 else 3  # grey
        mean, std = (torch.tensor(told)[places].view(-1, 1, 1) for told in (views.mean, views.std))
        pictures = []
        for image, shown, own in zip(batch.images, batch.shown, batch.objects, strict=True):
            h, w = shown.size
            pixels = (image[places, :h, :w].cpu() * std + mean).clamp(0, 1).mul(255).round()
            masks = own.masks[:, :h, :w].cpu().bool().any(0)
            pixels[:, masks] = 0.6 * pixels[:, masks] + 0.4 * torch.tensor([[255.0], [64.0], [0.0]])
            picture = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
            pen = ImageDraw.Draw(picture)
            for box in own.boxes.tolist():
                pen.rectangle(box, outline=(255, 255, 0), width=max(1, max(h, w) // 200))
            picture.thumbnail((DRAWN_SIDE, DRAWN_SIDE))
            pictures.append(picture)
        _save_beside(pictures[:DRAWN], path)

    def weights_facts(self, iteration: int) -> dict[str, Any]:
        """With the numbers of the classes in COCO's files, which predictions have as well."""
        ids = self.plan.train.annotations.category_ids.tolist()
        return super().weights_facts(iteration) | {"category_ids": ids}

    @property
    def test_views(self) -> Views:
        return self.plan.views


def _save_beside(pictures: list[Image.Image], path: Path) -> None:
    """Pictures side by side, as a PNG file."""
    gap = 4
    width = sum(picture.width + gap for picture in pictures) - gap
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    with world(f"write {path}"), written_beside(path) as beside:
        sheet.save(beside, "PNG")
