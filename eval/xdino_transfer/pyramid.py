"""Four levels of features out of an XCiT, for detection and segmentation (XCiT's section 4.4).

The patch tokens after four of the blocks, without any norm, are brought to strides of 4, 8, 16 and
32 pixels by transposed convolutions and max-pooling. Class attention takes no part, so that a
pyramid has neither `cls_token` nor `cls_attn_blocks` nor `norm`; all other names are the published
ones (`backbone.*` of the detection and segmentation files), `fpn1` to `fpn4` for the levels. Images
may have any size: the grid is rounded up, pooling rounds down.

Golden vectors `pyramid_p16`, `pyramid_p8`: `Pyramid`, by `build` and `load_state_dict`.

Letters: B images, C channels, H x W pixels, D width, N tokens, (h, w) patch grid.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from xdino import xcit
from xdino.errors import UsageError
from xdino.xcit import XCiT, trunk

STRIDES = (4, 8, 16, 32)  # pixels of a cell, level by level
PATCHES = (16, 8)
OF_CLASS_ATTENTION = ("cls_token", "cls_attn_blocks.", "norm.")  # names that a pyramid has not


def published_blocks(depth: int) -> tuple[int, ...]:
    """The blocks, from 0, that the published pyramids read: thirds of the depth and its middle.

    3, 5, 7, 11 of twelve blocks and 7, 11, 15, 23 of twenty-four. Other depths are ours.
    """
    thirds = (depth // 3, depth // 2, depth * 2 // 3, depth)
    return tuple(max(count, 1) - 1 for count in thirds)


class Pyramid(nn.Module):
    """[B, C, H, W] -> four levels [B, D, ., .] at strides 4, 8, 16 and 32.

    Args:
        network: whose stem, positions and blocks are taken over (not copied).
        after: the four blocks, from 0, that are read; None = the published ones.

    Raises:
        UsageError: a patch size without a published pyramid.
    """

    def __init__(self, network: XCiT, after: Sequence[int] | None = None) -> None:
        super().__init__()
        if network.patch_size not in PATCHES:
            raise UsageError(
                f"a pyramid needs patches of 16 or 8 pixels, and these have {network.patch_size}"
            )
        self.patch_size, self.embed_dim = network.patch_size, network.embed_dim
        self.after = published_blocks(len(network.blocks)) if after is None else tuple(after)
        if len(self.after) != len(STRIDES):
            raise ValueError(f"a pyramid reads four blocks, got {len(self.after)}")
        self.patch_embed, self.pos_embeder = network.patch_embed, network.pos_embeder
        self.blocks = network.blocks
        self.fused, self.grad_checkpointing = False, False
        self.statistics_rest, self.trunk_rests = False, False
        D = network.embed_dim
        if network.patch_size == 16:
            # A convolution before a BatchNorm: its bias has no effect, and is there as published.
            self.fpn1 = nn.Sequential(_doubled(D), nn.BatchNorm2d(D), nn.GELU(), _doubled(D))
            self.fpn2 = nn.Sequential(_doubled(D))
            self.fpn3 = nn.Sequential(nn.Identity())
            self.fpn4 = nn.Sequential(Pooled(2))
        else:
            self.fpn1 = nn.Sequential(_doubled(D))
            self.fpn2 = nn.Sequential(nn.Identity())
            self.fpn3 = nn.Sequential(Pooled(2))
            self.fpn4 = nn.Sequential(Pooled(4))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep the blocks' inputs only."""
        self.grad_checkpointing = enable

    def rest_statistics(self) -> None:
        """From now on BatchNorms use their running statistics in training, too, and leave them.

        For batches of one or two pictures without other processes; their weights go on learning.
        """
        self.statistics_rest = True
        self.train(self.training)

    def freeze_trunk(self) -> None:
        """From now on stem, positions and blocks rest: no gradients, no dropped paths, no statistics."""
        self.trunk_rests = True
        for part in (self.patch_embed, self.pos_embeder, self.blocks):
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        if self.trunk_rests:
            for part in (self.patch_embed, self.pos_embeder, self.blocks):
                part.train(False)
        if self.statistics_rest:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False
        return self

    def tokens(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> the patch tokens after the four blocks, each [B, D, h, w]."""
        found, h, w = trunk.tokens_after(self, images, self.after)
        return [x.transpose(1, 2).unflatten(2, (h, w)) for x in found]

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        tokens = self.tokens(images)
        return [level(x) for level, x in zip(levels, tokens, strict=True)]


class Pooled(nn.MaxPool2d):
    """Max-pooling that rounds grids down, as published, but never to nothing: strips of few pixels."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.kernel_size, int)
        few = min(x.shape[2:]) < self.kernel_size
        return F.max_pool2d(x, self.kernel_size, ceil_mode=few)


def _doubled(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def build(arch: str, drop_path_rate: float = 0.0, **shape: object) -> Pyramid:
    """A new pyramid on an XCiT of this name; `shape` overrides arguments of its constructor."""
    return Pyramid(xcit.build(arch, drop_path_rate=drop_path_rate, **shape))


def without_class_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an XCiT that a pyramid has, too: class attention, the last norm, heads are off."""
    off = (*OF_CLASS_ATTENTION, "head.")
    return {name: value for name, value in tensors.items() if not name.startswith(off)}
