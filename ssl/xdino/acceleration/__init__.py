"""Which parts of a run take the fused kernels, decided once at its start.

They are taken where they agree with the plain path and are faster; else the plain path stays and a
sentence says why. Nothing that is learned depends on the choice but through rounding.
"""

from xdino.acceleration.choice import MODES, Choice, choose, use_kernels
from xdino.acceleration.equality import check_network, check_views
from xdino.acceleration.speed import compare_network, compare_views

__all__ = [
    "MODES",
    "Choice",
    "check_network",
    "check_views",
    "choose",
    "compare_network",
    "compare_views",
    "use_kernels",
]
