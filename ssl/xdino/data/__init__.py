"""Images in: sources, decoding, and batches that follow from the iteration."""

from xdino.data.decode import UnreadableImage, decode
from xdino.data.loader import (
    BadImage,
    CropBatch,
    CropLoader,
    Loader,
    epoch_order,
    steps_per_epoch,
)
from xdino.data.source import Source, fingerprint
from xdino.data.sources import open_source, open_splits

__all__ = [
    "BadImage", "CropBatch", "CropLoader", "Loader", "Source", "UnreadableImage", "decode", "epoch_order",
    "fingerprint", "open_source", "open_splits", "steps_per_epoch",
]  # fmt: skip
