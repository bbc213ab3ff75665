"""Labelled data sets of transfer in their own layouts, as sources."""

from xdino_transfer.datasets.opening import open_labelled

__all__ = ["open_labelled"]
