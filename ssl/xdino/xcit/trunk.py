"""The walk from images through the stem and the XCA blocks, for whatever reads the patch tokens.

Letters: B images, N patch tokens, D width, (h, w) patch grid.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xdino import kernels
from xdino.xcit.layers import NORM_EPS
from xdino.xcit.recompute import recomputed
from xdino.xcit.stem import ConvPatchEmbed, FourierPositionalEncoding


class Trunk(Protocol):
    """A network that begins as an XCiT does: the published names of these parts."""

    patch_embed: ConvPatchEmbed
    pos_embeder: FourierPositionalEncoding
    blocks: nn.ModuleList
    training: bool
    fused: bool  # whether training takes xdino.kernels
    grad_checkpointing: bool  # whether activations are computed again in the backward pass


def _run(module: nn.Module, *inputs: object) -> Any:
    return module(*inputs)


def _recomputes(network: Trunk) -> bool:
    return network.grad_checkpointing and network.training and torch.is_grad_enabled()


def tokens_after(
    network: Trunk, images: Tensor, after: Sequence[int]
) -> tuple[list[Tensor], int, int]:
    """Patch tokens `[B, N, D]` after the blocks of these numbers, from 0, in their order; the grid.

    Raises:
        ValueError: no block of such a number.
    """
    depth = len(network.blocks)
    if not after or not all(0 <= i < depth for i in after):
        raise ValueError(f"blocks are numbered from 0 to {depth - 1}, got {list(after)}")
    if network.fused and network.training and not _recomputes(network) and kernels.takes(images):
        from xdino.kernels import blocks  # imports triton, which not every machine has

        return blocks.tokens_after(network, images, after, NORM_EPS)
    kept: dict[int, Tensor] = {}
    for i, (x, h, w) in enumerate(after_each_block(network, images)):  # noqa: B007
        if i in after:
            kept[i] = x
    return [kept[i] for i in after], h, w


def after_each_block(network: Trunk, images: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Patch tokens `[B, N, D]` and the grid, after one block and the next."""
    run = recomputed if _recomputes(network) else _run
    x, h, w = run(network.patch_embed, images)
    # Under autocast both are half; the tokens' sum stays in the weights' own precision.
    positions = network.pos_embeder
    x = x + positions(h, w)
    x = x.to(torch.promote_types(x.dtype, positions.token_projection.weight.dtype))
    # The stem's tokens lie channel by channel, and every sum of a block keeps the layout of what it adds
    # to: each norm would turn them over again.
    x = x.contiguous()
    for block in network.blocks:
        x = run(block, x, h, w)
        yield x, h, w
