"""The class token and the patch tokens of a frozen backbone, for evaluations on patches.

XCiT: the class token after the final norm, and the patch tokens before class attention, which are
the ones for dense tasks (El-Nouby et al. 2021, https://arxiv.org/abs/2106.09681, sections 3.3 and 4).
Vision transformers of timm: both after the final norm, as the published evaluations of DINO take
them.

Numbers at sizes other than the pretraining's depend on how the position table is stretched: DINO's
published transformers do it as published (`xdino.dino_vit`), others as timm does.

Letters: B images, C channels, H x W pixels, D width, (h, w) patch grid.
"""

from typing import Any, cast

from torch import Tensor, nn

from xdino.errors import UsageError
from xdino.xcit import XCiT


def patch_side(backbone: nn.Module) -> int:
    """Pixels of a patch's side.

    Raises:
        UsageError: the backbone has no patches.
    """
    if isinstance(backbone, XCiT):
        return backbone.patch_size
    if not _has_tokens(backbone):
        raise UsageError(
            f"patch tokens are needed, and a {type(backbone).__name__} has none: "
            "take an XCiT or a vision transformer"
        )
    side = cast(Any, backbone).patch_embed.patch_size
    return int(side[0]) if isinstance(side, tuple) else int(side)


def class_and_patches(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, C, H, W]` -> the class token `[B, D]` and the patch tokens `[B, h, w, D]`.

    Raises:
        UsageError: no patch tokens in this backbone, or an image smaller than a patch.
    """
    side = patch_side(backbone)
    if isinstance(backbone, XCiT):
        patches, h, w = backbone.patch_tokens(images)
        token, _ = backbone.gather(patches)
        return token, patches.unflatten(1, (h, w))
    images = _whole_patches(backbone, images, side)
    (found,) = cast(Any, backbone).forward_intermediates(
        images, indices=1, return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    grid, prefix = found  # [B, D, h, w], [B, class token and registers, D]
    return prefix[:, 0], grid.permute(0, 2, 3, 1)


def class_token(backbone: nn.Module, images: Tensor) -> Tensor:
    """`[B, C, H, W]`, any size -> what the backbone says of the whole image, `[B, D]`."""
    if not isinstance(backbone, XCiT) and _has_tokens(backbone):
        images = _whole_patches(backbone, images, patch_side(backbone))
    return backbone(images)


def _has_tokens(backbone: nn.Module) -> bool:
    return (
        hasattr(backbone, "forward_intermediates")
        and hasattr(backbone, "patch_embed")
        and getattr(backbone, "num_prefix_tokens", 0) >= 1
    )


def _whole_patches(backbone: nn.Module, images: Tensor, side: int) -> Tensor:
    """Without the last rows and columns that fill no patch: a strided convolution skips them too."""
    height, width = (length // side * side for length in images.shape[2:])
    if not height or not width:
        H, W = images.shape[2:]
        raise UsageError(f"an image of {W} x {H} pixels is smaller than a patch of {side}")
    embed = cast(Any, backbone).patch_embed
    if getattr(embed, "strict_img_size", False) and (height, width) != tuple(embed.img_size):
        rows, columns = embed.img_size
        raise UsageError(
            f"this {type(backbone).__name__} takes images of {columns} x {rows} pixels only, "
            f"got {width} x {height}"
        )
    return images[..., :height, :width]
