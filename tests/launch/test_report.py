"""The report of runs made by hand: it parses, holds every number, and reaches for nothing outside."""

import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino import config
from xdino.errors import UsageError
from xdino_eval import quality, results
from xdino_launch import cli
from xdino_launch.report import page as report
from xdino_launch.report.curves import POINTS, draw_curves, series
from xdino_launch.report.page import write_report
from xdino_launch.report.run import Run

VOID = {"meta", "img", "br", "hr", "link", "input"}
SHA = "0123456789abcdef" * 4
HOSTILE = "\"><script>alert('x')</script><img src=http://example.com/x.png onerror=a> & $\\frac$"


class Page(HTMLParser):
    """Checks that tags nest; keeps text outside of style and svg, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.rows: list[tuple[str, str]] = []  # (class, text) of each table row
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.pieces.append(data)
            if "tr" in self.open:
                kind, told = self.rows[-1]
                self.rows[-1] = (kind, told + " " + data)

    @property
    def text(self) -> str:
        return " ".join(self.pieces)

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def row(top1: float | None, top5: float | None, **more) -> results.Row:
    return results.Row(
        **{
            "protocol": "k-NN", "settings": {"k": 20, "temperature": 0.07}, "top1": top1,
            "top5": top5, "data": "photos", "transform": "shorter side 28, fp32",
            "train_size": 1234, "val_size": 321, "checkpoint": SHA,
            "features": "teacher, iteration 40", "seconds": 0.142, **more,
        }
    )  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, whole=True, **overrides) -> a run directory with everything, or only begun."""

    def make(name: str, whole: bool = True, **overrides: str) -> Path:
        path = tmp_path / name
        (path / "attention").mkdir(parents=True)
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        (path / "config.yaml").write_text(config.to_yaml(config.load("debug", dotted)))
        if not whole:
            return path
        start = {"iteration": 0, "time": "2031-05-06T07:08:09Z", "commit": SHA[:40] + "+changes",
                 "python": "3.11.7", "platform": "Linux-6", "packages": {"torch": "2.11.0"},
                 "device": "cpu", "threads": 2, "processes": 1, "seed": 0, "precision": "fp32",
                 "command": ["pretrain", "debug"]}  # fmt: skip
        (path / "environment.json").write_text(json.dumps({"starts": [start]}))
        lines = [
            {"iteration": i, "epoch": 1, "loss": 6.5 - i / 10, "lr": 1.25e-6 * i,
             "teacher_entropy": 3.25, "kl": 2.125}
            for i in range(1, 41)
        ]  # fmt: skip
        lines.append({"iteration": 40, "epoch": 1, "knn_top1": 71.625, "knn_top5": 97.75})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 41, "lo'
        (path / "metrics.jsonl").write_text(text)
        measured = results.Row(
            quality.PROTOCOL, {"images": 19}, None, None, "photos", "centre crop 28", 19, 0, SHA,
            "teacher, iteration 40", notes=["RankMe is 5.12 of 64"],
            metrics=dict(zip(quality.MEASURES, (5.125, 2.5, 0.0625, 87.5), strict=True)),
        )  # fmt: skip
        rows = [row(78.1, 98.4), row(100.0, 100.0, val_size=7), measured]
        results.append(path / "results.json", rows)
        pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        for picture in ("views.png", "attention/a-sheet.png", "attention/b-sheet.png"):
            Image.fromarray(pixels).save(path / picture)
        return path

    return make


def read(run_dirs: list[Path], out: Path) -> tuple[str, Page]:
    html = write_report(run_dirs, out).read_text()
    return html, Page(html)


def test_every_number_stands_in_a_file_of_the_run(make_run, tmp_path):
    path = make_run("one")
    _, page = read([path], tmp_path / "r.html")
    files = "".join(p.read_text() for p in sorted(path.glob("*.*")) if p.suffix != ".png")
    run = Run.open(path)
    told = f"{files} {run.verdict.sentence} {run.commands}"  # rounded there, and the run's own path
    known = set(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", told)) | {"1", "5"}  # top-1, top-5
    shown = re.sub(rf"{SHA[:12]}|top-\d|knn_top\d", "", page.text)
    for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", shown):
        assert number in known, f"{number} is in no file of the run"
    for stored in json.loads((path / "results.json").read_text()):
        for key in ("top1", "top5", "train_size", "val_size", "seconds"):
            assert json.dumps(stored[key]) in page.text
        for key in ("protocol", "data", "transform", "features"):
            assert stored[key].casefold() in page.text.casefold()
    assert "k 20, temperature 0.07" in page.text
    assert SHA[:12] in page.text
    assert SHA not in page.text
    assert "RankMe is 5.12 of 64" in page.text
    assert "cannot" not in page.text
    assert "is not measured" not in page.text


def test_the_file_needs_nothing_else(make_run, tmp_path):
    html, page = read([make_run("one"), make_run("two")], tmp_path / "r.html")
    assert "script" not in page.names
    assert not {"link", "iframe", "object", "embed", "a"} & page.names
    assert sum(tag == "img" for tag, _ in page.tags) == 8
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert html.count("http-equiv") == 1, (
        "nothing is under way: the page does not load itself again"
    )
    identifiers = {attributes.get("id") for _, attributes in page.tags}
    for _tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name == "src":
                assert value.startswith("data:image/")
            elif name in ("href", "xlink:href"):
                assert value[0] == "#"
                assert value[1:] in identifiers
    without_data = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|@import|url\((?!#)", without_data)
    again, _ = read([tmp_path / "one", tmp_path / "two"], tmp_path / "again.html")
    assert again == html, "equal files, equal report"


def test_hostile_names_stay_text(make_run, tmp_path):
    path = make_run("<s>&amp;$x$_", data__path=json.dumps(HOSTILE))
    other = make_run("_other", data__path="plain")
    results.append(
        path / "results.json",
        [row(1.0, 2.0, data=HOSTILE, protocol=HOSTILE, features=HOSTILE, notes=[HOSTILE],
             transform=HOSTILE, checkpoint=HOSTILE, settings={HOSTILE: HOSTILE, "k": "x" * 99})],
    )  # fmt: skip
    (path / "attention" / "<i>'-sheet.png").write_bytes(b"no picture <u>")
    (path / "metrics.jsonl").write_text(
        json.dumps({"iteration": 1, "loss": HOSTILE, HOSTILE: 1.0, "lr": float("nan")})
        + '\n{"iteration": "x", "loss": 1.0}\n7\n'
    )
    html, page = read([path, other], tmp_path / "r.html")
    assert not {"script", "s", "u"} & page.names
    assert "example.com" in page.text
    assert all("example.com" not in a.get("src", "") for _, a in page.tags)
    assert page.text.count(HOSTILE) >= 8
    assert "<s>&amp;$x$_" in page.text
    assert "<script" not in html
    assert "<i>'-sheet.png cannot be read as a picture." in page.text


def test_two_runs_mark_the_keys_that_differ(make_run, tmp_path):
    one = make_run("one", optim__lr="0.001", train__seed="3")
    two = make_run("two", optim__lr="0.002", train__seed="3")
    _, page = read([one, two], tmp_path / "r.html")
    marked = [told.split() for kind, told in page.rows if "differs" in kind]
    assert marked == [["≠", "lr", "0.001", "0.002"]]
    assert "Their configurations differ in optim.lr." in page.text
    assert page.text.count("78.1") == 2
    scores = [told.split()[0] for _, told in page.rows if "k-NN" in told]
    assert scores == ["one", "one", "two", "two"]
    results.append(one / "results.json", [row(50.0, 60.0, protocol="linear")])
    _, page = read([one, two], tmp_path / "r.html")
    measured = [told.split()[0] for _, told in page.rows if "temperature" in told]
    assert measured == ["one", "one", "two", "two", "one"], "equal protocols stand together"
    _, same = read([one, one], tmp_path / "same.html")
    assert not any("differs" in kind for kind, _ in same.rows)
    assert report.ALIKE in same.text
    assert str(one) in same.text, "equal names are told apart by their paths"


def test_a_run_that_has_only_begun_says_what_is_missing(make_run, tmp_path):
    path = make_run("begun", whole=False)
    _, page = read([path], tmp_path / "r.html")
    for words in (
        "not begun", "begun has no results yet", "begun has logged nothing yet", "begun is not measured",
        "There is no views.png.", "There are no pictures yet", "No start is recorded",
    ):  # fmt: skip
        assert words in page.text
    assert "svg" not in page.names
    _, both = read([make_run("whole"), path], tmp_path / "both.html")
    assert "begun has no results yet" in both.text
    assert "78.1" in both.text


def test_a_collapsed_run_is_called_so(make_run, tmp_path):
    path = make_run("flat")
    K = int(config.load("debug").head.prototypes)
    uniform = float(np.log(K))
    last = {"iteration": 50, "loss": uniform, "teacher_entropy": uniform, "kl": 0.0}
    (path / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    _, page = read([path], tmp_path / "r.html")
    assert "flat: the loss sits at ln K: the teacher says nothing" in page.text
    _, page = read([make_run("well")], tmp_path / "r.html")
    assert "the teacher says nothing" not in page.text


def test_mistakes_are_one_sentence(make_run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([empty], "it has no config.yaml"),
        ([tmp_path / "nowhere"], "there is no run folder"),
        ([make_run("one"), empty], "it has no config.yaml"),
        ([tmp_path / "one", "--out", empty], "needs a file"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *map(str, arguments)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert list(empty.iterdir()) == []
    with pytest.raises(UsageError):
        write_report([empty])


ROW = {"protocol": "k-NN", "settings": {}, "top1": 50.0, "top5": None, "data": "d",
       "transform": "t", "train_size": 1, "val_size": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "{"),
        ("results.json", "{}"),
        ("results.json", b"\xff\xfe"),
        ("results.json", json.dumps([{"protocol": "k-NN"}])),
        ("results.json", json.dumps([ROW, 3])),
        ("results.json", json.dumps([ROW | {"top1": "high"}])),
        ("results.json", json.dumps([ROW | {"settings": []}])),
        ("results.json", json.dumps([ROW | {"notes": [[]]}])),
        ("results.json", json.dumps([ROW | {"metrics": 7}])),
        ("environment.json", "[]"),
        ("environment.json", "[" * 100_000),
        ("environment.json", '{"starts": 3}'),
        ("environment.json", '{"starts": [3]}'),
        ("config.yaml", "a: ["),
        ("config.yaml", "- a\n- b\n"),
        ("config.yaml", ""),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        ("metrics.jsonl", "[]\n7\n{}\n"),
        ("metrics.jsonl", '{"iteration": 1, "loss": NaN}\n'),
        ("metrics.jsonl", '{"iteration": 1, "loss": 1' + "0" * 4000 + "}\n"),
        ("metrics.jsonl", '{"iteration": 1, "kl": "much"}\n'),
        ("backbone.safetensors", "no weights"),
    ],
)
def test_damage_is_said_on_a_page_of_the_rest(make_run, tmp_path, name, content):
    path = make_run("one")
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    _, page = read([path], tmp_path / "r.html")
    said = [words for words in page.pieces if words.startswith(f"one: {name} ")]
    assert len(said) == 1
    for other, told in (("config.yaml", "xcit_nano"), ("results.json", "98.4"),
                        ("environment.json", "2031-05-06"), ("results.json", "5.125")):  # fmt: skip
        assert other == name or told in page.text


def test_a_whole_run_has_no_damage(make_run):
    assert Run.open(make_run("one")).damage == []


def test_folders_and_pipes_in_the_place_of_files(make_run, tmp_path):
    path = make_run("one")
    names = ("results.json", "environment.json", "metrics.jsonl", "views.png")
    for name in names:
        (path / name).unlink()
        (path / name).mkdir()
    os.mkfifo(path / "attention" / "c-sheet.png")
    _, page = read([path], tmp_path / "r.html")
    assert page.text.count("Is a directory") == 3
    assert "views.png cannot be read as a picture" in page.text
    assert "c-sheet.png cannot be read as a picture" in page.text


def test_values_of_any_size_and_kind(make_run, tmp_path):
    """What no figure has an axis for, and starts whose fields are of other kinds."""
    path = make_run("one")
    odd = [1e308, -1e308, 10**300, 1e99, -1e99, 0, None, True, [], {"a": 1}, "x", float("nan")]
    lines = [{"iteration": i, "loss": v, "lr": v, "kl": v, "knn_top1": v}
             for i, v in enumerate([*odd, *odd])]  # fmt: skip
    lines += [{"iteration": 10**300, "loss": 1.0}, {"iteration": -5, "loss": 1.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [dict.fromkeys(("time", "commit", "command", "packages", "device"), v) for v in odd]
    (path / "environment.json").write_text(json.dumps({"starts": starts}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html, page = read([path], tmp_path / "r.html")
    assert "values that no curve can show" in page.text
    assert "<svg" in html


def test_names_in_no_encoding(make_run):
    path = make_run(os.fsdecode(b"caf\xe9"))
    written = write_report([path])
    assert "caf\N{REPLACEMENT CHARACTER}" in written.read_text(encoding="utf-8")


def test_the_default_place_is_in_the_run(make_run, capsys):
    one, two = make_run("one"), make_run("two")
    cli.main(["report", str(one)])
    cli.main(["report", str(one), str(two)])
    assert capsys.readouterr().out.splitlines() == [
        str(one / "report.html"),
        str(one / "report-and-two.html"),
    ]
    assert (one / "report.html").is_file()


def test_large_pictures_are_made_smaller(make_run, tmp_path):
    path = make_run("one")
    noise = np.random.default_rng(0).integers(0, 255, (900, 2 * report.WIDEST, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "views.png")
    _, page = read([path], tmp_path / "r.html")
    views = next(a for tag, a in page.tags if tag == "img" and a["alt"] == "views.png")
    assert (views["width"], views["height"]) == (str(report.WIDEST), "450")
    assert views["src"].startswith("data:image/jpeg")


def test_a_long_curve_keeps_its_extremes():
    log = [{"iteration": i, "loss": 1.0} for i in range(50_000)]
    log[12_345]["loss"], log[777]["loss"], log[5]["loss"] = 9.0, -9.0, float("inf")
    x, y = series(log, "loss")
    assert len(x) <= POINTS + 2
    assert (x[0], x[-1], y.max(), y.min()) == (0, 49_999, 9, -9)
    assert np.isfinite(y).all()
    assert len(series([], "loss")[0]) == 0
    assert draw_curves([[], [{"iteration": 1, "loss": "no number"}]]) == ""


def test_figures_of_a_protocol_without_classes(make_run):
    path = make_run("r")
    figures = {"jaccard best head": 41.5, "jaccard <head 1>": 40.0}
    one = row(None, None, protocol="segmentation by attention", metrics=figures)
    results.append(path / "results.json", [one])
    html = write_report([path]).read_text()
    assert "<div>jaccard best head <b>41.5</b></div>" in html
    assert "jaccard &lt;head 1&gt;" in html
    assert "None" not in html


def test_the_scores_of_a_run_under_way(make_run, tmp_path):
    """What metrics.jsonl holds so far, before there are weights or results."""
    path = make_run("half", whole=False)
    lines = [{"iteration": 10 * i, "epoch": i, "knn_top1": 20.125 + i, "chance_top1": 10.0,
              "val_images": 2000} for i in range(30)]  # fmt: skip
    lines[7]["knn_top1"] = 60.5
    lines.append({"iteration": 295, "epoch": 30, "loss": 5.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, page = read([path], tmp_path / "r.html")
    assert "so far: learned, and lost some of it again: k-NN 49.1; untrained 20.1" in page.text
    assert "best 60.5 at epoch 7" in page.text
    assert "Scores while training" in page.text
    for line in lines[:-1]:
        assert json.dumps(line["knn_top1"]) in page.text, "all of them, behind a fold"
    few = html.partition("all evaluations")[0]
    assert [few.count(f">{n}<") for n in (20.125, 60.5, 49.125, 25.125)] == [1, 1, 1, 0]
    assert "iteration 295, no backbone yet" in page.text


def test_curves_are_drawn_with_what_they_are_to_be_compared_with(make_run):
    run = Run.open(make_run("one"))
    assert {key: [(one.name, one.value) for one in of] for key, of in run.levels.items() if of} == {
        "loss": [("ln K", float(np.log(int(run.value("head.prototypes")))))],
    }
    lines = [{"iteration": i, "knn_top1": 5.0 + i, "chance_top1": 2.5} for i in (0, 9)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run.open(run.path)
    assert [(one.name, one.value) for one in run.levels["knn_top1"]] == [
        ("untrained", 5.0), ("chance", 2.5),
    ]  # fmt: skip
    plain, compared = (draw_curves([run.metrics], levels) for levels in (None, [run.levels]))
    assert compared.count("<path") > plain.count("<path")
    other = Run.open(make_run("two", train__init="weights.safetensors"))
    assert other.start == "at the start"


def test_a_film_strip_of_hostile_and_damaged_frames(make_run, tmp_path):
    path = make_run("one")
    (path / "film").mkdir()
    pixels = np.zeros((30, 60, 3), np.uint8)
    for name in ("0000000000.webp", "0000000040.webp"):
        Image.fromarray(pixels).save(path / "film" / name)
    for name in ("0000000020.webp", "<i>.webp", "notes.txt", "-1.webp"):
        (path / "film" / name).write_bytes(b"no picture <u>")
    (path / "film" / "7.webp").mkdir()
    html, page = read([path], tmp_path / "r.html")
    pictures = [a["alt"] for tag, a in page.tags if tag == "img" and "webp" in a["src"]]
    assert pictures == ["epoch 1: k-NN 71.625", "before the first step", "epoch 1: k-NN 71.625"]
    assert "0000000020.webp cannot be read as a picture" in page.text
    assert "<i>" not in html
