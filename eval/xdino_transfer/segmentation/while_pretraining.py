"""Patch probes as evaluators of a run that pretrains: `evaluate.protocols` names them.

    chosen = probes(("patch-knn",), "ADE20K", limit=1000)
    rows = chosen["patch-knn"](backbone, train, val, options)

They look at pictures with masks of their own (`evaluate.masks`) instead of the two sources, learn from
those of train/ and are scored on those of val/; no generator of random numbers is drawn from.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from xdino.backbone import Backbone
from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino_eval.evaluators import PATCH_PROBES
from xdino_eval.extraction import Options
from xdino_eval.results import Row
from xdino_transfer.segmentation.maps import Maps, open_maps
from xdino_transfer.segmentation.patch_probe import METHODS, PatchProbe


@dataclass
class OfMasks:
    """A patch probe that is asked as every evaluator is, and remembers what it found last.

    rows: of the last network. weights: a digest of its numbers, "" before the first.
    """

    probe: PatchProbe
    train: Maps
    val: Maps
    rows: list[Row] = field(default_factory=list)
    weights: str = ""

    def __call__(
        self, backbone: Backbone, train: Source, val: Source, options: Options
    ) -> list[Row]:
        self.rows = self.probe(backbone, self.train, self.val)
        self.weights = digest(backbone)
        return self.rows

    def of(self, backbone: Backbone) -> list[Row]:
        """The rows of a network; those of the last one again where its numbers are the same."""
        if self.weights != digest(backbone):
            self.rows = self.probe(backbone, self.train, self.val)
            self.weights = digest(backbone)
        return self.rows


def digest(network: torch.nn.Module) -> str:
    """Of all names and numbers of a network."""
    found = hashlib.blake2b()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def probes(names: Iterable[str], data: str, limit: int) -> dict[str, OfMasks]:
    """Those of the names that are patch probes, on `limit` pictures at most of each split.

    Raises:
        UsageError: `data` holds no pictures with masks.
    """
    wanted = [name for name in names if name in PATCH_PROBES]
    if not wanted:
        return {}
    try:
        train, val = (_some(maps, limit) for maps in open_maps(data))
    except UsageError as error:
        raise UsageError(
            f"evaluate.protocols asks for {', '.join(wanted)}, which needs pictures with masks: {error}. "
            "Name them with --evaluate.masks"
        ) from None
    return {
        name: OfMasks(PatchProbe(METHODS[name.removeprefix("patch-")]()), train, val)
        for name in wanted
    }


def _some(maps: Maps, limit: int) -> Maps:
    """At most so many pictures, evenly spread and always the same ones."""
    if len(maps) <= limit:
        return maps
    chosen = np.linspace(0, len(maps) - 1, limit).round().astype(int).tolist()
    images, masks = ([paths[i] for i in chosen] for paths in (maps.images, maps.masks))
    return dataclasses.replace(maps, images=images, masks=masks)
