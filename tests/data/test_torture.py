"""A few of the mutated files of tests/torture: whatever lies in a folder, no traceback."""

from importlib import import_module
from pathlib import Path

import archives
import images
import pytest


@pytest.mark.parametrize(("name", "count"), [("images", 200), ("archives", 60)])
def test_no_mutated_file_ends_in_a_traceback(name, count):
    counts = import_module(name).run(0, count)
    assert counts["tracebacks"] == counts["slow"] == counts["memory"] == 0
    assert sum(counts.values()) == count
    assert counts["decoded" if name == "images" else "opened"] > count / 20


def test_an_offender_can_be_made_again(tmp_path):
    assert images.made(0, 7) == images.made(0, 7) != images.made(1, 7)
    data = [archives.make(3, 5, folder) for folder in (tmp_path / "a", tmp_path / "b")
            if not folder.mkdir()]  # fmt: skip
    assert [Path(d.partition(":")[2] or d).name for d in data] != []
    files = [sorted((p.name, p.read_bytes()) for p in (tmp_path / x).glob("*.tar")) for x in "ab"]
    assert files[0] == files[1]
