"""The moving average of a network's weights, as timm's ModelEma keeps it: parameters and buffers."""

import copy

import torch
from torch import nn


class ModelEma:
    """`network` follows another one: `decay` of itself, 1 - `decay` of the other, after every step.

    Whole numbers (counts of batches) are averaged too, and cut to whole numbers, as published.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99996) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        own, others = self.network.state_dict(), network.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        averages = [own[name] for name in floats]
        torch._foreach_mul_(averages, self.decay)
        torch._foreach_add_(averages, [others[name] for name in floats], alpha=1 - self.decay)
        for name in own.keys() - floats:
            own[name].copy_(own[name] * self.decay + (1 - self.decay) * others[name])
