"""The forecast of a run under way, and how durations and sizes are written."""

import io

import pytest
from rich.console import Console

from xdino.values import span
from xdino_launch import remaining
from xdino_launch.console import ConsoleListener
from xdino_launch.remaining import Remaining, binary_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (8, "8 s"), (59.6, "1 min"), (95, "1 min 35 s"), (600, "10 min"),
     (7800, "2 h 10 min"), (3599.9, "1 h"), (300_000, "3 d 11 h"), (86400, "1 d")],
)  # fmt: skip
def test_durations(seconds, text):
    assert span(seconds) == text


def test_sizes():
    told = [binary_bytes(size) for size in (2 * 2**30, 300_000_000, 1234, 5 * 2**40)]
    assert told == ["2.0 GiB", "286 MiB", "1 KiB", "5.0 TiB"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_forecast_leaves_out_the_start_and_is_said_once():
    clock = Clock()
    run = Remaining(0, 101, clock)
    clock.now = 30.0  # kernels were compiled
    assert run.look({"iteration": 1}) is None
    clock.now = 32.0
    assert run.look({"iteration": 3, "resident_mb": 2048.0}) is None, "too early"
    clock.now = 40.0
    told = run.look({"iteration": 11, "resident_mb": 2048.0})
    assert told == "about 2 min 10 s for 101 steps, 2.0 GiB; revised as it goes"
    clock.now = 50.0  # a state was written, or it was evaluated
    assert run.look({"iteration": 12}) is None, "said once"


def test_plain_lines_say_what_is_left(monkeypatch):
    monkeypatch.setattr(remaining, "LEAST_SECONDS", 0.0)
    out = io.StringIO()
    listener = ConsoleListener(Console(file=out, width=200))
    facts = {"iterations": 1000, "iteration": 0, "images": 9, "data": "d", "steps_per_epoch": 10,
             "total_batch": 1, "peak_lr": 1.0, "precision": "fp32", "device": "cpu"}  # fmt: skip
    listener.started(facts)
    for iteration in (1, 10):
        listener._last_line = -100.0
        listener.step({"iteration": iteration, "epoch": 1, "loss": 1.0, "lr": 0.1})
    lines = out.getvalue().splitlines()
    assert "for 1,000 steps; revised as it goes" in lines[2]
    assert lines[3].endswith("left")
