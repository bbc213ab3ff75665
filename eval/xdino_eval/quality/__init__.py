"""What features say about themselves, without labels."""

from xdino_eval.quality.measures import (
    FILE,
    Quality,
    alarms,
    append,
    feature_std,
    global_views,
    judge,
    lidar,
    load,
    measure,
    rankme,
)

__all__ = [
    "FILE",
    "Quality",
    "alarms",
    "append",
    "feature_std",
    "global_views",
    "judge",
    "lidar",
    "load",
    "measure",
    "rankme",
]
