"""What measures of quality warn of."""

import math

# Below these shares of what is possible an alarm is raised. They are ours, not the papers': an
# orientation, set where a network has lost nearly everything, not where one is merely worse.
FLAT = 0.1  # of the standard deviation 1 / sqrt(D) of evenly spread features
NARROW = 0.05  # of the highest rank that so many images and dimensions allow


def alarms(
    rankme: float, lidar: float, feature_std: float, images: int, lidar_images: int, dim: int
) -> list[str]:
    """What the numbers warn of, a sentence each; empty where nothing looks lost.

    Args:
        images: that RankMe and the standard deviation were measured on; `lidar_images` for LiDAR.
        dim: the features' width D.
    """
    found = []
    even, most, most_lidar = 1 / math.sqrt(dim), min(images, dim), min(lidar_images - 1, dim)
    if feature_std < FLAT * even:
        found.append(
            f"every image has nearly the same feature: their standard deviation is {feature_std:.2g}"
            f" where evenly spread ones have {even:.2g}. Collapse, or one direction common to all"
        )
    if rankme < NARROW * most:
        found.append(
            f"RankMe is {rankme:.3g} of {most} possible: the features use few of their dimensions"
        )
    if lidar < NARROW * most_lidar:
        found.append(
            f"LiDAR is {lidar:.3g} of {most_lidar} possible: few directions tell images from "
            "their own views"
        )
    few = [name for name, n in (("RankMe", images), ("LiDAR", lidar_images - 1)) if n < dim]
    if few:
        found.append(
            f"too few images for the {dim} dimensions of the features: "
            f"{' and '.join(few)} cannot reach that, so compare with equal numbers only"
        )
    return found
