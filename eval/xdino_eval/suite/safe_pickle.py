"""Pickles of plain values, read so that nothing in them can run.

A pickle names the functions that rebuild its objects, and Python's own reader calls whatever is
named. Ground truth that is published as a pickle (revisited Oxford and Paris) needs lists, dicts,
sets, numbers, text, and numpy's arrays and numbers, which come back as lists and as Python's own.
The few functions here stand in for numpy's, which trust what they are told of memory; any other name
ends the reading before anything of it was called.
"""

import copyreg
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from xdino.errors import RunFailed, world


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that plain values have no need of."""


class Dtype:
    """Stands in for `numpy.dtype`: its description, and the byte order that follows as its state."""

    def __init__(self, description: str, *_: Any) -> None:
        if description[0] not in "biufSU" or not description[1:].isdecimal():
            raise Refused(f"a numpy array of {description}")  # of objects, of several fields
        self.dtype = np.dtype(description)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(list[Any]):
    """Stands in for `numpy.ndarray`: its values, once its state has come."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self[:] = _values(raw, dtype, shape, "F" if fortran else "C")


def _values(raw: Any, dtype: Dtype, shape: Any, order: Any) -> Any:
    """The numbers or texts in `raw`, nested as `shape` has it; for the shape () the value alone."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    values = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
    return values.tolist() if values.size else []  # (10**9, 0) would be as many empty lists


ALLOWED: dict[str, Any] = {
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: Array(),
    "numpy.core.multiarray.scalar": lambda dtype, raw: _values(raw, dtype, (), "C"),
    "numpy.core.numeric._frombuffer": _values,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    # How protocols 0 to 2 write bytes, and none.
    "_codecs.encode": lambda text, _: str.encode(text, "latin1"),
    "builtins.bytes": lambda: b"",
}


class PlainUnpickler(pickle.Unpickler):
    """Knows `ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # As Python 2, numpy 1 and numpy 2 spell them.
        known = module.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if f"{known}.{name}" not in ALLOWED:
            raise Refused(f"{module}.{name}")
        return ALLOWED[f"{known}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("an object outside of the file")


def load(path: Path) -> Any:
    """The plain value in the pickle at `path`. Text of Python 2 is read as latin1.

    Raises:
        RunFailed: it cannot be read, is damaged, or asks for more than plain values need; nothing of
            it ran.
    """
    with world(f"read {path}"):
        data = path.read_bytes()
    copyreg.clear_extension_cache()  # of what lies there `find_class` would not be asked
    try:
        return PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Refused as error:
        raise RunFailed(
            f"{path} asks for {error}, which plain values have no need of: refused, nothing of it ran"
        ) from None
    # What a damaged pickle raises is whatever its broken instructions come to.
    except (
        pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError,
        MemoryError, OverflowError, RuntimeError,
    ) as error:  # fmt: skip
        raise RunFailed(f"{path} is damaged or no pickle ({type(error).__name__})") from None
