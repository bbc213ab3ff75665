"""What features say about themselves, without labels."""

from xdino_eval.quality.evaluation import MEASURES, PROTOCOL, evaluate, global_views, rows_of
from xdino_eval.quality.measures import agreement, feature_std, lidar, rankme

__all__ = [
    "MEASURES",
    "PROTOCOL",
    "agreement",
    "evaluate",
    "feature_std",
    "global_views",
    "lidar",
    "rankme",
    "rows_of",
]
