"""Videos in and out, a frame at a time, through PyAV (FFmpeg's libraries).

PyAV is an optional dependency (`pip install 'xdino[video]'`): nothing but videos needs it. What is
written plays in browsers and players: H.264, or VP9 where the libraries lack an H.264 encoder, in
yuv420p, whose halved colour planes want even sides.
"""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from PIL import Image

from xdino.errors import RunFailed, UsageError
from xdino.files import written_beside

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".ts",
)  # fmt: skip
ENCODERS = (("libx264", {"crf": "20", "preset": "medium"}), ("libvpx-vp9", {"crf": "30", "b": "0"}))


def is_video(path: Path) -> bool:
    """By its name; a GIF by having more than one frame."""
    if path.suffix.lower() == ".gif":
        with contextlib.suppress(OSError, ValueError), Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    return path.suffix.lower() in SUFFIXES


def _av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise UsageError("videos need PyAV: pip install 'xdino[video]'") from None
    # What goes wrong is raised, and said in one sentence. Any level but None brings messages to
    # Python: a decoder's thread then waits for the interpreter, which waits for that thread where
    # a file is closed before its end.
    av.logging.set_level(None)
    return av


class Video:
    """A video file: how fast it plays, and its frames, decoded as they are asked for.

    Raises:
        UsageError: no such file, no video in it, or PyAV is absent.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._av = _av()
        if not self.path.is_file():
            raise UsageError(f"there is no video file {self.path}")
        with self._open() as container:
            stream = container.streams.video[0]
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            container = self._av.open(str(self.path))
        except (self._av.FFmpegError, OSError) as error:
            raise UsageError(f"{self.path} cannot be read as a video: {_words(error)}") from None
        with container:
            if not container.streams.video:
                raise UsageError(f"{self.path} holds no video, only {_kinds(container)}")
            yield container

    def frames(self, channels: int = 3) -> Iterator[np.ndarray]:
        """uint8 [H, W, channels], upright, in the order in which they are shown.

        Raises:
            UsageError: the file holds no frame.
            RunFailed: it is damaged further on.
        """
        count = 0
        with self._open() as container:
            container.streams.video[0].thread_type = "AUTO"
            try:
                for frame in container.decode(video=0):
                    count += 1
                    pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
                    pixels = pixels.reshape(frame.height, frame.width, channels)
                    # A telephone's videos say by how much they are to be turned.
                    turns = round(frame.rotation / 90) % 4
                    yield np.ascontiguousarray(np.rot90(pixels, turns))
            except self._av.FFmpegError as error:
                raise RunFailed(
                    f"{self.path} is damaged after frame {count}: {_words(error)}"
                ) from None
        if not count:
            raise UsageError(f"{self.path} holds no frame")


class Writer:
    """A video file that grows by a frame at a time, and appears when it is whole.

        with Writer(path, fps=25) as out:
            out.add(frame)

    The first frame decides the size, made even by repeating the last row or column.

    Args:
        path: ends in .mp4, or in .webm for VP9.
        fps: frames a second; a Fraction is kept exactly.

    Raises:
        RunFailed: the file cannot be written, or there is no encoder.
    """

    def __init__(self, path: Path | str, fps: Fraction | float) -> None:
        self.path = Path(path)
        self._av = _av()
        self._rate = Fraction(fps).limit_denominator(100_000)
        if self._rate <= 0:
            raise UsageError(f"fps must be above 0, got {fps}")
        self._stack = contextlib.ExitStack()
        self._stream: Any = None
        self._count = 0

    def __enter__(self) -> "Writer":
        try:
            beside = self._stack.enter_context(written_beside(self.path))
            kind = "webm" if self.path.suffix.lower() == ".webm" else "mp4"
            self._container = self._av.open(str(beside), "w", format=kind)
        except (OSError, self._av.FFmpegError) as error:
            self._stack.close()
            raise RunFailed(f"cannot write {self.path}: {_words(error)}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None and self._stream is None:
                raise UsageError(f"{self.path} would hold no frame")
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def add(self, picture: np.ndarray) -> None:
        """uint8 [H, W, 3], or [H, W] for black and white; of the first one's size."""
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        height, width = picture.shape[:2]
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._begin(*picture.shape[:2])
        if picture.shape[:2] != (self._stream.height, self._stream.width):
            raise UsageError(
                f"frame {self._count + 1} has {width} x {height} pixels, and the first made a "
                f"video of {self._stream.width} x {self._stream.height}"
            )
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = self._count
        frame.time_base = 1 / self._rate
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def _begin(self, height: int, width: int) -> None:
        for name, options in ENCODERS:
            if name not in self._av.codecs_available or (
                self.path.suffix.lower() == ".webm" and name == "libx264"
            ):
                continue
            stream = self._container.add_stream(name, rate=self._rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = 1 / self._rate
            self._stream = stream
            return
        raise RunFailed("this PyAV has neither an H.264 nor a VP9 encoder")


def _kinds(container: Any) -> str:
    return " and ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _words(error: Exception) -> str:
    """What FFmpeg says, without its number and path."""
    return str(getattr(error, "strerror", None) or error).lower()
