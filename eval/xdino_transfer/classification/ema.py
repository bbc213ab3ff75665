"""The moving average of a network's weights, as timm's ModelEma keeps it: parameters and buffers."""

import copy

import torch
from torch import Tensor, nn


class ModelEma:
    """`network` follows another one: `decay` of itself, 1 - `decay` of the other, after every step.

    Whole numbers (counts of batches) are averaged too, and cut to whole numbers, as published.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99996) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, still: Tensor | None = None) -> None:
        """still: a flag on the device; where it is set, the average stays as it is."""
        own, others = self.network.state_dict(), network.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        averages = [own[name] for name in floats]
        if still is None:
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, [others[name] for name in floats], alpha=1 - self.decay)
        else:
            share = torch.where(still, 0.0, 1 - self.decay)
            torch._foreach_mul_(averages, 1 - share)
            torch._foreach_add_(averages, torch._foreach_mul([others[n] for n in floats], share))
        for name in own.keys() - floats:
            new = (own[name] * self.decay + (1 - self.decay) * others[name]).to(own[name].dtype)
            own[name].copy_(new if still is None else torch.where(still, own[name], new))
