"""A run, or two side by side, as one HTML file that needs nothing else to be read.

Everything shown is taken from the run's own files (see `xdino.run_directory`) and written as it
stands there, so every number can be found again. No script, no link, no request: pictures are data
URIs, curves are inline SVG, and what the files say is escaped, for a folder's or a class's name may
hold anything.
What a run does not have yet is said in a sentence, and so is what is damaged: the page is made of
the rest. Equal files give an equal report.
"""

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

from xdino.checkpoint import BACKBONE_FILE, HEADER_KEY
from xdino.errors import RunFailed, UsageError, asked, reason
from xdino.metrics import METRICS_FILE, collapse_warning, read_rows
from xdino.run_directory import CONFIG_FILE
from xdino.runtime.atomic import write_text
from xdino_eval import quality
from xdino_eval.image_files import DAMAGED, printable
from xdino_eval.plotting import Figure, FigureCanvasSVG, matplotlib
from xdino_eval.results import Row

WIDEST = 1280  # pixels of a picture; larger ones are made smaller
WIDEST_SHEET = 960  # of those that come in numbers
HEAVIEST = 400_000  # bytes of a picture that is taken as it is
SHEETS = 12  # pictures of a folder at most
OPEN = 4  # of them, the others behind a fold
POINTS = 1_500  # of a curve; a long run logs tens of thousands
COLOURS = ("#1f5fa8", "#c8551b", "#3a8f4d", "#7d4bb0")  # of runs, or of a single run's curves
LINES = ("-", "--", ":", "-.")
ABSENT = "–"  # noqa: RUF001
LARGEST = 1e100  # of a number in a curve; a figure has no axis for more
ALIKE = "Their configurations are the same."

PANELS = (
    ("loss", {"loss": "loss"}),
    ("teacher entropy and KL, nats", {"teacher_entropy": "teacher's entropy", "kl": "KL"}),
    ("learning rate", {"lr": "learning rate"}),
    ("k-NN top-1 while pretraining, per cent", {"knn_top1": "top-1"}),
)
PICTURES = (
    ("attention", "Attention", "xdino attention RUN IMAGE... --out RUN/attention"),
    ("neighbours", "Nearest neighbours", "xdino neighbours RUN --data DATA"),
)


# --- what a run directory holds ---------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The files of a run, read. `config`: dotted keys to values as they are written. `damage`: what
    could not be read, a sentence each."""

    path: Path
    name: str
    config: dict[str, str]
    facts: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    rows: list[Row]
    quality: list[Row]
    damage: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read everything but the pictures.

        Raises:
            UsageError: no folder, or one that is no run.
        """
        with asked(f"{path} cannot be read"):
            if not path.is_dir():
                raise UsageError(f"there is no run folder {path}")
            if not (path / CONFIG_FILE).exists():
                raise UsageError(f"{path} is not a run: it has no {CONFIG_FILE}")
        damage: list[str] = []
        rows = _rows(path / "results.json", damage)
        return cls(
            path=path,
            name=path.resolve().name,
            config=_config(path / CONFIG_FILE, damage),
            facts=_facts(path / BACKBONE_FILE, damage),
            starts=_starts(path / "environment.json", damage),
            metrics=_metrics(path / METRICS_FILE, damage),
            rows=[row for row in rows if row.protocol != quality.PROTOCOL],
            quality=[row for row in rows if row.protocol == quality.PROTOCOL],
            damage=damage,
        )

    def value(self, key: str) -> str:
        return self.config.get(key, ABSENT)


T = TypeVar("T")


def _json(path: Path, kind: type[T], damage: list[str]) -> T | None:
    """What a JSON file holds, where it is a `kind`; None without the file, or with a damaged one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged and left out: {reason(error)}")
        return None
    if isinstance(value, kind):
        return value
    damage.append(f"{path.name} is damaged and left out: it is no {_KINDS[kind]}")
    return None


_KINDS: dict[Any, str] = {list: "list", dict: "object"}


def _config(path: Path, damage: list[str]) -> dict[str, str]:
    """Dotted keys -> values, both as they are written: 1.0e-06 stays 1.0e-06."""
    try:
        told = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(told)):
            raise ValueError("it refers to itself (an alias), which no run writes")
        tree = yaml.load(told, Loader=yaml.BaseLoader)
        if not isinstance(tree, dict):
            raise ValueError("it holds no sections")
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged and left out: {' '.join(str(error).split())}")
        return {}
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), below)
        else:
            flat[prefix] = ", ".join(map(plain, value)) if isinstance(value, list) else plain(value)

    walk("", tree)
    return flat


def _facts(path: Path, damage: list[str]) -> dict[str, Any]:
    """What the backbone's header says: iteration, iterations, data; nothing without a backbone."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
        facts = header.get("facts", {}) if isinstance(header, dict) else None
        if not isinstance(facts, dict):
            raise ValueError("its header says nothing of a run")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged: {reason(error)}")
        return {}
    return facts


def _starts(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    starts = (_json(path, dict, damage) or {"starts": []}).get("starts")
    if not isinstance(starts, list):
        damage.append(f"{path.name} is damaged: it lists no starts")
        return []
    whole = [start for start in starts if isinstance(start, dict)]
    if len(whole) < len(starts):
        damage.append(f"{path.name} is damaged: a start in it is no object")
    return whole


def _metrics(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that was cut short when the run was killed is left out."""
    try:
        rows, bad = read_rows(path)
        ended = not path.exists() or path.read_bytes()[-1:] == b"\n"
    except (RunFailed, OSError) as error:
        damage.append(f"{path.name} is left out: {error}")
        return []
    if bad > (not ended):
        damage.append(f"{path.name} holds lines that are no rows: they are left out")
    keys = dict.fromkeys(key for _, lines in PANELS for key in lines)
    wild = [key for key in keys if any(not _is_number(row.get(key, 0)) for row in rows)]
    if wild:
        damage.append(
            f"{path.name} holds values that no curve can show (not finite, too large, or no "
            f"numbers): {', '.join(wild)}"
        )
    return rows


def _rows(path: Path, damage: list[str]) -> list[Row]:
    """The rows of results.json that are whole."""
    entries = _json(path, list, damage) or []
    rows = [row for entry in entries if (row := _row(entry)) is not None]
    if len(rows) < len(entries):
        damage.append(f"{path.name} holds entries that are no whole rows: they are left out")
    return rows


def _row(entry: Any) -> Row | None:
    try:
        row = Row(**entry)
    except TypeError:  # no object, or fields that are missing or unknown
        return None
    texts = (row.protocol, row.data, row.transform, row.checkpoint, row.features)
    whole = (
        all(isinstance(value, str) for value in texts)
        and all(value is None or _is_real(value) for value in (row.top1, row.top5))
        and isinstance(row.settings, dict)
        and isinstance(row.metrics, dict)
        and _are_texts(row.notes)
    )
    return row if whole else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a curve can show it."""
    return _is_real(value) and abs(value) <= LARGEST  # not a number is not less


# --- text -------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """A value as its file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text(value: Any) -> str:
    """A value, fit to stand between tags and inside quotes."""
    return escape(printable(plain(value)))


def short(digest: str) -> str:
    """The beginning of a hash; anything else as it is."""
    head, plus, changes = digest.partition("+")
    is_hash = len(head) >= 32 and set(head) <= set("0123456789abcdef")
    return (head[:12] if is_hash else head) + plus + changes


def aligned(value: float | None, others: Iterable[float | None]) -> str:
    """A number as its file has it, filled up to stand with its point below the others' points."""
    if value is None:
        return ""
    decimals = max(len(plain(other).partition(".")[2]) for other in others if other is not None)
    whole, point, part = plain(value).partition(".")
    if not decimals:
        return whole
    return whole + (point or "\u2008") + part + "\u2007" * (decimals - len(part))


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def sentence(words: str) -> str:
    return f'<p class="note">{text(words)}</p>'


def number(value: Any) -> str:
    return f'<td class="n">{text(value)}</td>'


def origin(data: str, transform: str) -> str:
    return f'<td>{text(data)}<div class="fine">{text(transform)}</div></td>'


def hashed(digest: str) -> str:
    return f'<td><code class="hash" title="{text(digest)}">{text(short(digest))}</code></td>'


def warnings(words: Iterable[str]) -> str:
    return "".join(f'<div class="warn">{text(line)}</div>' for line in dict.fromkeys(words))


def table(head: Sequence[str], body: Iterable[str], kind: str = "") -> str:
    """`head`: plain titles, "#" before those of numbers; `body`: rows in HTML."""
    titles = "".join(
        f'<th scope="col" class="n">{text(t[1:])}</th>' if t[:1] == "#"
        else f'<th scope="col">{text(t)}</th>' for t in head
    )  # fmt: skip
    rows = "\n".join(body)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def comparison(runs: Sequence[Run], lines: Iterable[tuple[str, Sequence[Any]]], mark: bool) -> str:
    """A line a name, a column a run; with `mark`, lines whose values differ are marked."""
    if len(runs) == 1:
        pairs = "".join(f"<div><dt>{text(n)}</dt><dd>{text(v[0])}</dd></div>" for n, v in lines)
        return f"<dl>{pairs}</dl>"
    body = []
    for name, values in lines:
        differs = mark and len({plain(value) for value in values}) > 1
        sign = '<span class="sign" title="differs">≠</span> ' if differs else ""
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        row = '<tr class="differs">' if differs else "<tr>"
        body.append(f'{row}<th scope="row">{sign}{text(name)}</th>{cells}</tr>')
    return table(["", *labels(runs)], body, "facts")


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their paths where the names are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def per_run(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
    """One part for each run, side by side where there are two."""
    if len(runs) == 1:
        return part(runs[0])
    halves = zip(labels(runs), runs, strict=True)
    inside = "\n".join(f"<div><h3>{text(name)}</h3>\n{part(run)}</div>" for name, run in halves)
    return f'<div class="beside">\n{inside}\n</div>'


# --- the parts --------------------------------------------------------------------------------


def differing(runs: Sequence[Run]) -> str:
    """Which keys of two configurations differ, in a sentence; empty for a single run."""
    if len(runs) == 1:
        return ""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    names = [key for key in keys if len({run.value(key) for run in runs}) > 1]
    told = f"Their configurations differ in {', '.join(names)}." if names else ALIKE
    return sentence(told)


def damages(runs: Sequence[Run]) -> str:
    """What of the runs' files could not be shown; empty where all of it could."""
    names = zip(labels(runs), runs, strict=True)
    return warnings(f"{name}: {words}." for name, run in names for words in run.damage)


def summary(runs: Sequence[Run]) -> str:
    """What each run is, in the words of its configuration and its backbone."""

    def reached(run: Run) -> str:
        if "iterations" in run.facts:
            here, end = run.facts.get("iteration"), run.facts["iterations"]
            return f"iteration {here} of {end}" + (", finished" if here == end else ", unfinished")
        if run.metrics:
            return f"iteration {run.metrics[-1]['iteration']}, no backbone yet"
        return "not begun"

    def one(run: Run) -> list[tuple[str, str]]:
        first = run.starts[0] if run.starts else {}
        device = f"{first['device']}, {first.get('precision', '')}" if "device" in first else ABSENT
        return [
            ("network", run.value("model.arch")),
            ("pretrained on", run.value("data.path")),
            ("epochs", run.value("train.epochs")),
            ("images a micro-batch", run.value("train.batch_size")),
            ("seed", run.value("train.seed")),
            ("reached", reached(run)),
            ("on", device.removesuffix(", ")),
            ("code", short(str(first.get("commit", ABSENT)))),
        ]

    columns = [one(run) for run in runs]
    lines = [(line[0][0], [value for _, value in line]) for line in zip(*columns, strict=True)]
    return comparison(runs, lines, mark=len(runs) > 1)


def result_table(runs: Sequence[Run]) -> str:
    """Every row of results.json with its protocol and what it was measured on."""
    every = [(name, row) for name, run in zip(labels(runs), runs, strict=True) for row in run.rows]
    # What two runs measured alike stands together, in the order in which it was first measured.
    kinds = list(dict.fromkeys((row.features, row.protocol, row.data) for _, row in every))
    if len(runs) > 1:
        every.sort(key=lambda pair: kinds.index((pair[1].features, pair[1].protocol, pair[1].data)))
    missing = [
        sentence(f"{name} has no results yet: xdino knn RUN --data DATA adds some.")
        for name, run in zip(labels(runs), runs, strict=True)
        if not run.rows
    ]
    if not every:
        return section("Results", *missing)
    top1s = [r.top1 for _, r in every if r.top1 is not None]
    top5s = [r.top5 for _, r in every if r.top5 is not None]
    body = []
    for name, row in every:
        body.append(
            "<tr>" + (f'<th scope="row">{text(name)}</th>' if len(runs) > 1 else "") +
            f"<td>{text(row.features)}</td>"
            f"<td>{text(row.protocol)}{_named(row.metrics)}{_settings(row.settings)}"
            f"{warnings(row.notes)}</td>"
            f'<td class="n top1">{aligned(row.top1, top1s)}</td>'
            f'<td class="n">{aligned(row.top5, top5s)}</td>'
            + origin(row.data, row.transform)
            + number(row.train_size) + number(row.val_size) + number(row.seconds)
            + hashed(row.checkpoint) + "</tr>"
        )  # fmt: skip
    head = ["features", "protocol and settings", "#top-1", "#top-5", "data and transform"]
    head = ["run"] * (len(runs) > 1) + head + ["#train", "#val", "#seconds", "checkpoint"]
    return section(
        "Results",
        sentence("Accuracies in per cent of the frozen features; train and val in images."),
        table(head, body, "results"),
        *missing,
    )


def _named(metrics: dict[str, float]) -> str:
    """What a protocol measures that is no classification, a line a metric, in per cent."""
    return "".join(
        f"<div>{text(name)} <b>{text(value)}</b></div>" for name, value in metrics.items()
    )


def _settings(settings: dict[str, Any]) -> str:
    """A protocol's settings in small print; long ones behind a fold."""
    told = {name: plain(value) for name, value in settings.items()}
    brief = ", ".join(f"{name} {value}" for name, value in told.items() if len(value) <= 60)
    rest = "".join(f"<div>{text(n)} {text(v)}</div>" for n, v in told.items() if len(v) > 60)
    fold = f'<details class="fine"><summary>more settings</summary>{rest}</details>' if rest else ""
    return f'<div class="fine">{text(brief)}</div>{fold}'


def curves(runs: Sequence[Run]) -> str:
    """Loss, teacher, learning rate and k-NN over the iterations, and the values at the end."""
    parts = [
        sentence(f"{name} has logged nothing yet.")
        for name, run in zip(labels(runs), runs, strict=True)
        if not run.metrics
    ]
    drawn = draw_curves([run.metrics for run in runs])
    if drawn:
        if len(runs) > 1:
            keys = zip(COLOURS, labels(runs), strict=False)
            parts.append(
                '<p class="legend">'
                + " ".join(
                    f'<span><i style="background:{c}"></i>{text(name)}</span>' for c, name in keys
                )
                + "</p>"
            )
        parts.append(f"<figure>{drawn}</figure>")
    if any(run.metrics for run in runs):
        if not any("knn_top1" in row for run in runs for row in run.metrics):
            parts.append(sentence("k-NN was not evaluated while pretraining (evaluate.every)."))
        lasts = [_last(run.metrics) for run in runs]
        names = list(dict.fromkeys(name for last in lasts for name in last))
        lines = [(name, [last.get(name, ABSENT) for last in lasts]) for name in names]
        parts += ["<h3>Last logged values</h3>", comparison(runs, lines, mark=False)]
        parts += [
            _collapse(n, run, last) for n, run, last in zip(labels(runs), runs, lasts, strict=True)
        ]
    return section("Curves", *parts)


def _collapse(name: str, run: Run, last: dict[str, Any]) -> str:
    """The trainer's own alarm, where the last logged values call for it."""
    numbers = [last.get(key, math.nan) for key in ("loss", "teacher_entropy", "kl")]
    prototypes = run.value("head.prototypes")
    if not all(map(_is_number, numbers)) or not re.fullmatch(r"[1-9]\d{0,9}", prototypes):
        return ""
    loss, entropy, kl = numbers
    alarm = collapse_warning(loss, {"teacher_entropy": entropy, "kl": kl}, int(prototypes))
    if alarm is None:
        return ""
    words = re.sub(r" = [\d.]+", "", alarm)  # ln K, worked out, stands in no file
    return f'<p class="warn">{text(f"{name}: {words}.")}</p>'


def _last(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last value of everything that was logged."""
    last: dict[str, Any] = {}
    for row in metrics:
        last.update(row)
    return last


def series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of `key`, float64 [N] each, with the extremes where N is large."""
    pairs = [
        (row["iteration"], row[key])
        for row in metrics
        if _is_number(row["iteration"]) and _is_number(row.get(key))
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
    data = [
        (title, [(label, [series(log, key) for log in logs]) for key, label in keys.items()])
        for title, keys in PANELS
    ]
    data = [(t, lines) for t, lines in data if any(len(x) for _, logs in lines for x, _ in logs)]
    if not data:
        return ""
    columns = {3: 3}.get(len(data), min(len(data), 2))
    rows = math.ceil(len(data) / columns)
    style = {
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
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
        for axes, (title, lines) in zip(panels, data, strict=False):
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
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the namespaces go without saying, and the page's width decides the size.
    head, _, rest = svg.partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    name = " and ".join(title for title, _ in data)
    return f'<svg viewBox="{box}" role="img" aria-label="Curves: {text(name)}">{rest}'.strip()


def quality_table(runs: Sequence[Run]) -> str:
    """The label-free measures, with what they warn of."""
    every = [(n, row) for n, run in zip(labels(runs), runs, strict=True) for row in run.quality]
    missing = [
        sentence(f"{name} is not measured: xdino quality RUN --data DATA, which needs no labels.")
        for name, run in zip(labels(runs), runs, strict=True)
        if not run.quality
    ]
    if not every:
        return section("Quality without labels", *missing)
    body = []
    for name, row in every:
        body.append(
            "<tr>" + (f'<th scope="row">{text(name)}</th>' if len(runs) > 1 else "") +
            f"<td>{text(row.features)}</td>"
            + "".join(number(row.metrics.get(key, ABSENT)) for key in quality.MEASURES)
            + f"<td>{_settings(row.settings)}{warnings(row.notes)}</td>"
            + origin(row.data, row.transform)
            + hashed(plain(row.checkpoint)) + "</tr>"
        )  # fmt: skip
    head = ["features", "#RankMe", "#LiDAR", "#feature std", "settings", "data and transform"]
    head = ["run"] * (len(runs) > 1) + head + ["checkpoint"]
    return section("Quality without labels", table(head, body, "results"), *missing)


def picture(path: Path, label: str, widest: int = WIDEST) -> str:
    """The picture as part of the page; a sentence where it is missing or cannot be read."""
    if path.exists() and not path.is_file():
        return sentence(f"{path.name} cannot be read as a picture.")
    try:
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            width, height, kind = image.width, image.height, Image.MIME[image.format or ""]
            if width > widest or len(raw) > HEAVIEST:
                share = min(1, widest / width)
                width, height = round(width * share), max(1, round(height * share))
                small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                out = io.BytesIO()
                small.save(out, "JPEG", quality=85)
                raw, kind = out.getvalue(), "image/jpeg"
    except FileNotFoundError:
        return sentence(f"There is no {path.name}.")
    except DAMAGED:
        return sentence(f"{path.name} cannot be read as a picture.")
    data = base64.b64encode(raw).decode()
    return (
        f'<figure><img src="data:{kind};base64,{data}" width="{width}" height="{height}" '
        f'alt="{text(label)}"><figcaption>{text(label)}</figcaption></figure>'
    )


def views(runs: Sequence[Run]) -> str:
    explained = "A row an image of the first batch, a column a view, as the networks saw them."
    return section(
        "Views",
        sentence(explained),
        per_run(runs, lambda run: picture(run.path / "views.png", "views.png")),
    )


def sheets(runs: Sequence[Run], folder: str, title: str, command: str | None) -> str:
    """The pictures in a folder: the one of all, else the sheets; empty if there never are any."""

    def part(run: Run) -> str:
        inside = run.path / folder
        found = sorted(inside.glob("*-sheet.png")) or [
            path for path in (inside / "all.png",) if path.is_file()
        ]
        if not found:
            hint = f": {command} draws some" if command else ""
            return sentence(f"There are no pictures yet{hint}.")
        shown = [picture(path, f"{folder}/{path.name}", WIDEST_SHEET) for path in found[:SHEETS]]
        more = sentence(f"More lie in {folder}/.") if len(found) > SHEETS else ""
        kind = "sheets" if len(runs) == 1 and len(shown) > 1 else ""
        first, folded = (
            f'<div class="{kind}">' + "\n".join(some) + "</div>" if some else ""
            for some in (shown[:OPEN], shown[OPEN:])
        )
        if folded:
            folded = f"<details><summary>more of {text(folder)}/</summary>{folded}{more}</details>"
        return first + folded

    if command is None and not any((run.path / folder).is_dir() for run in runs):
        return ""
    return section(title, per_run(runs, part))


def configuration(runs: Sequence[Run]) -> str:
    """config.yaml, section by section; of two runs, what differs is marked."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    groups = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    tables = []
    for group in groups:
        inside = [key for key in keys if key.partition(".")[0] == group]
        lines = [(key.partition(".")[2] or key, [run.value(key) for run in runs]) for key in inside]
        tables.append(
            f'<div class="group"><h3>{text(group)}</h3>{comparison(runs, lines, mark=True)}</div>'
        )
    kind = "groups" if len(runs) == 1 else ""
    return section("Configuration", f'<div class="{kind}">' + "\n".join(tables) + "</div>")


def environment(runs: Sequence[Run]) -> str:
    """Every start of each run: when, where, with which code."""
    head = ["started (UTC)", "#from iteration", "commit", "device", "#processes", "#threads",
            "precision", "#seed", "command"]  # fmt: skip
    keys = ("time", "iteration", "commit", "device", "processes", "threads", "precision", "seed")

    def one(start: dict[str, Any]) -> str:
        cells = "".join(
            f'<td class="n">{text(start.get(key, ABSENT))}</td>'
            if title[0] == "#"
            else f'<td class="when">{text(short(str(start.get(key, ABSENT))))}</td>'
            for key, title in zip(keys, head, strict=False)
        )
        command = start.get("command") or []
        command = command if isinstance(command, list) else [command]
        packages = start.get("packages")
        packages = packages if isinstance(packages, dict) else {}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        where = f"{start.get('platform', ABSENT)}, Python {start.get('python', ABSENT)}; {versions}"
        return (
            f"<tr>{cells}<td><code>{text(' '.join(map(str, command)))}</code></td></tr>\n"
            f'<tr class="under"><td colspan="{len(head)}" class="fine">{text(where)}</td></tr>'
        )

    parts = []
    for name, run in zip(labels(runs), runs, strict=True):
        if len(runs) > 1:
            parts.append(f"<h3>{text(name)}</h3>")
        if run.starts:
            parts.append(table(head, map(one, run.starts), "results"))
        else:
            parts.append(sentence("No start is recorded (environment.json)."))
    return section("Environment", *parts)


# --- the page ---------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; --ink: #1c2530; --soft: #5a6672; --line: #dfe3e8; --mark: #fff3d6; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 2.2rem 1.6rem 4rem; color: var(--ink);
  background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--line); }
h3 { font-size: .95rem; margin: 1.1rem 0 .35rem; overflow-wrap: anywhere; }
.lede { color: var(--soft); margin: 0 0 1.2rem; }
.note, figcaption, .fine { color: var(--soft); }
.note { margin: .4rem 0 .8rem; overflow-wrap: anywhere; }
.fine { font-size: .8rem; line-height: 1.4; overflow-wrap: anywhere; }
.warn { font-size: .8rem; color: #9a4b00; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .38rem .8rem .38rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { font-weight: 600; }
thead th { font-size: .8rem; color: var(--soft); white-space: nowrap; vertical-align: bottom; }
th.n, td.n { text-align: right; white-space: nowrap; }
.n + th:not(.n), .n + td:not(.n) { padding-left: .9rem; }
td.top1 { font-weight: 700; }
table.results { width: 100%; }
table.results th[scope=row], table.results td:not(.n) { min-width: 6rem; }
table.results code { overflow-wrap: anywhere; } table.results .hash, td.when { white-space: nowrap; }
table.facts { table-layout: fixed; width: 100%; }
table.facts th:first-child { width: 17rem; }
table.facts tbody th { font-weight: 400; color: var(--soft); }
table.facts th, table.facts td { padding-top: .2rem; padding-bottom: .2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .7rem 1.4rem;
  margin: 0 0 1rem; }
dt { font-size: .8rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
tr.differs th, tr.differs td { background: var(--mark); }
tr.differs .sign { color: #9a4b00; font-weight: 700; }
tr.under td { padding-top: 0; }
tr:has(+ tr.under) td { border-bottom: 0; }
code { font: .8rem/1.4 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
figure { margin: 0 0 1rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); margin: .3rem 0; }
figure svg { display: block; width: 100%; min-width: 640px; height: auto; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { font-size: .8rem; margin-top: .2rem; }
.legend span { margin-right: 1.2rem; } .legend i { display: inline-block; width: .85rem;
  height: .85rem; margin-right: .4rem; border-radius: 2px; vertical-align: -.1rem; }
.beside { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.6rem; }
.sheets { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .4rem 1.4rem; }
.groups { columns: 3 20rem; column-gap: 2.4rem; }
.groups .group { break-inside: avoid; padding-bottom: .9rem; }
.groups h3 { margin-top: 0; }
.groups dl { display: block; font-size: .85rem; margin: 0; }
.groups dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0;
  border-bottom: 1px solid var(--line); }
.groups dt { font-size: inherit; } .groups dd { text-align: right; }
@media (max-width: 720px) { .beside, .sheets { grid-template-columns: minmax(0, 1fr); } }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
# Should a value ever slip through unescaped, a browser still loads and runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(runs: Sequence[Run]) -> str:
    """The whole report."""
    title = " and ".join(labels(runs))
    networks = " and ".join(dict.fromkeys(run.value("model.arch") for run in runs))
    told = f"{networks}, pretrained without labels by self-distillation (DINO)."
    parts = [
        damages(runs),
        summary(runs),
        differing(runs),
        result_table(runs),
        curves(runs),
        quality_table(runs),
        views(runs),
        *(sheets(runs, *about) for about in PICTURES),
        configuration(runs),
        environment(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>xdino report: {text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{text(title)}</h1>\n<p class="lede">{text(told)}</p>\n'
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of two side by side.

    Args:
        out: the file; None: report.html in the first run's folder, with the second's name where
            there are two.

    Raises:
        UsageError: a folder that is no run.
        RunFailed: a place that cannot be written to.
    """
    runs = [Run.open(path) for path in run_dirs]
    if out is None:
        name = "report.html" if len(runs) == 1 else f"report-and-{runs[1].name}.html"
        out = runs[0].path / name
    if out.is_dir():
        raise UsageError(f"--out needs a file, and {out} is a folder")
    write_text(out, page(runs))
    return out
