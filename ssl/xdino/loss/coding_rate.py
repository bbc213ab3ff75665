"""SimDINO: a coding rate in place of prototypes, centre and temperatures (arXiv 2502.10385).

With unit embeddings z, the student's views v against the teacher's g,

    L = -(mean over g, v != g, images of  z_v . z_g) - gamma R
    R = 1/2 log det(I + d / eps  C),    C = mean over n images of z z^T

R is the coding rate (Ma et al. 2007): the larger, the more of the space the images fill, which is what
keeps them from falling onto one point. It is taken for each global view and averaged, of the mean of the
student's and the teacher's embedding of that view, as in the published SimDINO (its `expa_type` 1, which
it advises against spikes); gamma = (d + n) / (d n) as there. The paper's squared distance is the first
term plus a constant.

The published trainer leaves C to each process by default, with n of them all; here C is that of all
processes' images (its `reduce_cov` 1), so that two processes give what one gives.

Letters: as in `objective`; n images over all processes.
"""

import torch
from torch import Tensor

from xdino.loss.embedding import EmbeddingLoss
from xdino.loss.objective import Measured, Views, in_full
from xdino.runtime import collectives, distributed


def coding_rate(z: Tensor, eps: float) -> Tensor:
    """R of embeddings `[B, d]` with those of all other processes, in nats: a scalar with gradient."""
    B, d = z.shape
    second_moment = collectives.mean_with_gradient(z.T @ z / B)  # [d, d]
    eye = torch.eye(d, device=z.device, dtype=z.dtype)
    factor, _ = torch.linalg.cholesky_ex(eye + d / eps * second_moment)
    return factor.diagonal().log().sum()


class SimDINOLoss(EmbeddingLoss):
    """The loss above.

    Args:
        width: d.
        eps: of the coding rate: the square of the precision that it counts in, 0.05 as published.
        weight: gamma; None for the published (d + n) / (d n).
    """

    name = "simdino"

    def __init__(self, width: int, eps: float = 0.05, weight: float | None = None) -> None:
        super().__init__(width)
        self.eps, self.weight = eps, weight

    def measure(self, views: Views) -> Measured:
        with torch.autocast(views.student.device.type, enabled=False):
            student, teacher = in_full(views.student), in_full(views.teacher)
            (V, B, d), G = student.shape, len(teacher)
            alike = torch.einsum("gbd,vbd->gv", teacher, student) / B  # [G, V]
            agreement = (alike.sum() - alike.diagonal().sum()) / (G * (V - 1))
            halfway = (student[:G] + teacher) / 2
            rate = torch.stack([coding_rate(z, self.eps) for z in halfway]).mean()
            n = B * distributed.world_size()
            gamma = (d + n) / (d * n) if self.weight is None else self.weight
            loss = -agreement - gamma * rate
        told = {"cosine": agreement.detach(), "coding_rate": rate.detach()}
        return Measured(loss, self.moments(teacher), told)

    def pairs(self, views: Views) -> Tensor:
        """Minus the cosines, means over the images: `[G, V]`."""
        alike = torch.einsum("gbd,vbd->gv", in_full(views.teacher), in_full(views.student))
        return -alike / views.teacher.shape[1]
