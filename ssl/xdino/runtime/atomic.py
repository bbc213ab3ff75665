"""Files that appear whole or not at all, and folders that one process owns."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xdino.errors import world


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends without an error.

    File and folder are flushed to the disk, so that what was named is still there after a crash.
    The temporary file lies in a hidden folder beside `path`, so that whatever a library puts next to
    it goes with it; its permissions follow the umask, whatever the library thinks of them. Links are
    followed, and a device (/dev/null, /dev/stdout) takes the content without being replaced.

    Raises:
        RunFailed: it cannot be written. What `path` held before is untouched.
    """
    with world(f"write {path}"):
        if path.exists() and not path.is_file() and not path.is_dir():
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / path.name
                with open(Path(folder) / path.name, "rb") as content, open(path, "wb") as device:
                    shutil.copyfileobj(content, device)
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            hidden.mkdir(exist_ok=True)
            beside = hidden / path.name
            beside.touch()
            mode = beside.stat().st_mode
            yield beside
            beside.chmod(mode)
            flush(beside)
            os.replace(beside, path)
            flush(path.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder whose files lie in the folder `path` when the block ends without an error.

    Where there is no `path`, it appears whole; else its files take the place of those of their
    names, each whole, one after the other.

    Raises:
        RunFailed: it cannot be written. What `path` held before is untouched.
    """
    with world(f"write {path}"):
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            hidden.mkdir()
            yield hidden
            if path.is_dir():
                for file in sorted(hidden.iterdir()):
                    os.replace(file, path / file.name)
            else:
                os.replace(hidden, path)
            flush(path)
            flush(path.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """The text becomes the file's content, in UTF-8; a file that holds it already is left alone.

    Raises:
        RunFailed: it cannot be written.
    """
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is what one of these writes, or was killed while it wrote."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def remove_left(folder: Path) -> None:
    """Remove what processes that were killed while writing left below `folder`."""
    for left in [*folder.rglob(".*.tmp"), *folder.rglob(".tmp??????")]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
