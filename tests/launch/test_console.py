"""Tables of result rows as a terminal shows them."""

import io
import re
from dataclasses import replace

from rich.console import Console

from xdino_eval.results import Row
from xdino_launch.console import ConsoleListener, Pace, print_results

ROW = Row(
    protocol="k-NN",
    settings={"k": 20, "temperature": 0.07},
    top1=71.25,
    top5=93.0,
    data="fashion_mnist",
    transform="shorter side 28, centre crop 28, fp32",
    train_size=10000,
    val_size=2000,
)


def shown(*rows: Row, width: int = 160) -> str:
    out = io.StringIO()
    print_results(rows, Console(file=out, width=width))
    return out.getvalue()


def test_rows_of_classification():
    found = shown(ROW, replace(ROW, settings={"cs": [0.1, 1.0, 10.0, 100.0]}))
    for text in ("k-NN", "k 20, temperature 0.07", "71.25", "10,000", "cs 0.1..100 (4)"):
        assert text in found
    assert "metrics" not in found
    assert "a" * 17 not in shown(replace(ROW, settings={"long": "a" * 17})), "the file has it"


def test_metrics_of_what_is_no_classification():
    other = replace(ROW, top1=None, top5=None, metrics={"mAP medium": 12.345, "mP@1 hard": 100.0})
    found = shown(ROW, other)
    for text in ("71.25", "mAP medium  12.3", "mP@1 hard  100.00", " - "):
        assert text in found
    assert "None" not in found


def test_a_table_is_whole_at_80_columns():
    """What the rows share stands below it; what they do not share keeps its column."""
    told = replace(ROW, features="teacher, iteration 1562", notes=["2 images could not be read"])
    rows = (told, replace(told, settings={"k": 200, "temperature": 0.04}, top1=7.5))
    found = shown(*rows, width=80)
    assert max(map(len, found.splitlines())) <= 80
    for text in ("k 20, temperature 0.07", "71.25", "7.50", "data: fashion_mnist", "train: 10,000",
                 "features: teacher, iteration 1562", "note: 2 images"):  # fmt: skip
        assert found.count(text) == 1, text
    found = shown(told, replace(told, data="another", train_size=5), width=80)
    assert "another" in found
    assert "data:" not in found
    assert shown(width=80).count("protocol") == 1


def test_measures_of_quality_are_no_per_cent():
    row = replace(
        ROW, protocol="quality without labels", top1=None, top5=None, metrics={"rankme": 0.01234}
    )
    for width in (80, 160):
        found = shown(row, width=width)
        assert "rankme 0.01234" in found
        assert "per cent" not in found
    assert "top-1" not in shown(row, width=80)


def run_of(console: Console, rows: list[dict]) -> None:
    facts = {
        "images": 50_000,
        "data": "a folder of that name",
        "iteration": 0,
        "iterations": 12_345,
    }
    more = {"steps_per_epoch": 195, "total_batch": 256, "peak_lr": 5e-4, "precision": "fp32"}
    with ConsoleListener(console) as listener:
        listener.started({**facts, **more, "device": "cpu"})
        for row in rows:
            listener.step(row)


ROWS = [
    {"iteration": i, "epoch": 30, "loss": 8.123456, "lr": 4.5e-4, "images_per_second": 1234.5,
     "wait_share": 0.12}
    for i in (5000, 5010)
]  # fmt: skip


def test_progress_is_whole_at_80_columns(monkeypatch):
    clock = iter(range(0, 10_000_000, 200))
    monkeypatch.setattr("xdino_launch.console.time.monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    run_of(Console(file=out, width=80, force_terminal=True, color_system=None), ROWS)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    assert "loss 8.123 · lr 4.50e-04 · 1234 images/s · 12 % waiting for data" in lines
    assert any("5010/12345" in line and line.rstrip().endswith("left") for line in lines)


def test_a_log_has_whole_lines_and_says_how_long_it_takes(monkeypatch):
    clock = iter(range(0, 10_000_000, 200))
    monkeypatch.setattr("xdino_launch.console.time.monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    run_of(Console(file=out, width=80), ROWS)
    first, *_, last = out.getvalue().splitlines()
    assert first.endswith("fp32 on cpu")
    assert last.startswith("epoch 30 · iteration 5,010/12,345 · loss 8.123 ")
    assert last.endswith(" left")


def test_what_is_left_follows_from_the_rows_however_slow_they_are():
    pace = Pace(100)
    assert pace.left(1, 1000.0) == ""
    assert pace.left(11, 1000.0 + 10 * 3600) == "3 d 17 h left"
    for i in range(12, 12 + 2 * Pace.ROWS):  # faster now: what was slow is forgotten
        told = pace.left(i, 40_000.0 + i)
    assert told == f"{100 - i} s left"
    assert pace.left(100, 50_000.0) == ""
