"""Linear probes of frozen features."""

from xdino_eval.linear.grid import Grid, grid_probe, grid_probe_features
from xdino_eval.linear.logistic import logistic_probe
from xdino_eval.linear.sgd import OverImages, Sgd, sgd_probe, sgd_probe_features

__all__ = [
    "Grid",
    "OverImages",
    "Sgd",
    "grid_probe",
    "grid_probe_features",
    "logistic_probe",
    "sgd_probe",
    "sgd_probe_features",
]
