"""What goes on between the tokens of a backbone: attention on patches, where these lie, their mean.

`xdino.backbone.Backbone` says what each family has; here is what evaluations make of it, the same
for all. XCiT (El-Nouby et al. 2021, https://arxiv.org/abs/2106.09681) has a class token that asks the
patches in its class-attention layers (section 3.3); vision transformers have one in every block.

Letters: B images, C channels, H heads, N patches, P tokens before them, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xdino.backbone import Backbone
from xdino.errors import UsageError

FEATURES = ("class", "patches", "both")


@dataclass(frozen=True)
class Lattice:
    """Where the patches lie: the upper left edge of the first and their spacing, (y, x) each.

    In shares of the image's height and width, so that it holds at any resolution.
    """

    start: tuple[float, float]
    step: tuple[float, float]


def lattice(backbone: Backbone, height: int, width: int) -> Lattice:
    """Where the patches of an image of this size (before `Backbone.fitting`) lie.

    XCiT's patch i is centred on pixel i * patch: every stride-2 convolution of the stem (kernel 3,
    padding 1) is centred on its even inputs. A vision transformer's patch i begins there.

    Raises:
        UsageError: the backbone has no patches.
    """
    p, first = backbone.require_patches(), backbone.patch_start
    return Lattice((first / height, first / width), (p / height, p / width))


def attention_on_patches(
    backbone: Backbone, images: Tensor, layers: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """How much the class token attends to each patch: layer, from 1 -> float32 [B, H, N].

    Tokens that are no patches (the class token itself, registers) are left out of what is
    returned, not of the softmax: the weights of a head sum to less than 1.

    Args:
        images: [B, C, H, W], normalised, of a size that `Backbone.fitting` leaves alone.
        layers: as `Backbone.attention_layers`.

    Raises:
        UsageError: no such layer, or a backbone without a class token that attends to patches.
    """
    numbers = backbone.attention_layers(layers)
    maps = backbone.class_attention(images, numbers)
    first = backbone.num_prefix_tokens
    return {i: weights[..., first:].float() for i, weights in zip(numbers, maps, strict=True)}


def needs_both(features: Sequence[str]) -> bool:
    return len(features) > 1 or "both" in features


class PooledTokens(nn.Module):
    """What a choice of features needs of a backbone, in one forward pass.

    `[B, C, H, W]` -> the class token ("class"), the mean patch token ("patches"), or the two in a
    row ("both", or more than one choice), `[B, D or 2 D]`.

    Raises:
        UsageError: patch tokens are asked for and the backbone gives none.
    """

    def __init__(self, backbone: Backbone, features: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.features = backbone, tuple(features)
        if self.features != ("class",) and not backbone.has_patch_tokens:
            raise UsageError(
                f"features {', '.join(self.features)} need patch tokens, and a {backbone.kind} "
                'gives none: choose "class"'
            )

    def forward(self, images: Tensor) -> Tensor:
        if self.features == ("class",):
            return self.backbone(images)
        token, patches = self.backbone.tokens(images)
        mean = patches.flatten(1, 2).mean(1, dtype=torch.float32)  # [B, D]
        return torch.cat((token.float(), mean), 1) if needs_both(self.features) else mean
