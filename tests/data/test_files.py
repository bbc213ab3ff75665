"""Files that appear whole: what they leave alone, and what a failure leaves behind."""

import os
import stat

import pytest

from xdino.errors import RunFailed
from xdino.runtime.atomic import write_text, written_beside


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")

    def fill() -> None:
        with written_beside(path) as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunFailed, match=r"cannot write .*results.json: No space left on device"):
        fill()
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_device_stays_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "folder" / "real.json")
    write_text(link, "content")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "real.json").read_text() == "content"


def test_equal_content_is_not_written_again(tmp_path):
    write_text(tmp_path / "a", "same")
    before = (tmp_path / "a").stat().st_mtime_ns, (tmp_path / "a").stat().st_ino
    write_text(tmp_path / "a", "same")
    assert before == ((tmp_path / "a").stat().st_mtime_ns, (tmp_path / "a").stat().st_ino)
