"""SIGReg: embeddings that look like an isotropic Gaussian (LeJEPA, arXiv 2511.08544, algorithms 1 and 2).

With embeddings z (not normalised) of all views v, c_i the mean of image i's global views,

    L = (1 - lambda) mean over v, images, dimensions of (z - c)^2  +  lambda mean over v of SIGReg(z_v)
    SIGReg(z) = mean over directions a of  n integral |phi_a(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

with phi_a(t) = mean over n images of exp(i t a.z), the empirical characteristic function along a random
unit direction: the test of Epps and Pulley. The integral over [-3, 3] is the authors' trapezoid sum with
17 points on the half that symmetry leaves, their weights included (the point at 0 counts half, as the
one at the end).

The teacher has no part in the loss; it is the moving average of the student that is judged and exported.
Its forward pass stays, for its BatchNorms.

Letters: as in `objective`; n images over all processes, A directions, T points.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xdino.loss.embedding import EmbeddingLoss
from xdino.loss.objective import Measured, Views, in_full
from xdino.runtime import collectives, distributed

LAST, POINTS = 3.0, 17  # of the integral's half


def directions(width: int, count: int, seed: int) -> Tensor:
    """Random unit vectors `[width, count]`, the same on every process and device."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=0)


def epps_pulley(projected: Tensor) -> Tensor:
    """The test of `[V, B, A]` along B and all processes against the standard normal: `[V, A]`."""
    t = torch.linspace(0, LAST, POINTS, device=projected.device, dtype=projected.dtype)
    window = torch.exp(-t.square() / 2)
    share = torch.full_like(t, 2 * LAST / (POINTS - 1))
    share[0] = share[-1] = LAST / (POINTS - 1)
    angle = projected[..., None] * t  # [V, B, A, T]
    parts = torch.stack([angle.cos().mean(1), angle.sin().mean(1)])  # [2, V, A, T]
    real, imaginary = collectives.mean_with_gradient(parts)
    apart = (real - window).square() + imaginary.square()
    return apart @ (share * window) * (projected.shape[1] * distributed.world_size())


class SIGRegLoss(EmbeddingLoss):
    """The loss above. Its one piece of state is how many steps were made: it seeds the directions.

    Args:
        width: d.
        weight: lambda; 0.05 as published.
        slices: A; 256 in the authors' smallest example, 1024 in their larger ones.
    """

    unit = False
    recordable = False  # every step has its own directions
    name = "sigreg"

    def __init__(self, width: int, weight: float = 0.05, slices: int = 256) -> None:
        super().__init__(width, unit_spread=width)
        self.weight, self.slices, self.steps = weight, slices, 0

    def measure(self, views: Views) -> Measured:
        with torch.autocast(views.student.device.type, enabled=False):
            z, G = in_full(views.student), len(views.teacher)
            invariance = (z - z[:G].mean(0)).square().mean()
            along = directions(z.shape[-1], self.slices, self.steps).to(z)
            normality = epps_pulley(z @ along).mean()
            loss = (1 - self.weight) * invariance + self.weight * normality
        told = {"invariance": invariance.detach(), "sigreg": normality.detach()}
        return Measured(loss, self.moments(views.teacher), told)

    def pairs(self, views: Views) -> Tensor:
        """Mean squares of the differences between the student's views: `[G, V]`."""
        z = in_full(views.student)
        return torch.stack([(z - g).square().mean((1, 2)) for g in z[: len(views.teacher)]])

    def update(self, statistics: Tensor, broken: Tensor | None = None) -> None:
        super().update(statistics, broken)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
