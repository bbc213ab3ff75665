"""Fashion-MNIST, whose files are IDX, as it is and scattered; images in memory."""

from xdino.data.idx.arrays import FASHION_CLASSES, NAMES, ArraySource, open_named

__all__ = ["FASHION_CLASSES", "NAMES", "ArraySource", "open_named"]
