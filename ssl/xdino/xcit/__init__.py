"""Cross-Covariance Image Transformer (El-Nouby et al., 2021, arXiv 2106.09681).

Attention between channels instead of between tokens (XCA, section 3.2) costs linearly in the number
of tokens; a pair of depthwise convolutions (LPI, section 3.3) lets neighbouring patches talk; two
class-attention layers (CaiT, arXiv 2103.17239) gather the patches into one class token.

Parameters carry the published names, so published weights load strictly. Two things differ from the
published code without changing its numbers: only the class token's query is computed in class
attention, and the last class-attention layer does not carry the patch tokens that nobody reads.
"""

from xdino.runtime.drop_path import drop_path_mask
from xdino.xcit.layers import LPI, NORM_EPS, XCA
from xdino.xcit.model import XCiT
from xdino.xcit.variants import NAMES, VARIANTS, arguments, build

__all__ = [
    "LPI",
    "NAMES",
    "NORM_EPS",
    "VARIANTS",
    "XCA",
    "XCiT",
    "arguments",
    "build",
    "drop_path_mask",
]
