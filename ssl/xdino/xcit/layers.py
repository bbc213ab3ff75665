"""The blocks of an XCiT: cross-covariance attention, local patch interaction, class attention.

Letters: B images, N patch tokens, D width, H heads, d = D / H channels a head, (h, w) patch grid.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdino.runtime.drop_path import Rows, drop_path_mask

LAYER_NORM_EPS = 1e-6
NORM_EPS = 1e-12  # of the l2 norm of queries and keys
HALF = (torch.float16, torch.bfloat16)
FOLD_FROM = 2  # tokens per channel from which XCA by second moments is the shorter way
# Values of an MLP's hidden layer at once, without gradients on a CPU. glibc gives blocks over 32 MB back
# to the system, which fills them with zeros again, page by page, in the next block of the network.
HIDDEN_AT_ONCE = 1 << 22


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
    """`gain * mlp(x)`. Its hidden layer is the widest of a block: in training it is kept once.

    Without gradients a CPU makes a large one in pieces.
    """
    weight, bias = mlp.fc2.weight * gain[:, None], mlp.fc2.bias * gain
    if mlp.training and torch.is_grad_enabled():
        return _GeluLinear.apply(mlp.fc1(x), weight, bias)

    def of(tokens: Tensor) -> Tensor:
        return F.linear(F.gelu(mlp.fc1(tokens)), weight, bias)

    # Not on "meta" either: what a picture takes is estimated there for other devices, too.
    rows = max(HIDDEN_AT_ONCE // mlp.fc1.out_features, 1)
    whole = torch.is_grad_enabled() or _traced() or x.device.type != "cpu"
    if whole or x.shape[:-1].numel() <= rows:
        return of(x)
    return torch.cat([of(tokens) for tokens in x.flatten(0, -2).split(rows)]).view(x.shape)


def _traced() -> bool:
    """Whether a graph is made of what runs, which may hold no size of an image."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class XCABlock(nn.Module):
    """XCA, then LPI, then MLP, each a residual branch scaled per channel (LayerScale)."""

    rows: Rows | None = None  # whose images are dropped, see `drop_path`

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
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))
        self.gamma3 = nn.Parameter(torch.full((dim,), eta))
        self.drop_path_rate = drop_path_rate

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.training and self.drop_path_rate > 0:
            return torch.addcmul(x, branch, drop_path_mask(x, self.drop_path_rate, self.rows))
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
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))
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
