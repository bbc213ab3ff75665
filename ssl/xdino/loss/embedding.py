"""What objectives without prototypes have in common, and two numbers that say whether they learn.

Nothing here has a temperature, a centre or prototypes, so entropy and ln K say nothing of it. With z
the teacher's embeddings of the global views, m their mean over views and images, and z_i the mean of an
image's views,

    spread    = mean |z - m|^2                  0: every image has the same embedding
    agreement = 1 - G / (G - 1) mean |z - z_i|^2 / spread
                                                1: an image's views have the same embedding
                                                0: they are no more alike than those of strangers

The teacher's, since it is what is judged; the student is the noisier the higher its learning rate.

Letters: as in `objective`.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from xdino.loss.objective import Objective, in_full


class EmbeddingLoss(Objective):
    """An objective on the embeddings themselves, `[V, B, d]`.

    Its statistics are the mean embedding, the mean square and the mean square within an image:
    S = d + 2. `unit_spread`: the spread that the objective drives at, reported as 1.
    """

    of_prototypes = False
    name = ""

    def __init__(self, width: int, unit_spread: float = 1.0) -> None:
        super().__init__(statistics=width + 2)
        self.unit_spread = unit_spread
        self.views = 2
        self._moments = self.blank()

    @torch.no_grad()
    def moments(self, teacher: Tensor) -> Tensor:
        """Of the teacher's embeddings `[G, B, d]`: `[d + 2]`."""
        self.views = len(teacher)
        z = in_full(teacher)
        within = (z - z.mean(0)).square().sum(-1).mean()
        square = z.square().sum(-1).mean()
        return torch.cat([z.mean((0, 1)), square[None], within[None]])

    def update(self, statistics: Tensor, broken: Tensor | None = None) -> None:
        self._moments = statistics

    def diagnose(self, loss: float, told: Mapping[str, float]) -> dict[str, float]:
        mean, (square, within) = self._moments[:-2].double(), self._moments[-2:].tolist()
        spread = max(square - mean.square().sum().item(), 1e-12)
        unlike = within * self.views / max(self.views - 1, 1)
        return {**told, "spread": spread / self.unit_spread, "agreement": 1 - unlike / spread}

    def notices(self) -> Iterator[str]:
        yield (
            f"loss.objective {self.name} has no prototypes, temperatures or centre: head.prototypes, "
            "head.norm_last_layer, optim.freeze_last_layer and what loss says of those have no part in it"
        )
