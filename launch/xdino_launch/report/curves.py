"""The curves of metrics.jsonl as one inline SVG."""

import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any, TypeGuard

import numpy as np

from xdino_eval.sheets import Figure, FigureCanvasSVG, matplotlib

POINTS = 1_500  # of a curve; a long run logs tens of thousands
COLOURS = ("#1f5fa8", "#c8551b", "#3a8f4d", "#7d4bb0")  # of runs, or of a single run's curves
LINES = ("-", "--", ":", "-.")
LARGEST = 1e100  # of a number in a curve; a figure has no axis for more
PANELS = (
    ("loss", {"loss": "loss"}),
    ("teacher entropy and KL, nats", {"teacher_entropy": "teacher's entropy", "kl": "KL"}),
    ("learning rate", {"lr": "learning rate"}),
    ("k-NN top-1 while pretraining, per cent", {"knn_top1": "top-1"}),
)
KEYS = [key for _, lines in PANELS for key in lines]
STYLE = {
    "svg.fonttype": "path",  # looks the same everywhere, and needs no font
    "svg.hashsalt": "xdino",  # equal curves give equal bytes
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.formatter.limits": (-4, 6),
}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a curve can show it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of `key`, float64 [N] each, with the extremes where N is large."""
    pairs = [
        (row["iteration"], row[key])
        for row in metrics
        if is_number(row["iteration"]) and is_number(row.get(key))
    ]
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    if len(x) > POINTS:
        parts = np.array_split(np.arange(len(x)), POINTS // 2)
        ends = [int(part[pick(y[part])]) for part in parts for pick in (np.argmin, np.argmax)]
        keep = np.unique([0, *ends, len(x) - 1])
        x, y = x[keep], y[keep]
    return x, y


def draw_curves(logs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Inline SVG of the panels that have something to show; empty where none has.

    A colour a run, a line style a quantity; of a single run, a colour a quantity.
    """
    panels = [
        (title, [(label, [series(log, key) for log in logs]) for key, label in keys.items()])
        for title, keys in PANELS
    ]
    panels = [(t, lines) for t, lines in panels if any(len(x) for _, of in lines for x, _ in of)]
    if not panels:
        return ""
    columns = 3 if len(panels) == 3 else min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
        for axes, (title, lines) in zip(places, panels, strict=False):
            axes.set_title(title, fontsize=9.5)
            axes.set_xlabel("iteration", color="#5a6672")
            axes.tick_params(labelbottom=True)
            for place, (label, drawn) in enumerate(lines):
                for run, (x, y) in enumerate(drawn):
                    colour = COLOURS[run if len(logs) > 1 else place]
                    few = "o" if len(x) <= 40 else ""
                    line = LINES[place if len(logs) > 1 else 0]
                    axes.plot(x, y, line + few, color=colour, markersize=3, linewidth=1.4,
                              alpha=0.85, label=label if run == 0 else None)  # fmt: skip
            if len(lines) > 1:
                axes.legend(frameon=False, fontsize=8.5)
        return _inline(figure, " and ".join(title for title, _ in panels))


def _inline(figure: Figure, name: str) -> str:
    """As part of an HTML page: no XML head, no namespaces, as wide as the page."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    head, _, rest = out.getvalue().partition("<svg")[2].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    return f'<svg viewBox="{box}" role="img" aria-label="Curves: {escape(name)}">{rest}'.strip()
