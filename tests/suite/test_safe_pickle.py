"""Pickles of plain values come back as they were; anything else is refused and runs nothing."""

import builtins
import collections
import contextlib
import copyreg
import os
import pickle
import re
import struct

import numpy as np
import pytest

from xdino.errors import RunFailed
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
    plain = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in TREE.items()
    }
    assert load(path) == plain


def test_numpy_1_and_python_2(tmp_path):
    """As files of before numpy 2 spell it, and as Python 2 wrote bytes."""
    path = tmp_path / "a.pkl"
    text = pickle.dumps(np.array([3, 1, 2]), 2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in text
    path.write_bytes(text)
    assert load(path) == [3, 1, 2]
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
        Calls(getattr, os.mkdir, "__call__"),
        Calls(builtins.__import__, "antigravity"),
        Calls(copyreg._reconstructor, collections.Counter, object, None),
        Calls(np.save, str(trace), [1]),
        Calls(np.fromfile, str(path)),
        np.array([Calls(os.mkdir, str(trace))], dtype=object),
    ):
        path.write_bytes(pickle.dumps({"imlist": [call]}, protocol))
        with pytest.raises(RunFailed, match="refused, nothing of it ran"):
            load(path)
        assert not trace.exists()
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(trace)), protocol))
    assert trace.exists(), "the ordinary reader does run it"


REBUILD = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "posix.system|os.system"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"cbuiltins\nset.__init__.__globals__\n.", "set.__init__.__globals__"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0bset.__mro__\x93.", "set.__mro__"),
        (b"P7\n.", "an object outside of the file"),
        (b"\x80\x02K\x07Q.", "an object outside of the file"),
        (REBUILD + b"(cos\nsystem\n(I0\ntS'b'\ntR.", "os.system"),
        (REBUILD + b"(cnumpy\nndarray\n(I0\ntS'b'\ntRcos\nsystem\nb.", "os.system"),
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", "a numpy array of O8"),
        (b"cnumpy\ndtype\n(S'i4,(999999999,)O'\nI0\nI1\ntR.", "a numpy array of i4,"),
    ],
)
def test_instructions_written_by_hand(tmp_path, data, told):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(RunFailed, match=f"asks for .*({told}).*: refused, nothing of it ran"):
        load(path)


def test_the_extension_registry_is_no_way_around(tmp_path):
    path, trace = tmp_path / "a.pkl", tmp_path / "trace"
    call = b"(X" + struct.pack("<I", len(str(trace))) + str(trace).encode() + b"tR."
    path.write_bytes(b"\x80\x02\x82\xf0" + call)
    with pytest.raises(RunFailed, match="damaged"):
        load(path)
    copyreg.add_extension("posix", "mkdir", 0xF0)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # another reader has looked it up before
        with pytest.raises(RunFailed, match=r"posix\.mkdir, .* nothing of it ran"):
            load(path)
    finally:
        copyreg.remove_extension("posix", "mkdir", 0xF0)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    ["_codecs\nencode", "numpy\ndtype", "numpy\nndarray", "numpy.core.numeric\n_frombuffer",
     "numpy.core.multiarray\n_reconstruct", "builtins\nset"],
)  # fmt: skip
def test_what_is_allowed_cannot_be_changed_by_a_pickle(tmp_path, name):
    """The state of a function would be its attributes."""
    path = tmp_path / "a.pkl"
    for state in (
        {"__setstate__": set, "__code__": 1, "__globals__": {}},
        (None, {"__setstate__": set}),
        (None, {"__code__": 1}),
    ):
        body = pickle.dumps(state, 0)[:-1]
        path.write_bytes(b"c" + name.encode() + b"\n" + body + b"b.")
        with contextlib.suppress(RunFailed):  # some are only damaged
            load(path)
    path.write_bytes(pickle.dumps(TREE, 2))
    assert load(path)["columns"] == TREE["columns"].tolist()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.array([{}], dtype=object), "a numpy array of O8"),
        (np.zeros(2, dtype=[("a", "i4")]), "a numpy array of V4"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
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


def test_what_cannot_be_read(tmp_path):
    for path, told in ((tmp_path, "Is a directory"), (tmp_path / "b.pkl", "No such file")):
        with pytest.raises(RunFailed, match=f"cannot read .*: {told}"):
            load(path)


def test_a_list_that_holds_itself_and_lists_without_end(tmp_path):
    path, loop = tmp_path / "a.pkl", []
    loop.append(loop)
    path.write_bytes(pickle.dumps(loop))
    found = load(path)
    assert found[0] is found
    path.write_bytes(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert len(load(path)) == 1


def test_sizes_that_do_not_fit_their_bytes(tmp_path):
    path = tmp_path / "a.pkl"
    whole = pickle.dumps(np.arange(3, dtype=np.int64), 2)
    for data in (
        whole.replace(b"K\x03\x85", b"K\x7f\x85"),
        whole.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"few bytes.",  # a text of 2^63 bytes
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2^31 bytes
    ):
        path.write_bytes(data)
        with pytest.raises(RunFailed, match="damaged"):
            load(path)
    empty = np.empty((2**40, 0), np.int64)
    path.write_bytes(pickle.dumps(empty))
    assert load(path) == []
