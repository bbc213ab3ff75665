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

Their names: `xdino.dino_vit`.
"""

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from xdino import dino_vit


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


def build(arch: str, in_chans: int = 3, drop_path_rate: float = 0.0) -> DINOViT:
    """The network by its name: images `[B, in_chans, H, W]` -> normalised class token `[B, D]`."""
    size, patch_size, side = dino_vit.parts(arch)
    embed_dim, num_heads = dino_vit.SIZES[size]
    return DINOViT(
        img_size=side,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=0,
        embed_dim=embed_dim,
        depth=12,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        dynamic_img_size=True,
        embed_layer=WholePatches,
    )
