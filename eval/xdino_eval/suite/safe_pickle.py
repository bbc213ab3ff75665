"""Pickles of plain values, read so that nothing in them can run.

A pickle names the functions that rebuild its objects, and Python's own reader calls whatever is
named. Ground truth that is published as a pickle (revisited Oxford and Paris) needs lists, dicts,
numbers, text and numpy arrays of numbers; the few functions that numpy needs for those are replaced
by narrow ones here, and any other name ends the reading before anything of it was called.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from xdino.errors import RunFailed, UsageError, reason

KINDS = "biufSU"  # of dtypes that hold no objects and no fields


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that plain values have no need of."""


class _Dtype:
    """Stands in for `numpy.dtype`: its description, and the byte order that follows as its state."""

    def __init__(self, description: Any, *_: Any) -> None:
        self.dtype = np.dtype(description) if isinstance(description, str) else np.dtype(object)
        if self.dtype.kind not in KINDS:
            raise Refused(f"a numpy array of {description}")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(state[2:5]):  # a subarray, names, fields
            raise Refused("a numpy array with fields")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for an array until its state comes; numpy's own reader of states is not needed."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(_bytes(raw), dtype, shape, "F" if fortran else "C")


_ARRAY_TYPE = object()  # what the name numpy.ndarray gives: it can only be handed to _reconstruct


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _ARRAY_TYPE:
        raise Refused("an array of an unknown kind")
    return _Array()


def _bytes(raw: Any) -> bytes:
    return raw.encode("latin1") if isinstance(raw, str) else bytes(memoryview(raw))


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise Refused("an array without a dtype")
    return np.frombuffer(_bytes(raw), dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: Any, raw: Any) -> Any:
    return _from_buffer(raw, dtype, (), "C").item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"text in the encoding {encoding}")
    return text.encode("latin1")


def _no_bytes(*given: Any) -> bytes:
    """How protocol 2 writes bytes that are empty."""
    if given:
        raise Refused("bytes made of something")
    return b""


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{
        (builtins, name): kind
        for builtins in ("builtins", "__builtin__")
        for name, kind in (("bytes", _no_bytes), ("set", set), ("frozenset", frozenset))
    },
    **{
        (f"numpy.{core}.multiarray", name): function  # numpy 1 and numpy 2
        for core in ("core", "_core")
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class PlainUnpickler(pickle.Unpickler):
    """Knows `ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("an object outside of the file")


def _finished(value: Any) -> Any:
    """The value with the arrays themselves in the places of their stand-ins."""
    if isinstance(value, dict):
        return {_finished(key): _finished(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finished(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_finished(item) for item in value)
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Dtype):
        raise Refused("a dtype without an array")
    return value


def load(path: Path) -> Any:
    """The plain value in the pickle at `path`. Text of Python 2 is read as latin1.

    Raises:
        UsageError: there is no such file.
        RunFailed: it is damaged, or asks for more than plain values need; nothing of it ran.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise RunFailed(f"{path} cannot be read: {reason(error)}") from None
    try:
        return _finished(PlainUnpickler(io.BytesIO(data), encoding="latin1").load())
    except Refused as error:
        raise RunFailed(
            f"{path} asks for {error}, which plain values have no need of: refused, nothing of it ran"
        ) from None
    # What a damaged pickle raises is whatever its broken instructions come to.
    except (
        pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError,
        AttributeError, ImportError, MemoryError, OverflowError, RuntimeError,
    ) as error:  # fmt: skip
        raise RunFailed(f"{path} is damaged or no pickle ({type(error).__name__})") from None
