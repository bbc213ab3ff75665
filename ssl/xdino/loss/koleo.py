"""KoLeo: the embeddings of different images are pushed apart (Kozachenko-Leonenko estimator of their
entropy; Sablayrolles et al., arXiv 1806.03198, equation 2; weight 0.1 in DINOv2, arXiv 2304.07193).

    L_koleo = -1 / n  sum_i  log(min over j != i of |x_i - x_j|)

over the n images of a batch, on the l2-normalised class tokens of the student's backbone, before its
head. As in DINOv2 each global view is compared with the other images' same view, and the views' losses
are added. DINOv2's trainer looks for the nearest image among those of one process; here they are those of
all processes, so that two give what one gives.

Letters: as in `objective`; n images over all processes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xdino.loss.objective import Measured, Objective, Views, in_full
from xdino.runtime import collectives, distributed

EPSILON = 1e-8  # DINOv2's, at each place where it has one


def koleo(tokens: Tensor) -> Tensor:
    """KoLeo of one view's class tokens `[B, D]`: a scalar, at least float32, with gradient.

    The mean is over the images of this process; their neighbours are sought on all processes.

    Raises:
        ValueError: a single image, which has no neighbour.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        x = F.normalize(in_full(tokens), eps=EPSILON, dim=-1)
        every = collectives.of_all(x)  # [n, D]
        if len(every) < 2:
            raise ValueError("KoLeo needs at least two images")
        with torch.no_grad():
            near = x @ every.T
            near.diagonal(distributed.rank() * len(x)).fill_(-torch.inf)  # an image itself
            nearest = near.argmax(dim=1)
        apart = F.pairwise_distance(x, every[nearest], eps=EPSILON)
        return -torch.log(apart + EPSILON).mean()


class WithKoLeo(Objective):
    """Another objective plus `weight` times KoLeo, whose sum over the global views `metrics` call
    koleo; the other's columns are those of its own part of the loss."""

    def __init__(self, objective: Objective, weight: float) -> None:
        super().__init__()
        self.objective, self.weight = objective, weight
        self.of_prototypes, self.unit = objective.of_prototypes, objective.unit
        self.watched, self.recordable = objective.watched, objective.recordable

    def blank(self) -> Tensor:
        return self.objective.blank()

    def measure(self, views: Views) -> Measured:
        found = self.objective.measure(views)
        views_seen = views.tokens[: len(views.teacher)]
        spread = torch.stack([koleo(tokens) for tokens in views_seen]).sum()
        told = {**found.told, "koleo": spread.detach()}
        return replace(found, loss=found.loss + self.weight * spread, told=told)

    def pairs(self, views: Views) -> Tensor:
        return self.objective.pairs(views)

    def update(self, statistics: Tensor, broken: Tensor | None = None) -> None:
        self.objective.update(statistics, broken)

    def diagnose(self, loss: float, told: Mapping[str, float]) -> dict[str, float]:
        spread = told["koleo"]
        others = {name: value for name, value in told.items() if name != "koleo"}
        return {**self.objective.diagnose(loss - self.weight * spread, others), "koleo": spread}

    def kept(self) -> dict[str, Tensor]:
        return self.objective.kept()

    def state(self) -> dict[str, Any]:
        return self.objective.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.objective.restore(state)

    def notices(self) -> Iterator[str]:
        yield from self.objective.notices()
