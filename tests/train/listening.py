"""What tests hear of a run, and what it leaves in metrics.jsonl."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xdino import checkpoint
from xdino.job import Listener


class Ear(Listener):
    """Keeps what it hears; does `act` after iteration `at`."""

    def __init__(self, at: int | None = None, act: Callable[[], None] | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notices: list[str] = []
        self.at, self.act = at, act

    def step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if row["iteration"] == self.at and "loss" in row and self.act is not None:
            self.act()

    def notice(self, sentence: str) -> None:
        self.notices.append(sentence)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_networks(one: Path, two: Path) -> None:
    """The last states of two runs hold the same bits."""
    states = [
        checkpoint.load_state(run / "checkpoints" / "last.pt")["learner"] for run in (one, two)
    ]
    for role in ("student", "teacher"):
        for name, value in states[0][role].items():
            assert torch.equal(value, states[1][role][name]), name
