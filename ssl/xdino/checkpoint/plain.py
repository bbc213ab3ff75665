"""What `torch.save` wrote, read so that no code from a file ever runs, and one sentence per damage."""

import argparse
import contextlib
import errno
import mmap
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from xdino.errors import RunFailed, UsageError, reason

# What decoders raise over bytes that are no checkpoint, or only the first half of one.
_NO_CHECKPOINT = (
    pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, AttributeError,
    TypeError, AssertionError, OverflowError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """One sentence, with the file's name in it, for each thing that can be wrong with weights.

    What a library raises over the bytes is damage; what the disk or the machine does is called so.
    """
    try:
        yield
    except (UsageError, RunFailed) as error:
        told = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise type(error)(told) from None
    except MemoryError:
        raise RunFailed(f"{path} needs more memory than there is, or is damaged") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a decoder's, who seeks by numbers of the file
            raise RunFailed(f"{path} is damaged or not a checkpoint ({error})") from None
        raise RunFailed(f"cannot read {path}: {reason(error)}") from None
    except safetensors.SafetensorError as error:
        raise RunFailed(f"{path} is damaged or not a safetensors file ({error})") from None
    except _NO_CHECKPOINT as error:
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise RunFailed(
                f"{path} asks for {unsafe[1]}, which weights have no need of: refused, nothing of it "
                "ran"
            ) from None
        if "allocate memory" in str(error):
            raise RunFailed(f"{path} needs more memory than there is, or is damaged") from None
        kind = type(error).__name__
        raise RunFailed(f"{path} is damaged or not a checkpoint ({kind})") from None


def load_plain(path: Path, mapped: bool = False) -> Any:
    """What torch.save wrote of tensors and plain types; to be called inside `reading`.

    `mapped`: tensors stay on the disk until somebody looks at them.

    Refuses what would take more memory than the file has bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                if sum(info.file_size for info in archive.infolist()) > size:
                    raise RunFailed(
                        f"{path} is a compressed archive, which torch.save never writes"
                    )
        if size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(b"bytearray") >= 0:  # torch lets it through, of any size
                    raise RunFailed(
                        f"{path} asks for bytearray, which weights have no need of: refused, nothing "
                        "of it ran"
                    )
    with warnings.catch_warnings(), torch.serialization.safe_globals(plain_types()):
        warnings.simplefilter("ignore")
        with contextlib.ExitStack() as stack:
            # By its name torch would take a file for safetensors; other names it opens faster itself.
            misnamed = path.suffix == ".safetensors"
            source = stack.enter_context(open(path, "rb")) if misnamed else path
            return torch.load(
                source, map_location="cpu", weights_only=True, mmap=mapped and not misnamed
            )


def plain_types() -> list[Any]:
    """What published files hold besides tensors and Python's own types; nothing else is let through.

    An argparse.Namespace of the trainer's arguments, numpy scalars in it and among the epochs, and
    the output folder, a path where the run was submitted by submitit. Such a path is read as a pure
    one, which cannot touch a file.
    """
    dtypes = [type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")]
    pure = pathlib.PurePosixPath
    return [
        argparse.Namespace,
        np.dtype,
        *dtypes,
        (_scalar, "numpy._core.multiarray.scalar"),
        (_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 calls the module
        (pure, "pathlib.PosixPath"),
        (pure, "pathlib._local.PosixPath"),  # as Python 3.13 does
    ]


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    """numpy's own `scalar`, but for numbers only: of other types it makes any size that is asked."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "fiub" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is no number")
    return np.frombuffer(data, dtype, 1)[0]
