"""The feature pyramid network (Lin et al., arXiv 1612.03144) that both published tasks put on XCiT.

torchvision's module, which computes the same: 1x1 laterals, sums from the top down by nearest
neighbours, 3x3 outputs, all with biases and without norms. It learns to take and give lists, and
starts from the published initial weights.

Golden vectors `semantic_fpn` (`neck/*`) and `detector_rpn` (`neck/*`): `FPN`, its tensors by
`from_published`.

Letters: B images, D width.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

_PUBLISHED = re.compile(r"(neck\.|)(lateral|fpn)_convs\.(\d+)\.conv\.")
_OURS = re.compile(r"(neck\.|)net\.(inner_blocks|layer_blocks)\.(\d+)\.0\.")
_OWN = {"lateral": "inner_blocks", "fpn": "layer_blocks"}


class FPN(nn.Module):
    """Levels [B, D_i, ., .] -> as many levels [B, width, ., .], and one more if `extra`.

    Args:
        widths: D_i of each level.
        width: of what comes out.
        extra: a last level, every second value of the one before (RPN's fifth).
    """

    def __init__(self, widths: Sequence[int], width: int, extra: bool = False) -> None:
        super().__init__()
        self.width = width
        top = LastLevelMaxPool() if extra else None
        self.net = FeaturePyramidNetwork([*widths], width, top)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        return [*self.net({str(i): level for i, level in enumerate(levels)}).values()]


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`neck.lateral_convs.0.conv.weight` and the like -> the names of `FPN`; others stay."""
    return {
        (
            f"{match[1]}net.{_OWN[match[2]]}.{match[3]}.0.{name[match.end() :]}"
            if (match := _PUBLISHED.match(name))
            else name
        ): value
        for name, value in tensors.items()
    }


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    kinds = {own: theirs for theirs, own in _OWN.items()}
    return {
        (
            f"{match[1]}{kinds[match[2]]}_convs.{match[3]}.conv.{name[match.end() :]}"
            if (match := _OURS.match(name))
            else name
        ): value
        for name, value in tensors.items()
    }
