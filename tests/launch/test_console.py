"""Tables of result rows as a terminal shows them."""

import io
from dataclasses import replace

from rich.console import Console

from xdino_eval.results import Row
from xdino_launch.console import results_table

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


def shown(*rows: Row) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(results_table(rows))
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
