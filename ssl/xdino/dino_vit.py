"""DINO's own vision transformers (Caron et al., 2021, arXiv 2104.14294): ViT-Ti, ViT-S and ViT-B.

timm's network under timm's parameter names, which are the published ones too, and equal to it at the
size that the position table was made for. At other sizes the published code and timm part:

- published: bicubic without antialiasing, by the factor (patches + 0.1) / table, and pixels beyond
  the last whole patch are left out; this is what the published numbers at other sizes rest on;
- timm (`dynamic_img_size`): bicubic with antialiasing to the exact grid, and images whose sides are
  no multiples of the patch are refused.

Here it is done as published. One corner is not followed: an oblong image whose whole patches happen
to make the table's own square grid (224 x 230 at patch 16) takes the table as it is, where the
published code shifts it by under one per cent.

Names are timm's with its tag for these weights: "vit_small_patch16_224.dino".
"""

import re

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

# embed_dim and num_heads of the published vision_transformer.py; depth is 12 throughout.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_NAME = re.compile(r"vit_(tiny|small|base)_patch([1-9]\d*)_([1-9]\d*)\.dino")


class WholePatches(PatchEmbed):
    """Patches of an image of any size; what does not fill a patch at the far sides is left out."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, H // p, W // p, D]`."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class DINOViT(VisionTransformer):
    """timm's ViT with the published treatment of image sizes."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """`[B, h, w, D]` -> class token and patches with their positions, `[B, 1 + h * w, D]`."""
        B, h, w, D = x.shape
        tokens = torch.cat((self.cls_token.expand(B, -1, -1), x.reshape(B, h * w, D)), dim=1)
        return self.pos_drop(tokens + self.positions(h, w))

    def positions(self, h: int, w: int) -> Tensor:
        """The position table resampled to a grid, `[1, 1 + h * w, D]`; the first is the class's."""
        side = self.patch_embed.grid_size[0]
        if (h, w) == (side, side):
            return self.pos_embed
        D = self.pos_embed.shape[2]
        table = self.pos_embed[:, 1:].reshape(1, side, side, D).permute(0, 3, 1, 2)
        # The tenth keeps the product of factor and side from rounding below the grid (dino#8).
        factors = ((h + 0.1) / side, (w + 0.1) / side)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
        patches = table.permute(0, 2, 3, 1).reshape(1, h * w, D)
        return torch.cat((self.pos_embed[:, :1], patches), dim=1)


def is_name(arch: str) -> bool:
    """Whether `arch` names one of these networks: "vit_small_patch16_224.dino"."""
    return _NAME.fullmatch(arch) is not None


def name(size: str, patch_size: int, side: int = 224) -> str:
    """The name of a published size ("tiny", "small", "base") whose table is for `side` pixels."""
    return f"vit_{size}_patch{patch_size}_{side}.dino"


def side(arch: str) -> int:
    """Pixels that the position table of a name is for: 224."""
    match = _NAME.fullmatch(arch)
    assert match, arch
    return int(match[3])


def build(arch: str, in_chans: int = 3, drop_path_rate: float = 0.0) -> DINOViT:
    """The network by its name: images `[B, in_chans, H, W]` -> normalised class token `[B, D]`."""
    match = _NAME.fullmatch(arch)
    assert match, arch
    embed_dim, num_heads = SIZES[match[1]]
    return DINOViT(
        img_size=int(match[3]),
        patch_size=int(match[2]),
        in_chans=in_chans,
        num_classes=0,
        embed_dim=embed_dim,
        depth=12,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        dynamic_img_size=True,
        embed_layer=WholePatches,
    )
