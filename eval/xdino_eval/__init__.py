"""What judges a frozen backbone: k-NN, linear probes, class-attention maps.

    import xdino, xdino_eval

    model = xdino.load("runs/mine")
    {20: (top1, top5)} = xdino_eval.knn(model.embed(train), train_labels, model.embed(val), val_labels)
    xdino_eval.save_features(model, "photos", "photos.parquet")

Everything else has a place of its own: `xdino_eval.evaluators`, `xdino_eval.linear`, ... `knn` is the
package of that name, too. Neither is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdino_eval.feature_files import save_features
    from xdino_eval.knn import CallablePackage

    knn: CallablePackage

__all__ = ["knn", "save_features"]


def __getattr__(name: str) -> Any:
    if name == "save_features":
        from xdino_eval.feature_files import save_features

        return save_features
    if name == "knn":
        import xdino_eval.knn as package

        return package
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
