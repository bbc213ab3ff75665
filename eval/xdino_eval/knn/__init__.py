"""Weighted nearest-neighbour classification of frozen features.

The package can be called itself: `xdino_eval.knn(...)` is `xdino_eval.knn.vote.knn(...)`.
"""

import sys
from types import ModuleType

from xdino_eval.knn.protocols import Draws, evaluate, few_shot, leave_one_out
from xdino_eval.knn.search import SearchOptions, nearest_neighbours
from xdino_eval.knn.tables import normalise
from xdino_eval.knn.vote import KS, classify, knn, scores

__all__ = [
    "KS",
    "Draws",
    "SearchOptions",
    "classify",
    "evaluate",
    "few_shot",
    "knn",
    "leave_one_out",
    "nearest_neighbours",
    "normalise",
    "scores",
]


class CallablePackage(ModuleType):
    """A function and the package that it comes from have one name, and one place for it."""

    __call__ = staticmethod(knn)


sys.modules[__name__].__class__ = CallablePackage
