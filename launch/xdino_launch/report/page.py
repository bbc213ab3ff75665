"""A run, or two side by side, as one HTML file that needs nothing else to be read.

Everything shown is taken from the run's own files (`report.run`) and written as it stands there, so
every number can be found again. No script, no link, no request: pictures are data URIs, curves are
inline SVG, and the template escapes what the files say, for a folder's or a class's name may hold
anything.
What a run does not have yet is said in a sentence, and so is what is damaged: the page is made of
the rest. Equal files give an equal report, but that the page of a run that is under way says when it
was drawn, and loads itself again.
"""

import base64
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from xdino.data.image_files import DAMAGED, printable
from xdino.errors import UsageError
from xdino.runtime.atomic import write_text
from xdino_eval.results import Row
from xdino_launch.report.curves import COLOURS, draw_curves
from xdino_launch.report.film_strip import FOLDER, MOST, frames
from xdino_launch.report.paying import compare
from xdino_launch.report.run import ABSENT, Run, names_of, plain, short

WIDEST = 1280  # pixels of a picture; larger ones are made smaller
WIDEST_SHEET = 960  # of those that come in numbers
HEAVIEST = 400_000  # bytes of a picture that is taken as it is
SHEETS = 12  # pictures of a folder at most
LONGEST_SETTING = 60  # characters; longer ones are behind a fold
REFRESH = 30  # seconds after which a page under way loads itself again
FEW_SCORES = 10  # rows of evaluations that are not folded away
ALIKE = "Their configurations are the same."


# --- pictures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One for the page: where it comes from, and itself as a data URI; or why it is not there."""

    label: str
    uri: str = ""
    width: int = 0
    height: int = 0
    absent: str = ""


def picture(path: Path, label: str, widest: int = WIDEST) -> Picture:
    """The picture in a file, made smaller where it is large."""
    unreadable = Picture(label, absent=f"{path.name} cannot be read as a picture.")
    if path.exists() and not path.is_file():
        return unreadable
    try:
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            width, height, kind = image.width, image.height, Image.MIME[image.format or ""]
            if width > widest or len(raw) > HEAVIEST:
                scale = min(1, widest / width)
                width, height = round(width * scale), max(1, round(height * scale))
                small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                out = io.BytesIO()
                small.save(out, "JPEG", quality=85)
                raw, kind = out.getvalue(), "image/jpeg"
    except FileNotFoundError:
        return Picture(label, absent=f"There is no {path.name}.")
    except DAMAGED:
        return unreadable
    return Picture(label, f"data:{kind};base64,{base64.b64encode(raw).decode()}", width, height)


def sheets(run: Run, folder: str) -> tuple[list[Picture], bool]:
    """The sheet of all of a folder's images and those of one; and whether there are more of them."""
    inside = run.path / folder
    found = [path for path in (inside / "sheet.png",) if path.is_file()]
    found += sorted(inside.glob("*-sheet.png"))
    found = found or [path for path in (inside / "all.png",) if path.is_file()]
    shown = [picture(path, f"{folder}/{path.name}", WIDEST_SHEET) for path in found[:SHEETS]]
    return shown, len(found) > SHEETS


def film(run: Run) -> list[Picture]:
    """The frames of the film strip, in order, each under its epoch and its score."""
    found = frames(run.path / FOLDER)
    rows = {row["iteration"]: row for row in run.scores}
    return [
        picture(path, scored_at(run, rows.get(iteration), iteration), WIDEST_SHEET)
        for iteration, path in list(found.items())[-MOST:]
    ]


def scored_at(run: Run, row: dict[str, Any] | None, iteration: int) -> str:
    """A caption: when it was, and how it scored then."""
    if iteration == 0:
        when = "before the first step"
    else:
        when = f"epoch {row['epoch']}" if row and "epoch" in row else f"iteration {iteration}"
    measure = run.measure
    if row is None or measure is None or measure.key not in row:
        return when
    return f"{when}: {measure.name} {plain(row[measure.key])}"


def opening(run: Run, strip: Sequence[Picture]) -> Picture:
    """The picture that a report opens with: the newest there is of what the network sees."""
    if strip and not strip[-1].absent:
        return strip[-1]
    shown, _ = sheets(run, "attention")
    good = [one for one in shown if not one.absent]
    return good[0] if good else picture(run.path / "views.png", "views.png")


# --- tables -----------------------------------------------------------------------------------


def together(runs: Sequence[Run]) -> list[tuple[str, Row]]:
    """(name, row): what two runs measured alike stands together, as it was first measured."""
    named = zip(names_of(runs), runs, strict=True)
    every = [(name, row) for name, run in named for row in run.rows]
    if len(runs) == 1:
        return every

    def kind(pair: tuple[str, Row]) -> tuple[str, str, str]:
        return pair[1].features, pair[1].protocol, pair[1].data

    kinds = list(dict.fromkeys(map(kind, every)))
    return sorted(every, key=lambda pair: kinds.index(kind(pair)))


def configuration(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """Section -> (key, each run's value)."""
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        group, _, name = key.partition(".")
        groups.setdefault(group, []).append((name or key, [run.value(key) for run in runs]))
    return groups


def differing(runs: Sequence[Run]) -> str:
    """Which keys of two configurations differ, in a sentence."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    names = [key for key in keys if len({run.value(key) for run in runs}) > 1]
    return f"Their configurations differ in {', '.join(names)}." if names else ALIKE


def beside(columns: Iterable[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(name, each run's value) of everything that any of the runs has."""
    columns = list(columns)
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, ABSENT) for column in columns]) for name in names]


def aligned(value: float | None, others: Iterable[float | None]) -> str:
    """A number as its file has it, filled up to stand with its point below the others' points."""
    if value is None:
        return ""
    decimals = max(len(plain(other).partition(".")[2]) for other in others if other is not None)
    whole, point, part = plain(value).partition(".")
    if not decimals:
        return whole
    return whole + (point or "\u2008") + part + "\u2007" * (decimals - len(part))


def settings(given: dict[str, Any]) -> tuple[str, list[str]]:
    """A protocol's settings: the short ones in a line, and each long one."""
    told = {name: plain(value) for name, value in given.items()}
    brief = [f"{name} {value}" for name, value in told.items() if len(value) <= LONGEST_SETTING]
    long = [f"{name} {value}" for name, value in told.items() if len(value) > LONGEST_SETTING]
    return ", ".join(brief), long


def scores(run: Run) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """The columns of the evaluations while training, the rows to look at first, and all of them.

    First are the network before its first step, the best, and the last ones.
    """
    rows = run.scores
    keys = dict.fromkeys(key for row in rows for key in row)
    beside = ("iteration", "epoch", "val_images")
    columns = [key for key in keys if key not in beside and not key.startswith("chance_")]
    few = list(rows)
    if len(rows) > FEW_SCORES:
        best = [row for row in rows if row == run.best][:1]
        last = rows[-(FEW_SCORES - 2) :]
        few = [row for row in rows if row is rows[0] or row in best or row in last]
    return columns, few, rows


def command(start: dict[str, Any]) -> str:
    given = start.get("command") or []
    return " ".join(map(str, given if isinstance(given, list) else [given]))


def software(start: dict[str, Any]) -> str:
    packages = start.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return f"{start.get('platform', ABSENT)}, Python {start.get('python', ABSENT)}; {versions}"


# --- the page ---------------------------------------------------------------------------------


def page(runs: Sequence[Run], live: bool = False, others: Sequence[Run] = ()) -> str:
    """The whole report; `live`: of a run under way. others: classifiers to compare with."""
    environment = Environment(
        loader=PackageLoader("xdino_launch.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        # Every value as its file has it; what is no text in any encoding is replaced.
        finalize=lambda value: value if isinstance(value, Markup) else printable(plain(value)),
    )
    rooms = (aligned, beside, command, configuration, differing, film, opening, picture, scores,
             settings, sheets, short, software, together)  # fmt: skip
    environment.globals |= {room.__name__: room for room in rooms}
    return environment.get_template("report.html.j2").render(
        runs=runs,
        names=(names := names_of(runs)),
        pairs=list(zip(names, runs, strict=True)),
        curves=Markup(draw_curves([run.metrics for run in runs], [run.levels for run in runs])),
        paying=compare([*runs, *others]) if others else None,
        Markup=Markup,
        refresh=REFRESH if live else None,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()) if live else None,
        colours=COLOURS,
        absent=ABSENT,
    )


def write_report(
    run_dirs: Sequence[Path],
    out: Path | None = None,
    live: bool = False,
    compared: Sequence[Path] = (),
) -> Path:
    """Write the report of one run, or of two side by side.

    Args:
        out: the file; None: report.html in the first run's folder, with the second's name where
            there are two.
        live: the run is under way, and the page loads itself again until it is drawn once more.
        compared: fine-tuned runs whose scores stand beside this one's.

    Raises:
        UsageError: a folder that is no run, or one that was not fine-tuned in a comparison.
        RunFailed: a place that cannot be written to.
    """
    runs = [Run.open(path) for path in run_dirs]
    others = [Run.open(path) for path in compared]
    for run in [*runs, *others] if others else ():
        if not run.fine_tuned:
            raise UsageError(
                f"--beside compares classifiers, and {run.path} is a run of xdino {run.learner}: name "
                "runs of xdino finetune, or give it as RUN2"
            )
    if out is None:
        name = "report.html" if len(runs) == 1 else f"report-and-{runs[1].name}.html"
        out = runs[0].path / name
    if out.is_dir():
        raise UsageError(f"--out needs a file, and {out} is a folder")
    write_text(out, page(runs, live, others))
    return out
