"""`xdino runs`: what stands in a folder, read without touching it."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict

import pytest

from xdino.runtime.lock import Lock
from xdino_eval.results import Row
from xdino_launch import runs


def make(folder, iteration=None, iterations=40, rows=(), judged=()):
    """A run as far as its files go: weights of `iteration`, metrics and scores."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  epochs: 4\n")
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if iteration is not None:
        told = json.dumps({"facts": {"iteration": iteration, "iterations": iterations}})
        header = json.dumps({"__metadata__": {"xdino": told}}).encode()
        (folder / "backbone.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    if judged:
        (folder / "results.json").write_text(json.dumps([asdict(row) for row in judged]))
    return folder


def row(protocol, top1, features="teacher, iteration 40"):
    return Row(protocol, {}, top1, None, "d", "t", 8, 2, features=features)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"iteration": 20, "epoch": 2, "loss": 5.5, "knn_top1": 61.0}, {"iteration": 40}]
    judged = [row("k-NN", 60.0), row("k-NN", 99.0, "raw pixels"), row("linear, SGD", 70.25)]
    make(tmp_path / "runs" / "a done one", 40, rows=rows, judged=judged)
    make(tmp_path / "runs" / "deep" / "er" / "stopped", 20, rows=[{"iteration": 25, "loss": 6.0}])
    make(tmp_path / "runs" / "new")
    (tmp_path / "runs" / "no run").mkdir()
    return tmp_path / "runs"


def test_runs_are_listed_with_their_state_and_best_scores(xdino, folder):
    code, out, error = xdino("runs")
    assert (code, error) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    lines = {line.split(" ago ")[1].strip(): line.split() for line in out.splitlines()[1:]}
    assert list(lines) == ["runs/a done one", "runs/deep/er/stopped", "runs/new"]
    assert lines["runs/a done one"][:5] == ["finished", "40/40", "5.500", "61.0", "70.2"]
    assert lines["runs/deep/er/stopped"][:5] == ["stopped", "20/40", "6.000", "-", "-"]
    assert lines["runs/new"][:3] == ["begun", "0", "-"]
    found = json.loads(xdino("runs", "runs/new", "runs/deep", "--json")[1])
    assert [run["state"] for run in found] == ["begun", "stopped"]


def test_a_run_that_somebody_is_at_says_so_and_its_lock_stays(folder):
    assert runs.describe(folder / "new").state == "begun"
    with Lock(folder / "new"):
        before = (folder / "new" / ".lock").read_bytes()
        assert runs.describe(folder / "new").state == "running"
        assert (folder / "new" / ".lock").read_bytes() == before
    lock = folder / "new" / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert runs.describe(folder / "new").state == "running"
    os.utime(lock, (0, 0))  # no sign of life for long
    assert runs.describe(folder / "new").state == "begun"


def test_damaged_files_are_left_out(folder):
    run = folder / "a done one"
    for name in ("metrics.jsonl", "backbone.safetensors", "results.json"):
        (run / name).write_bytes(b"\xff" * 40 + b"\n[1]\n" + b"[" * 9000)
    assert runs.describe(run).state == "begun"
    (run / "config.yaml").write_bytes(b"\xff")
    assert runs.describe(run).loss is None


def test_where_there_is_no_run(xdino, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ((), (tmp_path,), (tmp_path / "x", tmp_path)):
        code, out, error = xdino("runs", *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
    (tmp_path / "loop").symlink_to(tmp_path)  # links are not followed: no run is told twice
    make(tmp_path / "one")
    assert xdino("runs", tmp_path)[1].count("begun") == 1


def test_listing_imports_no_torch(folder):
    code = (
        "import sys\nfrom xdino_launch import runs\nruns.describe(runs.find([runs.Path('.')])[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
