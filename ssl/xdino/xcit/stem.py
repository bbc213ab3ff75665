"""Images to patch tokens: the convolutional stem and the positional encoding."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdino.errors import UsageError

# Widths of the stem's stride-2 convolutions as fractions of embed_dim. Patch 4 is ours, for small
# images; 8 and 16 are the published stems.
STEM_FRACTIONS = {4: (2, 1), 8: (4, 2, 1), 16: (8, 4, 2, 1)}


def encode_grid(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of the patch coordinates, float32 `[h * w, 2 * channels]`.

    Coordinates run over (0, 2 pi], rows first; wavelengths grow geometrically up to 10,000
    (Vaswani et al., 2017, section 3.5, in two dimensions as in DETR). Always float32, as published.
    """

    def encode(count: int) -> Tensor:  # [count, channels]
        position = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        position = position / (count + 1e-6) * (2 * math.pi)
        exponent = 2 * (torch.arange(channels, dtype=torch.float32, device=device) // 2) / channels
        angle = position[:, None] / 10000**exponent
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    rows = encode(h)[:, None].expand(h, w, channels)
    columns = encode(w)[None].expand(h, w, channels)
    return torch.cat((rows, columns), dim=2).reshape(h * w, 2 * channels)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what an evaluation computed first must serve training too
def fourier_features(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """`encode_grid`, computed once a grid."""
    return encode_grid(h, w, channels, device)


class FourierPositionalEncoding(nn.Module):
    """Learned projection of Fourier features of the grid: any height and width."""

    def __init__(self, embed_dim: int, channels: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.token_projection = nn.Conv2d(2 * channels, embed_dim, kernel_size=1)

    def forward(self, h: int, w: int) -> Tensor:
        """The encoding `[1, h * w, D]`, the same for every image."""
        weight = self.token_projection.weight
        # An exported graph computes them from its own h and w, which a cache cannot look up.
        encode = encode_grid if torch.compiler.is_exporting() else fourier_features
        features = encode(h, w, self.channels, weight.device).to(weight.dtype)
        return F.linear(features, weight.flatten(1), self.token_projection.bias)[None]


class ConvPatchEmbed(nn.Module):
    """Patches by a pyramid of stride-2 3x3 convolutions, BatchNorm after each, GELU between."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if patch_size not in STEM_FRACTIONS:
            raise UsageError(f"patch_size must be 4, 8 or 16, got {patch_size}")
        fractions = STEM_FRACTIONS[patch_size]
        if embed_dim % fractions[0]:
            raise UsageError(
                f"embed_dim must be a multiple of {fractions[0]} at patch_size {patch_size}, "
                f"got {embed_dim}"
            )
        layers: list[nn.Module] = []
        width = in_chans
        for fraction in fractions:
            if layers:
                layers.append(nn.GELU())
            out = embed_dim // fraction
            conv = nn.Conv2d(width, out, kernel_size=3, stride=2, padding=1, bias=False)
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(out)))
            width = out
        self.proj = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, int, int]:
        """`[B, C, H, W]` -> tokens `[B, N, D]` and the grid (h, w)."""
        x = self.proj(images)
        h, w = x.shape[2:]
        return x.flatten(2).transpose(1, 2), h, w
