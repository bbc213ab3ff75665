"""The last resort of the command line: a sentence, and the traceback in a file."""

import tempfile
from pathlib import Path

import pytest

from xdino_launch import local
from xdino_launch.commands import options


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("nobody expects this"), "an error that xdino does not know: KeyError"),
        (PermissionError(13, "Permission denied", "/some/[/]file"), "denied (/some/[/]file)"),
        (MemoryError(), "the memory does not suffice"),
    ],
)
def test_what_nobody_foresaw_is_kept_in_the_run(xdino, tmp_path, monkeypatch, error, sentence):
    def fails(*arguments, **named):
        raise error

    monkeypatch.setattr(local, "run_pretraining", fails)
    (tmp_path / "config.yaml").write_text("")
    code, _, told = xdino("pretrain", "debug", "--run", tmp_path)
    assert code == 1
    assert told.count("\n") == 1, "one sentence"
    assert sentence in told
    assert f"The traceback is in {tmp_path / 'error.log'}" in told
    kept = (tmp_path / "error.log").read_text()
    assert "Traceback" in kept
    assert f"xdino pretrain debug --run {tmp_path}" in kept


def test_without_a_run_it_goes_to_a_temporary_folder(xdino, tmp_path, monkeypatch):
    def fails(*arguments, **named):
        raise IndexError("nobody expects this")

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(options.SubjectOptions, "there", fails)
    code, _, told = xdino("knn", "nothing", "--data", "nothing")
    assert code == 1
    assert "IndexError" in Path(told.rpartition("in ")[2].strip()).read_text()
