"""Features as a table on disk: Parquet, NumPy's .npz, CSV or safetensors, by the file's suffix."""

from xdino_eval.feature_files.parts import open_parts
from xdino_eval.feature_files.saving import FeatureFile, save_features, save_parts

__all__ = ["FeatureFile", "open_parts", "save_features", "save_parts"]
