"""DINO's projection head (arXiv 2104.14294, section 3.1 and appendix C).

An MLP, l2 normalisation, and a weight-normalised linear layer onto the prototypes. Parameters carry
the published names (`mlp.0.weight`, ..., `last_layer.weight_g`, `last_layer.weight_v`).

Letters: B crops, D width of the backbone, K prototypes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `weight_g * weight_v / |weight_v|`."""

    def __init__(self, in_features: int, out_features: int, train_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def weight(self) -> Tensor:
        """The effective weight `[K, in_features]`."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


class DINOHead(nn.Module):
    """Class tokens `[B, D]` -> prototype logits `[B, K]`.

    Args:
        out_dim: K; None for a head that ends at its bottleneck (`last_layer` is None then).
        norm_last_layer: keep the prototypes on the unit sphere (their gains stay at 1, untrained).
            Steadier; switching it off does better for small networks (DINO, appendix).
        use_bn: BatchNorm after every hidden linear layer.
        unit: normalise the bottleneck.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        norm_last_layer: bool = True,
        use_bn: bool = False,
        unit: bool = True,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers must be at least 1, got {nlayers}")
        self.unit = unit
        self.mlp: nn.Module
        if nlayers == 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for width in [in_dim] + [hidden_dim] * (nlayers - 2):
                layers.append(nn.Linear(width, hidden_dim))
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
            layers.append(nn.Linear(hidden_dim, bottleneck_dim))
            self.mlp = nn.Sequential(*layers)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer: WeightNormLinear | None = None
        if out_dim is not None:
            gain = not norm_last_layer
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_gain=gain)

    def embed(self, x: Tensor) -> Tensor:
        """The normalised bottleneck `[B, bottleneck_dim]`, which the prototypes are compared with."""
        bottleneck: Tensor = self.mlp(x)
        return F.normalize(bottleneck, dim=-1) if self.unit else bottleneck

    def forward(self, x: Tensor) -> Tensor:
        bottleneck = self.embed(x)
        return bottleneck if self.last_layer is None else self.last_layer(bottleneck)
