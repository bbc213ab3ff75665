"""What features say about themselves, without labels."""

from xdino_eval.quality.alarms import alarms
from xdino_eval.quality.evaluate import MEASURES, PROTOCOL, evaluate, global_views, rows_of
from xdino_eval.quality.measures import feature_std, lidar, rankme

__all__ = [
    "MEASURES",
    "PROTOCOL",
    "alarms",
    "evaluate",
    "feature_std",
    "global_views",
    "lidar",
    "rankme",
    "rows_of",
]
