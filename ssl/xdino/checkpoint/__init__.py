"""Weights and whole states on disk, in and out. No code from a file ever runs.

Files appear whole or not at all: written beside their name, flushed to the disk, renamed.
"""

from xdino.checkpoint.loading import build_for, load_backbone, load_into, spec_of
from xdino.checkpoint.plain import reading
from xdino.checkpoint.published import FullCheckpoint, read_full
from xdino.checkpoint.snapshot import Snapshot
from xdino.checkpoint.states import STATE_FILE, check_state, iteration_of, load_state, save_state
from xdino.checkpoint.weights import (
    BACKBONE_FILE,
    BEST_FILE,
    EXPORTED_FILE,
    HEADER_KEY,
    WeightsFile,
    read_weights,
    save_backbone,
    save_tensors,
    sha256,
    weights_path,
)

__all__ = [
    "BACKBONE_FILE",
    "BEST_FILE",
    "EXPORTED_FILE",
    "HEADER_KEY",
    "STATE_FILE",
    "FullCheckpoint",
    "Snapshot",
    "WeightsFile",
    "build_for",
    "check_state",
    "iteration_of",
    "load_backbone",
    "load_into",
    "load_state",
    "read_full",
    "read_weights",
    "reading",
    "save_backbone",
    "save_state",
    "save_tensors",
    "sha256",
    "spec_of",
    "weights_path",
]
