"""Published segmentation files: Semantic FPN's and UperNet's, by their names, strictly."""

from pathlib import Path

from torch import nn

from xdino_transfer import fpn, published_files
from xdino_transfer.published_files import DenseFile
from xdino_transfer.pyramid import STRIDES
from xdino_transfer.segmentation import heads
from xdino_transfer.segmentation.segmenter import Segmenter

_CLASSES = "decode_head.conv_seg.weight"


def load_segmenter(path: str | Path) -> tuple[Segmenter, tuple[str, ...] | None]:
    """The segmenter in a published file, in evaluation mode, and its classes' names if it says them.

    Raises:
        UsageError, RunFailed: as `published_files.read`; names or shapes that are not all there.
    """
    return segmenter_in(published_files.read(path))


def segmenter_in(file: DenseFile) -> tuple[Segmenter, tuple[str, ...] | None]:
    """The same of a file that was read."""
    (shape,) = published_files.sizes(file.tensors, file.path, _CLASSES)
    classes, channels = shape[0], shape[1]
    pyramid = published_files.pyramid_of(file.tensors, file.path)
    D = pyramid.embed_dim
    widths = [D] * len(STRIDES)
    neck: nn.Module | None = None
    auxiliary: heads.Head | None = None
    decode: heads.Head
    if "decode_head.bottleneck.conv.weight" in file.tensors:
        (other,) = published_files.sizes(file.tensors, file.path, "auxiliary_head.conv_seg.weight")
        decode = heads.UperNet(widths, classes, channels)
        auxiliary = heads.Auxiliary(D, classes, other[1])
    else:
        neck, decode = fpn.FPN(widths, D), heads.SemanticFPN(widths, classes, channels)
    model = Segmenter(pyramid, neck, decode, auxiliary)
    published_files.load_into(model, fpn.from_published(file.tensors), file.path)
    return model, file.classes
