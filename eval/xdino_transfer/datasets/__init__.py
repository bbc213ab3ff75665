"""Labelled data sets of transfer in their own layouts, as sources."""

from xdino_transfer.datasets.opening import is_archive, open_labelled, open_scored
from xdino_transfer.datasets.subset import few, few_of_each

__all__ = ["few", "few_of_each", "is_archive", "open_labelled", "open_scored"]
