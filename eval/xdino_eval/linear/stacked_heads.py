"""Many linear classifiers trained side by side on the same features.

Letters: N images, B images of a batch, D width, K classes, G heads on one choice of features.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from xdino_eval.accuracy import ranks
from xdino_eval.features import Progress
from xdino_eval.linear.probe_state import Unfinished
from xdino_eval.linear.sgd import Sgd

SCORED_AT_ONCE = 1 << 23  # numbers in the logits [b, G, K] of one block of images
THREAD_PAYS = 1e7  # multiplications of a thread in one product: half a millisecond of a core
NAMES = ("weight", "bias", "weight_momentum", "bias_momentum")

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""An epoch's (features [B, D], classes int64 [B]), by the number of the epoch."""


class Heads:
    """G linear classifiers of one feature, each with its own learning rate and weight decay.

    The gradient of cross-entropy is written out: for logits z = W x + b it is (softmax(z) - onehot)
    x^T. As all heads see the same batch, the logits of all are one product, their gradients another
    (which adds itself to the momentum), and the update is one pass over the stack. From 30 classes
    on the two products are 70 to 90 % of a step: G heads are then close to G times the arithmetic,
    and only more cores, or an accelerator, make a grid much cheaper than that.

    weight: [G, K, D]. bias: [G, K, 1]. `momenta`: of the same shapes.
    """

    def __init__(self, start: nn.Linear, weight_decays: Tensor) -> None:
        """All heads begin as `start`. weight_decays: [G], on the device of `start`."""
        heads = len(weight_decays)
        self.weight = start.weight.detach().repeat(heads, 1, 1)
        self.bias = start.bias.detach()[:, None].repeat(heads, 1, 1)
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.decay = weight_decays.view(-1, 1, 1) if weight_decays.any() else None

    def part(self, heads: slice) -> "Heads":
        """Some of the heads, in the same memory."""
        some = object.__new__(Heads)
        some.weight, some.bias = self.weight[heads], self.bias[heads]
        some.momenta = self.momenta[0][heads], self.momenta[1][heads]
        some.decay = None if self.decay is None else self.decay[heads]
        return some

    def logits(self, x: Tensor) -> Tensor:
        """Features [B, D] -> [G, K, B]."""
        G, K, D = self.weight.shape
        return torch.addmm(self.bias.view(G * K, 1), self.weight.view(G * K, D), x.T).view(G, K, -1)

    def step(self, x: Tensor, target: Tensor, lr: Tensor, momentum: float) -> None:
        """One update of all heads, as `torch.optim.SGD` makes it.

        Args:
            x: float32 [B, D]. target: int64 [B]. lr: [G, 1, 1].
        """
        G, K, D = self.weight.shape
        slope = self.logits(x).softmax(1)  # [G, K, B]
        minus_one = slope.new_full((1, 1, 1), -1.0).expand(G, 1, len(x))
        slope.scatter_add_(1, target.expand(G, 1, -1), minus_one)
        of_weight, of_bias = self.momenta
        of_weight.view(G * K, D).addmm_(slope.view(G * K, -1), x, beta=momentum, alpha=1 / len(x))
        of_bias.mul_(momentum).add_(slope.mean(2, keepdim=True))
        for value, velocity in zip((self.weight, self.bias), self.momenta, strict=True):
            if self.decay is not None:
                velocity.addcmul_(value, self.decay)
            value.addcmul_(velocity, lr, value=-1)

    def finite(self) -> Tensor:
        """bool [G]: the heads that have not diverged."""
        return self.weight.isfinite().all(2).all(1) & self.bias.isfinite().all(2).all(1)

    def head(self, place: int) -> nn.Linear:
        """One of the classifiers, by itself."""
        _, classes, width = self.weight.shape
        head = nn.utils.skip_init(nn.Linear, width, classes, device=self.weight.device)
        with torch.no_grad():
            head.weight.copy_(self.weight[place])
            head.bias.copy_(self.bias[place, :, 0])
        return head

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return dict(zip(NAMES, (self.weight, self.bias, *self.momenta), strict=True))


def train_heads(
    stacks: dict[str, Heads],
    batches: Batches,
    columns: dict[str, slice],
    lrs: Sequence[float],
    how: Sgd,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
    threads: int = 1,
) -> int:
    """`linear.train_head` for a grid: trains `stacks` in place, returns the epoch it began with.

    A head that diverges hurts no other.

    Args:
        stacks: by choice of features. columns: where each finds them in the batches.
        lrs: of the G heads of every stack, each as `Sgd.lr`.
        threads: share the heads out among so many, each with the whole epoch to itself: no thread
            waits for another but at the end of an epoch. Every one of them asks for its own
            `batches`, so this is for features that are cheap to come by.
    """
    start, kept = unfinished.load() if unfinished else (0, {})
    state = {f"{a}.{b}": t for a, heads in stacks.items() for b, t in heads.tensors().items()}
    for name, value in kept.items():
        state[name].copy_(value)
    shares = [share for share in np.array_split(np.arange(len(lrs)), threads) if len(share)]
    before = torch.get_num_threads()
    if len(shares) > 1:
        torch.set_num_threads(1)  # of each share's own products
    try:
        with ThreadPoolExecutor(len(shares), thread_name_prefix="heads") as pool:
            for epoch in range(start, how.epochs):
                rates = torch.tensor([replace(how, lr=lr).lr_at(epoch) for lr in lrs])

                def train(share: np.ndarray, epoch: int = epoch, rates: Tensor = rates) -> None:
                    some = slice(int(share[0]), int(share[-1]) + 1)
                    parts = {name: heads.part(some) for name, heads in stacks.items()}
                    _epoch(parts, batches(epoch), columns, rates[some], how.momentum)

                if len(shares) == 1:
                    train(shares[0])
                else:
                    list(pool.map(train, shares))
                if unfinished and epoch + 1 < how.epochs:
                    unfinished.save(epoch + 1, state)
                if progress:
                    progress(epoch + 1, how.epochs)
    finally:
        torch.set_num_threads(before)
    return start


def _epoch(
    stacks: dict[str, Heads],
    batches: Iterator[tuple[Tensor, Tensor]],
    columns: dict[str, slice],
    rates: Tensor,
    momentum: float,
) -> None:
    lr: Tensor | None = None
    for x, target in batches:
        if lr is None:
            lr = rates.to(x.device).view(-1, 1, 1)
        for name, heads in stacks.items():
            heads.step(x[:, columns[name]], target, lr, momentum)


def threads_for(stacks: dict[str, Heads], batch_size: int, cores: int) -> int:
    """How many threads are worth sharing the heads out among; 1 on an accelerator."""
    weights = [heads.weight for heads in stacks.values()]
    if any(weight.device.type != "cpu" for weight in weights):
        return 1
    multiplications = batch_size * sum(weight.numel() for weight in weights)
    return max(1, min(cores, len(weights[0]), int(multiplications / THREAD_PAYS)))


@torch.no_grad()
def top1_of_heads(heads: Heads, x: Tensor, target: Tensor) -> list[float | None]:
    """Top-1 in per cent of each head on features [N, D] and classes [N]; None where it diverged."""
    G, K, _ = heads.weight.shape
    hits = torch.zeros(G, dtype=torch.int64, device=x.device)
    fine = heads.finite()
    for rows in torch.arange(len(x), device=x.device).split(max(1, SCORED_AT_ONCE // (G * K))):
        scores = heads.logits(x[rows]).transpose(1, 2)  # [G, b, K]
        fine &= scores.isfinite().all(2).all(1)  # large weights that are finite still overflow
        rank = ranks(scores.reshape(-1, K), target[rows].repeat(G))
        hits += (rank.view(G, -1) < 1).sum(1)
    top1 = (100.0 * hits / len(x)).tolist()
    return [value if kept else None for value, kept in zip(top1, fine.tolist(), strict=True)]
