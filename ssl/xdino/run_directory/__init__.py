"""A run's folder: what it holds, what a start finds there, and the epochs a finished run is given."""

from xdino.run_directory.directory import (
    CONFIG_FILE,
    INITIAL_FILE,
    METRICS_FILE,
    UNREADABLE_FILE,
    RunDirectory,
)
from xdino.run_directory.environment import commit, environment
from xdino.run_directory.states import PREVIOUS

__all__ = [
    "CONFIG_FILE",
    "INITIAL_FILE",
    "METRICS_FILE",
    "PREVIOUS",
    "UNREADABLE_FILE",
    "RunDirectory",
    "commit",
    "environment",
]
