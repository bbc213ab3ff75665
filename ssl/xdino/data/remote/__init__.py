"""Tars in stores that are reached over a network, and patterns that name many tars at once."""

from xdino.data.remote.opening import open_named_tars, splits_of_named_tars

__all__ = ["open_named_tars", "splits_of_named_tars"]
