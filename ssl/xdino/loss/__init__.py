"""What is minimised: DINO's loss, and what may stand in its place or be added to it."""

from xdino.loss.coding_rate import SimDINOLoss
from xdino.loss.dino import DINOLoss, dino_loss
from xdino.loss.koleo import WithKoLeo
from xdino.loss.objective import Measured, Objective, Views
from xdino.loss.sigreg import SIGRegLoss
from xdino.loss.sinkhorn import SinkhornLoss

__all__ = [
    "DINOLoss",
    "Measured",
    "Objective",
    "SIGRegLoss",
    "SimDINOLoss",
    "SinkhornLoss",
    "Views",
    "WithKoLeo",
    "dino_loss",
]
