"""Weighted nearest-neighbour classification of frozen features."""

from xdino_eval.knn.protocols import Draws, evaluate, few_shot, leave_one_out
from xdino_eval.knn.search import SearchOptions, nearest_neighbours
from xdino_eval.knn.tables import normalise
from xdino_eval.knn.vote import KS, classify, scores

__all__ = [
    "KS",
    "Draws",
    "SearchOptions",
    "classify",
    "evaluate",
    "few_shot",
    "leave_one_out",
    "nearest_neighbours",
    "normalise",
    "scores",
]
