"""Cross-Covariance Image Transformer (El-Nouby et al., 2021, arXiv 2106.09681).

Attention between channels instead of between tokens (XCA, section 3.2) costs linearly in the number
of tokens; a pair of depthwise convolutions (LPI, section 3.3) lets neighbouring patches talk; two
class-attention layers (CaiT, arXiv 2103.17239) gather the patches into one class token.

Parameters carry the published names, so published weights load strictly. Two things differ from the
published code without changing its numbers: only the class token's query is computed in class
attention, and the last class-attention layer does not carry the patch tokens that nobody reads.

Letters: B images, N patch tokens, D width, H heads, d = D / H channels a head, (h, w) patch grid.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xdino import kernels
from xdino.backbone import Backbone, Intermediate, chosen_layers
from xdino.errors import UsageError, nearest

LAYER_NORM_EPS = 1e-6
NORM_EPS = 1e-12  # of the l2 norm of queries and keys
HALF = (torch.float16, torch.bfloat16)
FOLD_FROM = 2  # tokens per channel from which XCA by second moments is the shorter way
# Widths of the stem's stride-2 convolutions as fractions of embed_dim. Patch 4 is ours, for small
# images; 8 and 16 are the published stems.
STEM_FRACTIONS = {4: (2, 1), 8: (4, 2, 1), 16: (8, 4, 2, 1)}


@dataclass(frozen=True)
class Variant:
    """One row of the paper's table of models (table 1; eta and tokens_norm from the released code)."""

    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool


VARIANTS = {
    "nano_12": Variant(128, 12, 4, 1.0, False),
    "tiny_12": Variant(192, 12, 4, 1.0, True),
    "small_12": Variant(384, 12, 8, 1.0, True),
    "tiny_24": Variant(192, 24, 4, 1e-5, True),
    "small_24": Variant(384, 24, 8, 1e-5, True),
    "medium_24": Variant(512, 24, 8, 1e-5, True),
    "large_24": Variant(768, 24, 16, 1e-5, True),
}
NAMES = tuple(f"xcit_{size}_p{patch}" for size in VARIANTS for patch in (16, 8, 4))


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


class Mlp(nn.Module):
    """Linear, GELU, Linear, on each token by itself."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def l2_norm(x: Tensor, dim: int) -> Tensor:
    """Euclidean norm over `dim` (kept), at least NORM_EPS; in float32 for half precision.

    Clamped under the root, where the gradient of a zero vector is zero and not undefined. Several
    times as fast on the CPU as torch's own along a dimension that is not the last.
    """
    x = x.float() if x.dtype == torch.bfloat16 else x
    return x.square().sum(dim, keepdim=True).clamp_min(NORM_EPS**2).sqrt()


class XCA(nn.Module):
    """Cross-covariance attention (equation 4): softmax(K^T Q / tau) over the channels of a head."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """What the projection reads: `[B, N, D]` -> `[B, N, D]`."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        # One copy into the layout that every product below reads as it lies.
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # each [B, H, N, d]
        if q.dtype == torch.float16:
            # A sum of products over the tokens could leave the range of fp16.
            q, k = F.normalize(q, dim=2).to(q.dtype), F.normalize(k, dim=2).to(k.dtype)
            logits = q.transpose(-2, -1) @ k * self.temperature
        else:
            # Dividing the d x d products by the norms, instead of the N x d queries and keys.
            q_norm, k_norm = l2_norm(q, dim=2), l2_norm(k, dim=2)  # [B, H, 1, d]
            scale = self.temperature / (q_norm.transpose(-2, -1) * k_norm)  # [B, H, d, d]
            logits = (q.transpose(-2, -1) @ k) * scale
        x = v @ logits.softmax(dim=-1).transpose(-2, -1)  # [B, H, N, d]
        return x.transpose(1, 2).reshape(B, N, D)

    def mixing(self, x: Tensor) -> Tensor:
        """Equation 4's matrices for tokens `[B, N, D]`, float32 `[B, H, d, d]`."""
        B, N, D = x.shape
        H = self.num_heads
        qkv = self.qkv(x).float().view(B, N, 3, H, D // H)
        q, k, _ = qkv.permute(2, 0, 3, 4, 1)  # each [B, H, d, N]
        q, k = F.normalize(q, dim=-1, eps=NORM_EPS), F.normalize(k, dim=-1, eps=NORM_EPS)
        return (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)

    def folds(self, x: Tensor) -> bool:
        """Whether `folded` is the shorter way for tokens `[B, N, D]`: many of them, no gradient."""
        half = x.dtype in HALF or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        return x.shape[1] >= FOLD_FROM * x.shape[2] and not (half or torch.is_grad_enabled())

    def folded(self, x: Tensor, gain: Tensor) -> Tensor:
        """`gain * proj(mix(x))` by way of the tokens' second moments, `[B, N, D]`.

        Queries and keys enter only through products and norms over all tokens, and both follow
        from S = X^T X; the rest of the layer is linear in X, so that each image's whole layer is
        one D x D matrix. Exact: 2 N D^2 products instead of 4 N D^2, and some D^3 an image.
        """
        B, N, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        ones = x.new_ones(B, N, 1)
        total = x.transpose(1, 2) @ ones  # [B, D, 1]
        # Second moments with a constant 1 beside the channels, which carries the biases.
        moments = x.new_empty(B, D + 1, D + 1)
        moments[:, :D, :D] = x.transpose(1, 2) @ x
        moments[:, :D, D:] = total
        moments[:, D:, :D] = total.transpose(1, 2)
        moments[:, D, D] = N
        weight = torch.cat((self.qkv.weight, self.qkv.bias[:, None]), 1)  # [3 D, D + 1]
        w_q, w_k, w_v = weight.view(3, H, d, D + 1)
        q_side, k_side = ((w.reshape(D, D + 1) @ moments).view(B, H, d, D + 1) for w in (w_q, w_k))
        q_norm = (q_side * w_q).sum(-1, keepdim=True).clamp_min(NORM_EPS**2).sqrt()  # [B, H, d, 1]
        k_norm = (k_side * w_k).sum(-1, keepdim=True).clamp_min(NORM_EPS**2).sqrt()
        scale = self.temperature / (q_norm * k_norm.transpose(-2, -1))
        mixing = (q_side @ w_k.transpose(-2, -1) * scale).softmax(dim=-1)  # [B, H, d, d]
        values = (mixing @ w_v).reshape(B, D, D + 1)  # what the values become, per image
        layer = (self.proj.weight * gain[:, None]) @ values  # [B, D, D + 1]
        bias = layer[..., D] + self.proj.bias * gain  # [B, D]
        return torch.baddbmm(bias[:, None], x, layer[..., :D].transpose(1, 2))


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3x3 convolutions with GELU and BatchNorm between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, h: int, w: int, gain: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, D]` on the grid (h, w) -> the same, times `gain` `[D]` if that is given."""
        B, N, D = x.shape
        x = x.transpose(1, 2).reshape(B, D, h, w)
        x = self.bn(F.gelu(self.conv1(x)))
        weight, bias = self.conv2.weight, self.conv2.bias
        if gain is not None and bias is not None:
            weight, bias = weight * gain.view(-1, 1, 1, 1), bias * gain
        x = F.conv2d(x, weight, bias, padding=1, groups=D)
        return x.reshape(B, D, N).transpose(1, 2)


def scaled_linear(x: Tensor, layer: nn.Linear, gain: Tensor) -> Tensor:
    """`gain * layer(x)`, `[..., D]`: the gain `[D]` scales the weights instead of the tokens."""
    return F.linear(x, layer.weight * gain[:, None], layer.bias * gain)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)), which keeps x alone: gelu(x), as large again, is computed twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # [B * N, D]
        grad_weight = rows.T @ F.gelu(x).flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward(gradient @ weight.to(x.dtype), x)
        return grad_x, grad_weight.to(weight.dtype), rows.sum(0).to(weight.dtype)


def scaled_mlp(x: Tensor, mlp: Mlp, gain: Tensor) -> Tensor:
    """`gain * mlp(x)`. Its hidden layer is the widest of a block: in training it is kept once."""
    hidden = mlp.fc1(x)
    if not (mlp.training and torch.is_grad_enabled()):
        return scaled_linear(F.gelu(hidden), mlp.fc2, gain)
    return _GeluLinear.apply(hidden, mlp.fc2.weight * gain[:, None], mlp.fc2.bias * gain)


def drop_path_mask(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): per image of `[B, ...]`, 0 or what keeps the mean."""
    keep = 1.0 - rate
    return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class XCABlock(nn.Module):
    """XCA, then LPI, then MLP, each a residual branch scaled per channel (LayerScale)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, eta: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = XCA(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.local_mp = LPI(dim)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.gamma3 = nn.Parameter(eta * torch.ones(dim))
        self.drop_path_rate = drop_path_rate

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.training and self.drop_path_rate > 0:
            return torch.addcmul(x, branch, drop_path_mask(x, self.drop_path_rate))
        return x + branch

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        # LayerScale goes into the weights before each sum: no pass over the tokens for it, forward
        # or backward, and no branch kept for its gradient.
        y = self.norm1(x)
        if self.attn.folds(y):
            x = self._add(x, self.attn.folded(y, self.gamma1))
        else:
            x = self._add(x, scaled_linear(self.attn.mix(y), self.attn.proj, self.gamma1))
        x = self._add(x, self.local_mp(self.norm3(x), h, w, self.gamma3))
        return self._add(x, scaled_mlp(self.norm2(x), self.mlp, self.gamma2))


@contextlib.contextmanager
def _statistics_as_they_are(module: nn.Module) -> Iterator[None]:
    """BatchNorms count a batch once, also where a forward pass is repeated for its gradient."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _run(module: nn.Module, *inputs: object) -> Any:
    return module(*inputs)


def recomputed(module: nn.Module, *inputs: object) -> Any:
    """`module(*inputs)`, whose activations are computed again in the backward pass, not kept.

    The same numbers to the bit: random numbers are drawn alike, running statistics move once.
    """
    contexts = contextlib.nullcontext(), _statistics_as_they_are(module)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: contexts)


class ClassAttention(nn.Module):
    """The class token asks, every token answers (CaiT, section 3.2)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 1 + N, D]` -> the new class token `[B, 1, D]` and its weights `[B, H, 1 + N]`."""
        B, M, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :1], weight[:D], bias[:D]).view(B, 1, H, d).transpose(1, 2)
        kv = F.linear(x, weight[D:], bias[D:]).view(B, M, 2, H, d)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, H, 1 + N, d]
        attention = (q @ k.transpose(-2, -1) * d**-0.5).softmax(dim=-1)  # [B, H, 1, 1 + N]
        token = (attention @ v).transpose(1, 2).reshape(B, 1, D)
        return self.proj(token), attention.squeeze(2)


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the class token alone.

    The published block also adds the normalised patch tokens to themselves, twice; the next layer
    reads them, so it is kept. `tokens_norm` says whether its second norm covers the patches too.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, eta: float, tokens_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.tokens_norm = tokens_norm

    def forward(self, x: Tensor, keep_patches: bool) -> tuple[Tensor, Tensor]:
        """`[B, 1 + N, D]` -> tokens (`[B, 1, D]` unless `keep_patches`) and weights `[B, H, 1 + N]`."""
        normed = self.norm1(x)
        token, attention = self.attn(normed)
        token = self.norm2(x[:, :1] + self.gamma1 * token)
        token = token + self.gamma2 * self.mlp(token)
        if not keep_patches:
            return token, attention
        patches = torch.addcmul(x[:, 1:], normed[:, 1:], self.gamma1)
        if self.tokens_norm:
            patches = self.norm2(patches)
        return torch.cat((token, 2 * patches), dim=1), attention


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
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got {list(images.shape)}")
        if self.fused and self.training and not self._recomputes() and kernels.takes(images):
            from xdino.kernels import blocks  # imports triton, which not every machine has

            return blocks.patch_tokens(self, images, NORM_EPS)
        for x, h, w in self._after_each_block(images):  # noqa: B007
            pass
        return x, h, w

    def _recomputes(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()

    def _after_each_block(self, images: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Patch tokens `[B, N, D]` and the grid, after one block and the next."""
        run = recomputed if self._recomputes() else _run
        x, h, w = run(self.patch_embed, images)
        # Under autocast both are half; the tokens' sum stays in the weights' own precision.
        x = x + self.pos_embeder(h, w)
        x = x.to(torch.promote_types(x.dtype, self.cls_token.dtype))
        for block in self.blocks:
            x = run(block, x, h, w)
            yield x, h, w

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
        for i, (x, h, w) in enumerate(self._after_each_block(images)):
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


def arguments(name: str) -> dict[str, Any]:
    """The constructor arguments behind a name such as "xcit_small_12_p16"."""
    if name not in NAMES:
        raise UsageError(f'no XCiT is called "{name}": {nearest(name, NAMES)}')
    size, patch = name.removeprefix("xcit_").rsplit("_p", 1)
    return {"patch_size": int(patch), **vars(VARIANTS[size])}


def build(name: str, **overrides: Any) -> XCiT:
    """An XCiT by its published name, "xcit_small_12_p16"; any constructor argument overrides.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    return XCiT(**{**arguments(name), **overrides})
