"""An XCiT's patch tokens in training mode, out of the fused kernels.

The same modules and parameters as the plain path, walked in another cut: each residual sum is
computed together with the LayerNorm that reads it, so a block hands on the stream and its norm.

Letters: B images, N tokens, D width, (h, w) patch grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xdino.kernels import batch_norm, lpi, residual, xca
from xdino.kernels.mlp import linear_gelu, without_bias_gradient
from xdino.runtime.drop_path import drop_path_mask


def stem(patch_embed: Any, images: Tensor) -> tuple[Tensor, int, int]:
    """Images `[B, C, H, W]` -> tokens `[B, N, D]` and the grid, by channels-last convolutions."""
    stages: list[Any] = [
        stage for stage in patch_embed.proj if isinstance(stage, torch.nn.Sequential)
    ]
    x = images.contiguous(memory_format=torch.channels_last)
    for i, (conv, norm) in enumerate(stages, start=1):
        # To channels last, and from it to rows: neither moves anything where the convolution
        # already answers in the layout that it was asked in.
        x = conv(x).permute(0, 2, 3, 1).contiguous()  # [B, h, w, D]
        B, h, w, D = x.shape
        rows = batch_norm.batch_norm_gelu(x.view(-1, D), norm, gelu=i < len(stages))
        x = rows.view(B, h, w, D).permute(0, 3, 1, 2)
    return rows.view(B, h * w, D), h, w


def _drop(block: Any, B: int, device: torch.device) -> Tensor | None:
    """One number an image, 0 or 1 / (1 - rate): float32 `[B]`, or None where nothing is dropped."""
    if block.drop_path_rate == 0.0:
        return None
    return drop_path_mask(torch.empty(B, device=device), block.drop_path_rate, block.rows)


def _attend(attn: Any, x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor | None]:
    """What the attention adds, and the bias in it that got no gradient."""
    if not xca.supports(x.shape[2] // attn.num_heads, dtype):
        return attn(x), None
    mixed = xca.attend(attn.qkv(x), attn.temperature, attn.num_heads, eps)
    return without_bias_gradient(attn.proj, mixed), attn.proj.bias


def tokens_after(
    model: Any, images: Tensor, after: Sequence[int], norm_eps: float
) -> tuple[list[Tensor], int, int]:
    """What `XCiT.tokens_after` returns, in training mode.

    Args:
        after: numbers of blocks, from 0.
        norm_eps: the least l2 norm of a channel of queries or keys.
    """
    x, h, w = stem(model.patch_embed, images)
    x = x + model.pos_embeder(h, w)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    first = model.blocks[0].norm1
    normed: Tensor | None = F.layer_norm(
        x, first.normalized_shape, first.weight, first.bias, first.eps
    )
    following = [block.norm1 for block in model.blocks[1:]] + [None]
    kept: dict[int, Tensor] = {}
    for i, (block, next_norm) in enumerate(zip(model.blocks, following, strict=True)):
        assert normed is not None
        x, normed = _block(block, x, normed, next_norm, (h, w), dtype, norm_eps)
        if i in after:
            kept[i] = x
    return [kept[i] for i in after], h, w


def _block(
    block: Any, x: Tensor, normed: Tensor, next_norm: Any, size: tuple[int, int],
    dtype: torch.dtype, norm_eps: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One XCA block: the stream and its norm -> the stream and what `next_norm` makes of it."""
    B, device = len(x), x.device
    branch, bias = _attend(block.attn, normed, dtype, norm_eps)
    x, read = residual.add_norm(
        x, branch, block.gamma1, _drop(block, B, device), block.norm3, dtype, bias
    )
    assert read is not None
    x, read = lpi.interact(
        read, x, block.local_mp, block.gamma3, _drop(block, B, device), block.norm2, size, dtype
    )
    mlp = block.mlp
    branch, bias = without_bias_gradient(mlp.fc2, linear_gelu(mlp.fc1, read)), mlp.fc2.bias
    drop = _drop(block, B, device)
    return residual.add_norm(x, branch, block.gamma2, drop, next_norm, dtype, bias)
