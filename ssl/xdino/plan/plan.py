"""What a configuration comes to, given the data and the number of processes."""

from dataclasses import dataclass

import torch

from xdino import augment, data
from xdino.backbones import BackboneSpec
from xdino.config import Config
from xdino.schedules import Schedules


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to, given the data and the number of processes."""

    config: Config
    source: data.Source
    crops: augment.MultiCrop
    spec: BackboneSpec
    schedules: Schedules
    device: torch.device
    precision: str
    total_batch: int
    steps_per_epoch: int
    early_crops: augment.MultiCrop | None = None  # of the first `early_iterations`
    early_iterations: int = 0
    state_bytes: int = 0  # about the size of a checkpoint

    @property
    def iterations(self) -> int:
        return len(self.schedules)
