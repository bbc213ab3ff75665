"""A network of timm as a backbone: its files keep timm's names.

Vision transformers have a class token in every block; DINO (https://arxiv.org/abs/2104.14294,
figure 1) looks at it in the last one. timm fuses the softmax into one kernel that hands out no
weights, so they are computed here from the block's own input.

Letters: B images, H heads, N patches, M = P + N tokens with P before the patches (class, registers),
D width, d channels a head, (h, w) patch grid.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from timm.layers import Attention, DropPath
from torch import Tensor, nn

from xdino.backbone import Backbone, Intermediate, chosen_layers, whole_patches
from xdino.errors import UsageError
from xdino.runtime.drop_path import Rows, drop_path_mask

_VIT = ("blocks", "patch_embed", "num_prefix_tokens", "forward_intermediates", "cls_token")


class TimmBackbone(Backbone):
    """A timm network without its class head, `network`.

    Tensors and submodules go by the names that they have in the network itself, so that files are
    timm's; only the object is another.
    """

    attention_layer = "block"
    network: Any  # timm has no types

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        share_drop_path(network)
        self.network = network
        # Some networks widen their features on the way to the head that is left out here.
        self.embed_dim = getattr(network, "head_hidden_size", None) or self.network.num_features
        size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        self.patch_size = size[0] if isinstance(size, tuple | list) else size
        self.has_patch_tokens = all(hasattr(network, part) for part in _VIT)
        self.num_prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self not in memo:
            memo |= {self} if remove_duplicate else set()
            yield prefix, self
            yield from self.network.named_modules(memo, prefix, remove_duplicate)

    @property
    def kind(self) -> str:
        return type(self.network).__name__

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What timm says of the network."""
        return getattr(self.network, "default_cfg", None) or {}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.network.set_grad_checkpointing(enable)

    # --- patches, of vision transformers --------------------------------------------------------

    def fitting(self, images: Tensor) -> Tensor:
        """A vision transformer takes whole patches: the rest is cut off, as in DINO's pictures."""
        if not self.has_patch_tokens or self.network.patch_embed.dynamic_img_pad:
            return images
        images, embed = whole_patches(images, self.require_patches()), self.network.patch_embed
        if embed.strict_img_size and images.shape[2:] != tuple(embed.img_size):
            (rows, columns), (height, width) = embed.img_size, images.shape[2:]
            raise UsageError(
                f"this {self.kind} takes images of {columns} x {rows} pixels only, "
                f"got {width} x {height}"
            )
        return images

    def grid(self, height: int, width: int) -> tuple[int, int]:
        self.require_patches()
        if self.network.patch_embed.strict_img_size:
            raise UsageError(
                f"this {self.kind} takes images of one size only, and whole images differ"
            )
        h, w = self.network.patch_embed.dynamic_feat_size((height, width))
        return int(h), int(w)

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] = 1, norm: bool = True
    ) -> list[Intermediate]:
        self.require_patches()
        images = self.fitting(images)
        found = self.network.forward_intermediates(
            images, indices=indices, return_prefix_tokens=True, norm=norm, intermediates_only=True
        )
        if self.num_prefix_tokens:
            return found
        return [(maps, maps.new_empty(len(maps), 0, maps.shape[1])) for maps in found]

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        ((maps, prefix),) = self.forward_intermediates(images)
        if not self.num_prefix_tokens:
            raise UsageError(f"a {self.kind} without a class token has none to give")
        return prefix[:, 0], maps.permute(0, 2, 3, 1)

    # --- attention, of vision transformers ------------------------------------------------------

    def attention_layers(self, layers: Sequence[int] | None = None) -> list[int]:
        self.require_patches()
        if self.network.cls_token is None:
            raise UsageError(f"a {self.kind} without a class token has no class attention")
        count = len(self.network.blocks)
        return chosen_layers(layers, count, self.attention_layer) or [count]

    def class_attention(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        numbers = self.attention_layers(layers)
        found: dict[int, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for i in numbers:
                stack.enter_context(_class_row(self.network.blocks[i - 1].attn, i, found))
            self.network.forward_features(images)
        return [found[i] for i in numbers]


class SharedDropPath(DropPath):
    """timm's layer, whose draws do not depend on how images are shared out (`drop_path`)."""

    rows: Rows | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        return x * drop_path_mask(x, self.drop_prob, self.rows, self.scale_by_keep)


def share_drop_path(network: nn.Module) -> None:
    """Put `SharedDropPath` in the place of timm's layers; what timm drops otherwise stays."""
    for module in [*network.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) is DropPath:
                setattr(module, name, SharedDropPath(child.drop_prob, child.scale_by_keep))


def _without_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """A state of the adapter is one of its network."""
    inner = f"{prefix}network."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)


@contextlib.contextmanager
def _class_row(attention: Any, number: int, found: dict[int, Tensor]) -> Iterator[None]:
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
