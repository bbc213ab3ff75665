"""The network: stem, XCA blocks, class attention.

Letters: B images, N patch tokens, D width, H heads, (h, w) patch grid.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xdino.backbone import Backbone, Intermediate, chosen_layers
from xdino.errors import UsageError
from xdino.xcit import trunk
from xdino.xcit.layers import LAYER_NORM_EPS, ClassAttentionBlock, XCABlock
from xdino.xcit.stem import ConvPatchEmbed, FourierPositionalEncoding


def _keep_mixing(block: Any, found: list[Tensor], _: nn.Module, __: Any, out: Tensor) -> None:
    found.append(block.attn.mixing(out))


class XCiT(Backbone):
    """The backbone: images of any size `[B, in_chans, H, W]` -> normalised class token `[B, D]`.

    Args:
        patch_size: 16, 8 (published) or 4.
        eta: initial value of LayerScale.
        tokens_norm: whether class attention's second norm covers the patch tokens.
        drop_path_rate: the same in every XCA block, none in class attention, as published.
    """

    patch_size: int
    num_prefix_tokens = 1  # in class attention
    has_patch_tokens = True

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        eta: float = 1.0,
        tokens_norm: bool = True,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        mlp_ratio: float = 4.0,
        class_attention_layers: int = 2,
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise UsageError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if depth < 1 or in_chans < 1:
            raise UsageError(f"depth and in_chans must be at least 1, got {depth} and {in_chans}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise UsageError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        super().__init__(in_chans)
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.patch_start = 0.5 - patch_size / 2  # a patch is centred on pixel i * patch_size
        self.fused = (
            False  # whether training takes xdino.kernels (acceleration.use_kernels sets it)
        )
        self.patch_embed = ConvPatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embeder = FourierPositionalEncoding(embed_dim)  # the published spelling
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            XCABlock(embed_dim, num_heads, mlp_ratio, eta, drop_path_rate) for _ in range(depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, mlp_ratio, eta, tokens_norm)
            for _ in range(class_attention_layers)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.grad_checkpointing = False
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep the blocks' inputs only."""
        self.grad_checkpointing = enable

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (h, w) that the stem makes of an image of this size in pixels."""
        for layer in self.patch_embed.proj:
            if isinstance(layer, nn.Sequential):
                height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def patch_tokens(self, images: Tensor) -> tuple[Tensor, int, int]:
        """Patch tokens before class attention `[B, N, D]` (those for dense tasks), and the grid."""
        self._check(images)
        (x,), h, w = trunk.tokens_after(self, images, [len(self.blocks) - 1])
        return x, h, w

    def tokens_after(self, images: Tensor, after: Sequence[int]) -> tuple[list[Tensor], int, int]:
        """Patch tokens `[B, N, D]` after the blocks of these numbers, from 0, and the grid.

        Those after the last block are `patch_tokens`. They have no norm behind them.
        """
        self._check(images)
        return trunk.tokens_after(self, images, after)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.spec.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got {list(images.shape)}")

    def gather(self, patches: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens `[B, N, D]` -> class token `[B, D]`, weights of each class-attention layer."""
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches), 1)
        maps = []
        for i, block in enumerate(self.cls_attn_blocks, start=1):
            x, attention = block(x, keep_patches=i < len(self.cls_attn_blocks))
            maps.append(attention)
        return self.norm(x[:, 0]), maps

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the class token after the final norm, `[B, D]`."""
        return self.gather(self.patch_tokens(images)[0])[0]

    def parts_to_compile(self) -> list[nn.Module]:
        """Part by part, so that the blocks share one compilation a crop size."""
        return [self.patch_embed, *self.blocks, *self.cls_attn_blocks]

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches, h, w = self.patch_tokens(images)
        return self.gather(patches)[0], patches.unflatten(1, (h, w))

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] = 1, norm: bool = True
    ) -> list[Intermediate]:
        depth = len(self.blocks)
        chosen = range(depth)[-indices:] if isinstance(indices, int) else indices
        wanted = [range(depth)[i] for i in chosen]
        kept: dict[int, Tensor] = {}
        for i, (x, h, w) in enumerate(trunk.after_each_block(self, images)):
            if i in wanted:
                kept[i] = x.transpose(1, 2).unflatten(2, (h, w))
        return [(kept[i], kept[i].new_empty(len(images), 0, self.embed_dim)) for i in wanted]

    def attention_layers(self, layers: Sequence[int] | None = None) -> list[int]:
        count = len(self.cls_attn_blocks)
        return chosen_layers(layers, count, "class-attention layer") or [*range(1, count + 1)]

    @torch.no_grad()
    def class_attention(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        numbers = self.attention_layers(layers)
        maps = self.gather(self.patch_tokens(images)[0])[1]
        return [maps[i - 1] for i in numbers]

    @torch.no_grad()
    def channel_attention(self, images: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                # What the norm before it gives is what XCA reads, whichever way it computes.
                hook = functools.partial(_keep_mixing, block, found)
                stack.callback(block.get_submodule("norm1").register_forward_hook(hook).remove)
            self.patch_tokens(images)
        return found
