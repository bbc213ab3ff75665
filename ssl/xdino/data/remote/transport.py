"""Bytes from HTTP(S) and S3-compatible stores, by fsspec: in pieces, tried again where a network fails.

S3 finds its credentials and its address where all of AWS's tools do (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL, ~/.aws). Nothing is asked of any server unless a person names its address as data.
"""

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from xdino.errors import RunFailed, UsageError, reason

T = TypeVar("T")

_PATIENCE = 60.0  # seconds for which a request is tried again
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries; the last again and again
_ANSWER = 30.0  # seconds that a server may take for the next bytes


class Transport:
    """One store. Its methods may be called from any thread.

    Raises:
        UsageError: the parts that speak its protocol are not installed.
    """

    def __init__(self, address: str) -> None:
        self.protocol = address.partition("://")[0].lower()
        needs = "`pip install 'xdino[remote]'` installs what reads addresses"
        try:
            import fsspec
        except ImportError:
            raise UsageError(f"{address} is an address: {needs}") from None
        try:
            self._store = fsspec.filesystem(self.protocol, **self._options())
        except (ImportError, ValueError) as error:
            raise UsageError(f"{address} cannot be read: {reason(error)}; {needs}") from None

    def _options(self) -> dict[str, Any]:
        if self.protocol in ("http", "https"):
            import aiohttp

            waits = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWER, sock_read=_ANSWER)
            return {"client_kwargs": {"timeout": waits}}
        if self.protocol in ("s3", "s3a"):
            return {"config_kwargs": {"connect_timeout": _ANSWER, "read_timeout": _ANSWER}}
        return {}

    def facts(self, address: str) -> tuple[int, int]:
        """Its size in bytes, and a number that changes with its content.

        Raises:
            UsageError: there is no such file.
            RunFailed: the store does not answer.
        """
        self._store.invalidate_cache()
        told = self._tried(address, lambda: self._store.info(address))
        if not isinstance(told.get("size"), int):
            raise UsageError(f"{address}: its server does not say how large it is")
        names = ("ETag", "etag", "Content-MD5", "LastModified", "Last-Modified", "mtime", "created")
        said = "\0".join(f"{name}={told[name]}" for name in names if told.get(name))
        stamp = hashlib.blake2b(said.encode(), digest_size=8).digest()
        return told["size"], int.from_bytes(stamp, "little") >> 1

    def read(self, address: str, size: int, offset: int) -> bytes:
        """`size` bytes from `offset` on, fewer where it ends before; tried again for a minute.

        Raises:
            UsageError: there is no such file, or its server gives no pieces of it.
            RunFailed: the store does not answer.
        """
        if size <= 0:
            return b""
        end = offset + size
        data = self._tried(address, lambda: self._store.cat_file(address, start=offset, end=end))
        if len(data) > size:
            raise UsageError(
                f"{address}: its server sends all of a file where a piece is asked for, and images "
                "are read piece by piece; one that answers ranges is needed"
            )
        return bytes(data)

    def matching(self, pattern: str) -> list[str]:
        """The addresses that a pattern with * or ? stands for, sorted; of a folder, end it in /*.tar."""
        self._store.invalidate_cache()
        found = self._tried(pattern, lambda: self._store.glob(pattern))
        return sorted(self._store.unstrip_protocol(each) for each in found)

    def _tried(self, address: str, doing: Callable[[], T]) -> T:
        began, count = time.monotonic(), 0
        while True:
            try:
                return doing()
            except PermissionError as error:
                raise UsageError(f"{address} may not be read: {reason(error)}") from None
            except Exception as failed:  # each library over the network has its own kinds
                # fsspec takes a server that does not answer for a file that is not there.
                cause = failed.__cause__ or failed
                if isinstance(failed, FileNotFoundError) and _is_absent(cause):
                    raise UsageError(f"{address} does not exist") from None
                if type(cause).__name__ in ("NoCredentialsError", "InvalidURL"):
                    raise UsageError(f"{address} cannot be read: {reason(cause)}") from None
                wait = _WAITS[min(count, len(_WAITS) - 1)]
                if time.monotonic() - began + wait > patience():
                    raise RunFailed(
                        f"{address} cannot be read ({_why(cause)}), tried {count + 1} times in "
                        f"{time.monotonic() - began:.0f} s"
                    ) from failed
                time.sleep(wait)
                count += 1


def _why(error: BaseException) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", "")
    return f"its server answers {status} {message}".strip() if status else reason(error)


def _is_absent(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)


def patience() -> float:
    """Seconds for which a request is tried again: XDINO_NETWORK_SECONDS, by default 60."""
    text = os.environ.get("XDINO_NETWORK_SECONDS", "")
    try:
        return max(0.0, float(text)) if text else _PATIENCE
    except ValueError:
        raise UsageError(f"XDINO_NETWORK_SECONDS must be a number, got {text}") from None
