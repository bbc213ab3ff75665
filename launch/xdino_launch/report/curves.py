"""The curves of metrics.jsonl as inline SVG, a figure a panel, so that a narrow page stacks them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    ("top-1 of the classifier, per cent", {"val_top1": "top-1"}),
    ("mIoU of the segmenter, per cent", {"val_miou": "mIoU"}),
    (
        "average precision of the detector, per cent",
        {"val_box_ap": "boxes", "val_mask_ap": "masks"},
    ),
    (
        "top-1 of frozen features, per cent",
        {"knn_top1": "k-NN", "logistic_top1": "linear probe", "grid_top1": "linear probe (grid)"},
    ),
    ("agreement of two views, per cent", {"quality_agreement": "agreement"}),
    ("RankMe", {"quality_rankme": "RankMe"}),
    ("teacher entropy and KL, nats", {"teacher_entropy": "teacher's entropy", "kl": "KL"}),
    ("learning rate", {"lr": "learning rate"}),
)
KEYS = [key for _, lines in PANELS for key in lines]
SIZE = (5.4, 2.9)  # inches of a panel: a phone is as wide
STYLE = {
    "svg.fonttype": "path",  # looks the same everywhere, and needs no font
    "svg.hashsalt": "xdino",  # equal curves give equal bytes
    "font.size": 10.0,
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


@dataclass(frozen=True)
class Level:
    """A horizontal line: what a curve is to be compared with."""

    name: str
    value: float


#: By the key of the curve that they are for.
Levels = Mapping[str, Sequence[Level]]


def draw_curves(
    logs: Sequence[Sequence[dict[str, Any]]], levels: Sequence[Levels] | None = None
) -> str:
    """Inline SVG of the panels that have something to show, each in a figure; empty where none has.

    A colour a run, a line style a quantity; of a single run, a colour a quantity.

    Args:
        levels: of each run, what lies in the panels besides.
    """
    out = []
    for title, keys in PANELS:
        lines = [(key, label, [series(log, key) for log in logs]) for key, label in keys.items()]
        lines = [line for line in lines if any(len(x) for x, _ in line[2])]
        if lines:
            out.append(f"<figure>{_panel(title, lines, levels or [{}] * len(logs))}</figure>")
    return "\n".join(out)


def draw_lines(title: str, axis: str, lines: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """A figure of (label, x, y) over a common axis: a colour a line, then a line style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel(axis, color="#5a6672")
        for place, (label, x, y) in enumerate(lines):
            style = LINES[place // len(COLOURS) % len(LINES)]
            axes.plot(x, y, style + "o", color=COLOURS[place % len(COLOURS)], markersize=3,
                      linewidth=1.4, alpha=0.85, label=label)  # fmt: skip
        axes.legend(frameon=False, fontsize=9)
        return f"<figure>{_inline(figure, title)}</figure>"


Line = tuple[str, str, list[tuple[np.ndarray, np.ndarray]]]  # key, label, (x, y) of each run


def _panel(title: str, lines: Sequence[Line], levels: Sequence[Levels]) -> str:
    runs = len(levels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel("iteration", color="#5a6672")
        for place, (_, label, drawn) in enumerate(lines):
            for run, (x, y) in enumerate(drawn):
                few = "o" if len(x) <= 40 else ""
                line = LINES[place if runs > 1 else 0]
                axes.plot(x, y, line + few, color=COLOURS[run if runs > 1 else place], markersize=3,
                          linewidth=1.4, alpha=0.85, label=label if run == 0 else None)  # fmt: skip
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        _draw_levels(axes, lines, levels)
        return _inline(figure, title)


def _draw_levels(axes: Any, lines: Sequence[Line], levels: Sequence[Levels]) -> None:
    """Dotted lines with their names at the right, where curves have left them, each once."""
    said: set[tuple[str, float]] = set()
    for run, told in enumerate(levels):
        for level in (level for key, _, _ in lines for level in told.get(key, ())):
            if not is_number(level.value) or (level.name, level.value) in said:
                continue
            said.add((level.name, level.value))
            colour = COLOURS[run] if len(levels) > 1 else "#5a6672"
            axes.axhline(level.value, color=colour, linewidth=1.1, linestyle=":")
            axes.annotate(
                level.name,
                (0.99, level.value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                color=colour,
                fontsize=9,
            )


def _inline(figure: Figure, name: str) -> str:
    """As part of an HTML page: no XML head, no namespaces, as wide as the page."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    head, _, rest = out.getvalue().partition("<svg")[2].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    return f'<svg viewBox="{box}" role="img" aria-label="Curves: {escape(name)}">{rest}'.strip()
