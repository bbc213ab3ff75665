"""Evaluators on all processes give what one gives, and leave together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xdino.runtime import turns

WORKER = Path(__file__).with_name("turns_worker.py")


def test_two_processes_find_what_one_does(tmp_path):
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two, other = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    protocols = [row["protocol"] for row in one["rows"]]
    assert len(protocols) == 9, protocols
    for whole, shared in zip(one["rows"], two["rows"], strict=True):
        assert shared == whole, whole["protocol"]
    assert other["rows"] == two["rows"]
    assert two["numbers"] == other["numbers"] == one["numbers"]
    heads = [(tmp_path / f"head-{n}").read_bytes() for n in (1, 2)]
    assert heads[0] == heads[1], "the probe, to the bit"
    assert list(tmp_path.glob("*.unfinished")) == []
    for told in (two, other):
        disk, again, stopped, counts, ranks = told["failures"]
        assert (disk, again) == ("a disk", "a disk")
        assert stopped == "stopped by SIGTERM"
        assert counts.startswith("the processes do not agree on the number of batches")
        assert ranks == [0, 1]


def test_alone_all_turns_are_its_own():
    order = np.arange(20)
    assert turns.mine(order, 8).tolist() == order.tolist()
    assert [*turns.of_all(iter("abc"), 3)] == ["a", "b", "c"]
    with pytest.raises(MemoryError):
        turns.all_hear(lambda: (_ for _ in ()).throw(MemoryError), shared=False)
