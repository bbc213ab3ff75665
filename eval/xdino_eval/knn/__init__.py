"""Weighted nearest-neighbour classification of frozen features."""

from xdino_eval.knn.vote import (
    KS,
    classify,
    evaluate,
    few_shot,
    leave_one_out,
    normalise,
    scores,
    vote,
)

__all__ = [
    "KS",
    "classify",
    "evaluate",
    "few_shot",
    "leave_one_out",
    "normalise",
    "scores",
    "vote",
]
