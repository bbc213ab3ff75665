"""Tar files: where their images lie, and the source that reads them there."""

from xdino.data.tars.index import open_index
from xdino.data.tars.opening import open_tars, splits_of_tar
from xdino.data.tars.scanning import COMPRESSED, PACK_MEMBER, TarIndex
from xdino.data.tars.source import TarSource
from xdino.data.tars.store import Store

__all__ = [
    "COMPRESSED",
    "PACK_MEMBER",
    "Store",
    "TarIndex",
    "TarSource",
    "open_index",
    "open_tars",
    "splits_of_tar",
]
