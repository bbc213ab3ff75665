"""What pretrained weights are worth when they learn on: classification, and the data sets of transfer.

    import xdino_transfer

    row = xdino_transfer.score("runs/classes", "classes")  # top1, top5, and how they were measured
    for prediction in xdino_transfer.predict("runs/classes", "photos"):
        print(prediction.image, prediction.classes[0], prediction.probabilities[0])

Neither is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdino_transfer.judging import predict, score

__all__ = ["predict", "score"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from xdino_transfer import judging

        return getattr(judging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
