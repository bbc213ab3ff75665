"""Pickles of plain values come back as they were; anything else is refused and runs nothing."""

import collections
import os
import pickle
import re

import numpy as np
import pytest

from xdino.errors import RunFailed, UsageError
from xdino_eval.suite.safe_pickle import load

TREE = {
    "names": ["a", "bé"],
    "nested": [{"bbx": (1.5, 2, None, True), "set": {1, 2}, "bytes": b"\x00\xff", "none": b""}],
    "numbers": np.array([3, 1, 2]),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "text": np.array(["ab", "c"]),
    "empty": np.array([], dtype=np.int64),
    "scalar": np.float32(0.5),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(TREE, protocol))
    found = load(path)
    assert found.keys() == TREE.keys()
    for name, value in TREE.items():
        if isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].tolist()) == (value.dtype, value.tolist())
        else:
            assert found[name] == value


def test_numpy_1_and_python_2(tmp_path):
    """As files of before numpy 2 spell it, and as Python 2 wrote bytes."""
    path = tmp_path / "a.pkl"
    text = pickle.dumps(np.array([3, 1, 2]), 2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in text
    path.write_bytes(text)
    assert load(path).tolist() == [3, 1, 2]
    path.write_bytes(b"(dp0\nS'imlist'\np1\n(lp2\nS'all_souls_000013'\np3\nas.")
    assert load(path) == {"imlist": ["all_souls_000013"]}


class Calls:
    """Asks the reader to call a function."""

    def __init__(self, function, *arguments):
        self.told = function, arguments

    def __reduce__(self):
        return self.told


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_nothing_runs(tmp_path, protocol):
    path, trace = tmp_path / "a.pkl", tmp_path / "trace"
    for call in (
        Calls(os.system, f"touch {trace}"),
        Calls(os.mkdir, str(trace)),
        Calls(eval, f"open({str(trace)!r}, 'w')"),
        Calls(np.save, str(trace), [1]),
        Calls(np.fromfile, str(path)),
    ):
        path.write_bytes(pickle.dumps({"imlist": [call]}, protocol))
        with pytest.raises(RunFailed, match="refused, nothing of it ran"):
            load(path)
        assert not trace.exists()
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(trace)), protocol))
    assert trace.exists(), "the ordinary reader does run it"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.array([{}], dtype=object), "a numpy array of O8"),
        (np.zeros(2, dtype=[("a", "i4")]), "a numpy array of V4"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (np.dtype("f4"), "a dtype without an array"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, value, named):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(RunFailed, match=f"a.pkl asks for {re.escape(named)}"):
        load(path)


@pytest.mark.parametrize(
    "data", [b"", b"no pickle", pickle.dumps(TREE)[:-30], b"\x80\x04]q\x00h\x09."]
)
def test_damage(tmp_path, data):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(RunFailed, match="is damaged or no pickle"):
        load(path)


def test_a_list_that_holds_itself(tmp_path):
    path, loop = tmp_path / "a.pkl", []
    loop.append(loop)
    path.write_bytes(pickle.dumps(loop))
    with pytest.raises(RunFailed, match="damaged"):
        load(path)
    with pytest.raises(UsageError, match="there is no file"):
        load(tmp_path / "b.pkl")


def test_sizes_that_do_not_fit_their_bytes(tmp_path):
    path = tmp_path / "a.pkl"
    whole = pickle.dumps(np.arange(3, dtype=np.int64), 2)
    path.write_bytes(whole.replace(b"K\x03\x85", b"K\x7f\x85"))
    with pytest.raises(RunFailed, match="damaged"):
        load(path)
