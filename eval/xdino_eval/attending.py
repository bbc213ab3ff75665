"""What goes on between the tokens of a backbone: attention weights, channel matrices, where patches lie.

One face for two families. XCiT (El-Nouby et al. 2021, https://arxiv.org/abs/2106.09681) has a class
token that asks the patches in its class-attention layers (section 3.3; CaiT,
https://arxiv.org/abs/2103.17239); its own attention, XCA (section 3.2, equation 4), is between
channels and has no map. Vision transformers of timm have a class token in every block; DINO
(https://arxiv.org/abs/2104.14294, figure 1) looks at it in the last one. timm fuses the softmax
into one kernel that hands out no weights, so they are computed here from the block's own input.

Letters: B images, H heads, N patches, M = N + P tokens with P before the patches (class, registers),
D width, d channels a head, (h, w) patch grid.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from xdino.errors import UsageError
from xdino.xcit import NORM_EPS, XCA, XCiT

Weights = dict[int, Tensor]
"""Number of a layer, from 1 -> attention weights [B, H, N] of its class token on the patches."""


@dataclass(frozen=True)
class Lattice:
    """Where the patches lie: the upper left edge of the first and their spacing, (y, x) each.

    In shares of the image's height and width, so that it holds at any resolution.
    """

    start: tuple[float, float]
    step: tuple[float, float]


def patch_size(backbone: nn.Module) -> int:
    """The side of a patch in pixels; 1 where the backbone does not say."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    if isinstance(backbone, XCiT):
        size = backbone.patch_size
    return int(max(size)) if isinstance(size, tuple) else int(size)


def grid(backbone: nn.Module, height: int, width: int) -> tuple[int, int]:
    """The patch grid (h, w) of an image of this size in pixels, by the backbone's own rule.

    Raises:
        UsageError: the backbone has no grid of patches.
    """
    if isinstance(backbone, XCiT):
        return backbone.grid(height, width)
    _vit(backbone)
    h, w = backbone.patch_embed.dynamic_feat_size((height, width))  # type: ignore[union-attr, operator]
    return int(h), int(w)


def fitting(backbone: nn.Module, images: Tensor) -> Tensor:
    """`images` [B, C, H, W] without the pixels right and below that the backbone has no patch for.

    XCiT's stem takes any size. A vision transformer takes whole patches: the rest is cut off, as in
    DINO's published pictures.
    """
    if isinstance(backbone, XCiT):
        return images
    _vit(backbone)
    if backbone.patch_embed.dynamic_img_pad:  # type: ignore[union-attr]
        return images
    p = patch_size(backbone)
    return images[..., : images.shape[2] // p * p, : images.shape[3] // p * p]


def lattice(backbone: nn.Module, height: int, width: int) -> Lattice:
    """Where the patches of an image of this size (before `fitting`) lie.

    XCiT's patch i is centred on pixel i * patch: every stride-2 convolution of the stem (kernel 3,
    padding 1) is centred on its even inputs. A vision transformer's patch i begins there.
    """
    p = patch_size(backbone)
    first = 0.5 - p / 2 if isinstance(backbone, XCiT) else 0.0
    return Lattice((first / height, first / width), (p / height, p / width))


def class_attention(
    backbone: nn.Module, images: Tensor, layers: Sequence[int] | None = None
) -> Weights:
    """How much the class token attends to each patch: softmax weights, float32.

    Tokens that are no patches (the class token itself, registers) are left out of what is
    returned, not of the softmax: the weights of a head sum to less than 1.

    Args:
        images: [B, C, H, W], normalised, of a size that `fitting` leaves alone.
        layers: numbers from 1: class-attention layers of an XCiT, blocks of a vision transformer.
            None = all of an XCiT, the last of a vision transformer.

    Raises:
        UsageError: no such layer, or a backbone without a class token that attends to patches.
    """
    if isinstance(backbone, XCiT):
        numbers = _chosen(layers, len(backbone.cls_attn_blocks), "class-attention layer")
        maps = backbone.class_attention(images)
        return {i: maps[i - 1][..., 1:].float() for i in numbers or range(1, len(maps) + 1)}
    blocks, prefix = _vit(backbone)
    if backbone.cls_token is None:
        raise UsageError(
            f"a {type(backbone).__name__} without a class token has no class attention"
        )
    numbers = _chosen(layers, len(blocks), "block") or [len(blocks)]
    found: Weights = {}
    with contextlib.ExitStack() as stack:
        for i in numbers:
            stack.enter_context(_class_row(blocks[i - 1].attn, i, found))
        backbone.forward_features(images)  # type: ignore[operator]
    return {i: weights[..., prefix:].float() for i, weights in found.items()}


def layer_kind(backbone: nn.Module) -> str:
    """What the numbers of `class_attention` count: "layer" of class attention, or "block"."""
    return "layer" if isinstance(backbone, XCiT) else "block"


def patch_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens [B, N, D] for dense tasks: before an XCiT's class attention, after a ViT's norm.

    Raises:
        UsageError: the backbone has no patch tokens.
    """
    if isinstance(backbone, XCiT):
        return backbone.patch_tokens(images)[0]
    _, prefix = _vit(backbone)
    return backbone.forward_features(images)[:, prefix:]  # type: ignore[operator]


def channel_attention(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """XCA's matrices of each block, float32 [B, H, d, d]: equation 4's softmax(K^T Q / tau).

    Row i says from which channels' values channel i of the output is mixed; rows sum to 1.

    Raises:
        UsageError: the backbone has no XCA.
    """
    if not isinstance(backbone, XCiT):
        raise UsageError(
            "cross-covariance attention is an XCiT's, and a "
            f"{type(backbone).__name__} has none; leave out --xca"
        )
    found: list[Tensor] = []

    def look(attention: XCA, x: Tensor) -> None:
        B, N, D = x.shape
        H = attention.num_heads
        qkv = attention.qkv(x).float().view(B, N, 3, H, D // H)
        q, k, _ = qkv.permute(2, 0, 3, 4, 1)  # each [B, H, d, N]
        q, k = F.normalize(q, dim=-1, eps=NORM_EPS), F.normalize(k, dim=-1, eps=NORM_EPS)
        found.append((q @ k.transpose(-2, -1) * attention.temperature).softmax(dim=-1))

    with contextlib.ExitStack() as stack:
        for block in backbone.blocks:
            # What the norm before it gives is what attention reads, whichever way it computes.
            hook = partial(_pass_on, look, block.attn)
            stack.callback(block.norm1.register_forward_hook(hook).remove)  # type: ignore[union-attr]
        backbone.patch_tokens(images)
    return found


def _pass_on(
    look: Callable[[XCA, Tensor], None], attention: Any, norm: nn.Module, inputs: Any, out: Tensor
) -> None:
    look(attention, out)


def _vit(backbone: nn.Module) -> tuple[Any, int]:
    """The blocks of a timm vision transformer and how many tokens stand before its patches."""
    parts = ("blocks", "patch_embed", "num_prefix_tokens", "forward_features", "cls_token")
    name = type(backbone).__name__
    if not all(hasattr(backbone, part) for part in parts):
        raise UsageError(
            f"a {name} has no class attention and no patch tokens: "
            "take an XCiT or a vision transformer"
        )
    if getattr(backbone.patch_embed, "strict_img_size", False):
        raise UsageError(f"this {name} takes images of one size only, and whole images differ")
    return backbone.blocks, int(backbone.num_prefix_tokens)  # type: ignore[arg-type]


def _chosen(layers: Sequence[int] | None, count: int, what: str) -> list[int]:
    for number in layers or ():
        if not 1 <= number <= count:
            raise UsageError(f"there is no {what} {number}: choose one from 1 to {count}")
    return list(layers or ())


@contextlib.contextmanager
def _class_row(attention: Any, number: int, found: Weights) -> Iterator[None]:
    """While open, a forward pass puts the class token's weights [B, H, M] into `found[number]`."""
    if type(attention) is Attention:

        def asked(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[number] = _query_of_class(attention, inputs[0])

        handle = attention.register_forward_pre_hook(asked)
        try:
            yield
        finally:
            handle.remove()
        return

    # Rotary positions, relative biases and so on: the module computes its weights itself where it
    # may not fuse them, and passes them through its dropout.
    if not hasattr(attention, "fused_attn") or not hasattr(attention, "attn_drop"):
        raise UsageError(f"the weights of a {type(attention).__name__} cannot be read")

    def passed(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[number] = inputs[0][:, :, 0]  # of [B, H, M, M]

    fused, attention.fused_attn = attention.fused_attn, False
    handle = attention.attn_drop.register_forward_pre_hook(passed)
    try:
        yield
    finally:
        handle.remove()
        attention.fused_attn = fused


def _query_of_class(attention: Attention, x: Tensor) -> Tensor:
    """[B, M, D] -> the class token's weights [B, H, M]: M products a head instead of M x M."""
    B, M, _ = x.shape
    qkv = attention.qkv(x).view(B, M, 3, attention.num_heads, attention.head_dim)
    q = attention.q_norm(qkv[:, :1, 0].transpose(1, 2))  # [B, H, 1, d]
    k = attention.k_norm(qkv[:, :, 1].transpose(1, 2))  # [B, H, M, d]
    return ((q * attention.scale) @ k.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
