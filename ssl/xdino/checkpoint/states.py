"""The whole state of a run, `torch.save` of plain types and tensors, sealed with its own checksum."""

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import torch

from xdino.checkpoint.plain import load_plain, reading
from xdino.errors import RunFailed, world
from xdino.runtime.atomic import written_beside

STATE_FILE = Path("checkpoints") / "last.pt"

# A state ends with its own checksum, as the comment of the zip file that torch writes: one file that
# is right or not, wherever it is moved, and that torch reads like any other.
_SEAL = b"sha256 "
_SEAL_SIZE = len(_SEAL) + 64
_ZIP_END = b"PK\x05\x06"  # of a zip's last record: 22 bytes where it has no comment


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's whole state: tensors and plain types only.

    Raises:
        RunFailed: it cannot be written; what `path` held is untouched.
    """
    with written_beside(path) as beside:
        torch.save(state, beside)
        _seal(beside)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        RunFailed: the file is damaged, be it by one byte, cannot be read, or is something else.
    """
    check_state(path)
    with reading(path):
        state = load_plain(path)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise RunFailed(f"{path} is not the state of a run")
    if not isinstance(state.get("iteration"), int):  # the rest is its job's
        raise RunFailed(f"{path} is the state of a run, but lacks its iteration")
    return state


def iteration_of(path: Path) -> int:
    """The iteration of a state, whose tensors are not read; its checksum is not looked at.

    Raises:
        RunFailed: it is none, or damaged as far as that shows.
    """
    with reading(path):
        state = load_plain(path, mapped=True)
    if not isinstance(state, dict) or not isinstance(state.get("iteration"), int):
        raise RunFailed(f"{path} is not the state of a run")
    return int(state["iteration"])


def _seal(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment
        file.write(struct.pack("<H", _SEAL_SIZE))
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL + digest.encode())


def check_state(path: Path) -> None:
    """Compare a state with its own checksum. States from before there were any have none.

    Raises:
        RunFailed: the file is damaged, or cannot be read.
    """
    with world(f"read {path}"), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _SEAL_SIZE, 0))
        tail = file.read()
        if tail[-22:-18] == _ZIP_END and tail[-2:] == b"\0\0":
            return
        digest = hashlib.sha256()
        file.seek(0)
        left = size - _SEAL_SIZE
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    if tail != _SEAL + digest.hexdigest().encode():
        raise RunFailed(f"{path} is damaged: its checksum is not that of its content")
