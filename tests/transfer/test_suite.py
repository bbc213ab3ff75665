"""`xdino transfer`: suites read, gone through, stopped and gone on with, and what is wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone, save_backbone
from xdino.errors import RunFailed, UsageError
from xdino.runtime.lock import Lock
from xdino_eval.extraction import Options
from xdino_eval.results import load
from xdino_transfer import suite as suites
from xdino_transfer.suite import Going, Suite, frozen_columns

SPEC = BackboneSpec(
    "xcit_nano_12_p8",
    shape={"embed_dim": 16, "depth": 1, "num_heads": 2},
    input_size=24,
    resize=24,
)
TEXT = "data:\n  one: one\n  two: two\nknn:\n  k: 2\nlinear:\n"


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """Two sets of dark and bright images, weights, a suite."""
    rng = np.random.default_rng(0)
    for name, held_out in (("one", "val"), ("two", "test")):
        for split, count in (("train", 6), (held_out, 3)):
            for kind in ("dark", "bright"):
                for i in range(count):
                    path = tmp_path / name / split / kind / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = rng.integers(0, 90, (24, 24, 3)) + 160 * (kind == "bright")
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
    save_backbone(tmp_path / "w.safetensors", SPEC.build(), SPEC)
    (tmp_path / "suite.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def going(folder: Path, said: list[str] | None = None) -> Going:
    backbone = load_backbone("w.safetensors")
    makes = frozen_columns(backbone, Options())
    suite = Suite.read(Path("suite.yaml"), makes)
    columns = {name: makes[name](told) for name, told in suite.columns.items()}
    say = (said if said is not None else []).append
    return Going(suite, columns, folder, backbone.origin.sha256, 3, say)


def test_one_table_and_what_was_measured(xdino, there):
    line = ("transfer", "w.safetensors", "--suite", "suite.yaml", "--run", "out")
    code, out, error = xdino(*line)
    assert code == 0, error
    assert max(map(len, out.splitlines())) <= 80
    assert "k-NN" in out
    assert out.splitlines()[3].split("│")[1].strip() == "one"
    assert "one: knn, 12 images to learn from, 6 to score" in error
    rows = load("out/results.json")
    cells = [(row.settings["set"], row.settings["column"]) for row in rows]
    assert cells == [("one", "knn"), ("one", "linear"), ("two", "knn"), ("two", "linear")]
    assert rows[0].settings["k"] == 2
    assert {row.top1 for row in rows} == {100.0}
    assert len({row.checkpoint for row in rows}) == 1
    page = Path("out/report.html").read_text()
    assert "What the weights are worth on 2 data sets" in page
    assert page.count("100.00") >= 4
    assert not list(Path("out").rglob("features")), "kept only until a data set is done"
    code, out, error = xdino(*line, "--json")
    assert (code, error, len(json.loads(out))) == (0, "", 4), "nothing is computed again"
    Path("suite.yaml").write_text(TEXT.replace("  two", "  more: one\n  two"))
    code, out, error = xdino(*line)
    assert [e for e in error.splitlines() if "to learn from" in e] == [
        f"more: {column}, 12 images to learn from, 6 to score" for column in ("knn", "linear")
    ]


def test_a_stopped_suite_goes_on(there, monkeypatch):
    first = going(there / "out")
    real = suites.Going._keep

    def stopped(self, name, column, rows):
        if (name, column) == ("two", "knn"):
            raise KeyboardInterrupt
        real(self, name, column, rows)

    monkeypatch.setattr(suites.Going, "_keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len(first.done()) == 2
    monkeypatch.setattr(suites.Going, "_keep", real)
    said: list[str] = []
    assert len(going(there / "out", said).run()) == 4
    assert [line.split(",")[0] for line in said] == ["two: knn", "two: linear"]


def test_where_the_results_go_unless_told(xdino, there):
    Path("suite.yaml").write_text("data:\n  one: one\nknn:\n  k: 13\n")
    code, _, error = xdino("transfer", "w.safetensors", "--suite", "suite.yaml")
    assert code == 0, error
    assert len(load("w-transfer/results.json")) == 1
    # Of 12 images to learn from: a sentence, and no line of code.
    assert "xdino: k = 13 asks for more neighbours than the 12 training images" in error
    assert "UserWarning" not in error


def test_two_processes_do_not_fill_one_table(xdino, there):
    going(there / "out").begin()
    with Lock(there / "out"):
        line = ("transfer", "w.safetensors", "--suite", "suite.yaml", "--run", "out")
        code, out, error = xdino(*line)
    assert (code, out) == (2, "")
    assert "process" in error
    assert not Path("out/results.json").exists()


def test_one_cell_that_fails_costs_no_other(there, xdino):
    for path in (there / "one" / "val").rglob("*.png"):
        path.write_bytes(b"")
    code, out, error = xdino("transfer", "w.safetensors", "--suite", "suite.yaml", "--run", "out")
    assert (code, out) == (1, "")
    assert "2 of the suite's cells failed (one, knn: no image of one could be read" in error
    assert len(load("out/results.json")) == 2
    assert "two" in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no data: write NAME: FOLDER below data:"),
        ("data:\n", "names no data"),
        ("dta:\n  a: one\n", 'dta is no section: did you mean "data"?'),
        ("data:\n  a: one\nknnn:\n", 'knnn is no section: did you mean "knn"?'),
        ("data:\n  a: one\nknn:\n  kk: 1\n", 'knn.kk is not a known key: did you mean "k"?'),
        ("data:\n  a: one\nknn:\n  k: many\n", "knn.k "),
        ("data:\n  a: one\nknn:\n  k: 0\n", "knn.k must be 1 or more"),
        ("data:\n  a: one\nlinear:\n  protocol: logistics\n", 'did you mean "logistic"?'),
        ("data:\n  a: on\n", 'did you mean "one"?'),
        ("data:\n  a: fashion_mnist_samples\n", 'did you mean "fashion_mnist_sample"?'),
        ("data:\n  ../a: one\n", "a data set is called by letters"),
        ("data:\n  a: [one]\n", "data.a must be a folder or a name"),
        ("data:\n  a:\n", "data.a must be a folder or a name"),
        ("data:\n  a: one\n  a: two\n", "a is there already"),
        ("data:\n  a: one\n  b.category: x\n", "a data set is called by letters"),
        ("data: one\n", "must hold sections with keys below them"),
        ("[a]\n", "must hold sections"),
        ("data: {\n", "is not YAML"),
    ],
)
def test_a_suite_that_is_none_is_refused_before_anything(xdino, there, text, sentence):
    Path("suite.yaml").write_text(text)
    code, out, error = xdino("transfer", "w.safetensors", "--suite", "suite.yaml", "--run", "out")
    assert (code, out) == (2, "")
    assert sentence in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_a_folder_of_something_else_is_left_alone(xdino, there):
    line = ("transfer", "w.safetensors", "--suite", "suite.yaml", "--run")
    code, _, error = xdino(*line, "one")
    assert code == 2
    assert "one holds something else than a suite" in error
    assert xdino("transfer", "w.safetensors", "--suite", "suit.yaml", "--run", "out")[0] == 2
    going(there / "out").begin()
    Path("suite.yaml").write_text(TEXT.replace("k: 2", "k: 3"))
    code, _, error = xdino(*line, "out")
    assert (code, 'was begun with another knn ({"k": "2"})' in error) == (2, True)
    Path("suite.yaml").write_text(TEXT)
    save_backbone(there / "w.safetensors", SPEC.build(), SPEC, iteration=2)
    code, _, error = xdino(*line, "out")
    assert (code, "out is of other weights" in error) == (2, True)
    for content in ("{", "[]", '{"weights": 1}'):
        Path("out/suite.json").write_text(content)
        with pytest.raises(RunFailed, match="is damaged"):
            going(there / "out").begin()


def test_inaturalists_rank_is_named_behind_its_set(there):
    Path("suite.yaml").write_text("data:\n  bugs: one\n  bugs.category: family\n  two: two\n")
    suite = Suite.read(Path("suite.yaml"), {"knn": lambda told: lambda cell: []})
    assert {name: d.category for name, d in suite.data.items()} == {"bugs": "family", "two": "name"}
    assert suite.columns == {"knn": {}}
    with pytest.raises(UsageError, match="there is no suite file"):
        Suite.read(Path("nothing.yaml"), {})


def test_networks_that_learn_on_and_from_scratch(xdino, there):
    """The same recipe and as many steps; what is wrong with it is told before anything learns."""
    learning = "finetune:\n  train.epochs: 1\n  train.batch_size: 4\n  train.lr: 1\nscratch:\n"
    Path("suite.yaml").write_text("data:\n  one: one\n" + learning)
    line = ("transfer", "w.safetensors", "--suite", "suite.yaml", "--run", "out")
    code, out, error = xdino(*line)
    assert (code, out) == (2, "")
    assert "train.lr is not a known key" in error
    assert not Path("out").exists()
    Path("suite.yaml").write_text("data:\n  one: one\n" + learning.replace("  train.lr: 1\n", ""))
    code, out, error = xdino(*line)
    assert code == 0, error
    assert "fine-tuned" in out
    assert "scratch" in out
    tuned, scratch = load("out/results.json")
    assert tuned.settings["init"] == "w.safetensors"
    assert scratch.settings["init"] == "from scratch"
    assert tuned.settings["epochs"] == scratch.settings["epochs"] == 1
    assert tuned.settings["arch"] == scratch.settings["arch"]
    assert tuned.transform == scratch.transform
    config = Path("out/one/scratch/config.yaml").read_text()
    assert "embed_dim: 16" in config
    assert "head_scale: 1.0" in config
    code, again, error = xdino(*line)
    assert (code, again, error) == (0, out, "")
