"""DINO with targets by Sinkhorn-Knopp in place of the centre (SwAV, arXiv 2006.09882, section 3.1; as
in DINOv2, arXiv 2304.07193, section 4).

The teacher's targets of a batch are to use every prototype equally. With teacher logits t and the
temperature tau, SwAV's equation 3 asks for Q = diag(r) exp(t / tau) diag(c) whose prototypes each have
the mass 1 / K and whose images each 1 / R; a few rounds of normalising the one and the other find it.
Ending with the images, as published,

    q_bk = softmax over k of (t_bk / tau + log r_k) = softmax over k of ((t_bk - centre_k) / tau)

with centre_k = -tau log r_k: DINO's target with a centre made anew for every batch. So the loss in chunks
does the rest. Everything is kept as logarithms, where exp(t / tau) of a cold teacher would overflow.

Nothing is remembered: there is no centre in the state, and `loss.centre_momentum` has no part. As in
DINOv2 all global views of a batch are balanced together.

Letters: as in `dino`; R rows, global views x images of all processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from xdino.loss.dino import PrototypeLoss
from xdino.runtime import collectives


@torch.no_grad()
def sinkhorn_centre(teacher_logits: Tensor, teacher_temp: float, iterations: int = 3) -> Tensor:
    """The centre that makes DINO's softmax Sinkhorn-Knopp's: `[1, K]`, in the logits' precision.

    Args:
        teacher_logits: `[..., K]`, at least float32; those of other processes are counted in.
        iterations: rounds, at least one. Each sees every logit twice.
    """
    scores = teacher_logits.reshape(-1, teacher_logits.shape[-1]) / teacher_temp  # [R, K]
    of_rows = scores.new_zeros(len(scores), 1)  # log c
    for last in range(iterations - 1, -1, -1):
        of_prototypes = -collectives.log_sum_exp(scores + of_rows)  # log r, [K]
        if last:
            of_rows = -torch.logsumexp(scores + of_prototypes, dim=1, keepdim=True)
    return (of_prototypes * -teacher_temp)[None]


class SinkhornLoss(PrototypeLoss):
    """DINO's loss with targets by Sinkhorn-Knopp.

    The teacher's logits exist whole for that: 4 G B K bytes, 34 MB at 64 images and 65,536 prototypes.

    Args:
        iterations: rounds of normalising; three, as published.
    """

    def __init__(self, student_temp: float = 0.1, iterations: int = 3) -> None:
        super().__init__(student_temp)
        self.iterations = iterations

    def centre_of(self, logits: Callable[[], Tensor], teacher_temp: float) -> Tensor:
        return sinkhorn_centre(logits(), teacher_temp, self.iterations)
