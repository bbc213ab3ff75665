"""Networks from files on what a person names: scores as signed rows, and what they say of images."""

from xdino_transfer.judging.classifiers import (
    predict,
    predict_all,
    score,
    score_source,
    transform_of,
)

__all__ = ["predict", "predict_all", "score", "score_source", "transform_of"]
