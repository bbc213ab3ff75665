"""Which parts of a run take the fused kernels, decided once at its start.

Kernels are compiled on the machine that they run on, by the Triton that is found there. So before
they are trusted, both paths go through the same work on the device: they must agree, forward and
backward, and the kernels must be the faster ones. Where they are not, or do not run, the plain path
stays and a sentence says why. Nothing that is learned depends on the choice but through rounding.
"""

from xdino.acceleration.choice import MODES, Choice, choose, use_kernels
from xdino.acceleration.equality import check_network, check_views

__all__ = ["MODES", "Choice", "check_network", "check_views", "choose", "use_kernels"]
