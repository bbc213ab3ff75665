"""Videos in and out, a frame at a time, through PyAV (FFmpeg's libraries).

PyAV is an optional dependency (`pip install 'xdino[video]'`): nothing but videos needs it. What is
written plays in browsers and players: H.264, or VP9 where the libraries lack an H.264 encoder, in
yuv420p, whose halved colour planes want even sides. Telephones and screen recorders make films of no
steady rate: a frame goes out at the time at which it came in.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from PIL import Image

from xdino.data.image_files import DAMAGED
from xdino.errors import RunFailed, UsageError, world
from xdino.runtime.atomic import written_beside

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".ts",
)  # fmt: skip
SIGN = "drawn by xdino"  # the comment in every film from here
SLOWEST, FASTEST, USUAL = Fraction(1, 100), Fraction(1000), Fraction(25)  # frames a second
FINEST = Fraction(1, 90_000)  # seconds; the clock of MPEG streams
ENCODERS = (("libx264", {"crf": "20", "preset": "medium"}), ("libvpx-vp9", {"crf": "30", "b": "0"}))


def is_video(path: Path) -> bool:
    """By its name; a GIF by having more than one frame."""
    if path.suffix.lower() == ".gif":
        with contextlib.suppress(*DAMAGED), Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
        return False
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


@dataclass(frozen=True)
class Frame:
    """uint8 [H, W, C], and when it is shown and for how long: seconds from the first; None where
    nobody says, or as fast as the film plays."""

    pixels: np.ndarray
    time: Fraction | None = None
    duration: Fraction | None = None


class Video:
    """A video file: how fast it plays, and its frames, decoded as they are asked for.

    fps: on average. tick: the unit of its frames' times, in seconds. drawn_here: xdino made it.

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
            rate = Fraction(stream.average_rate or stream.guessed_rate or USUAL)
            self.fps = rate if SLOWEST <= rate <= FASTEST else USUAL
            self.tick = max(Fraction(stream.time_base or FINEST), FINEST)
            self.drawn_here = SIGN in container.metadata.values()

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            try:
                container = self._av.open(stack.enter_context(_spelt(self.path)))
            except (self._av.FFmpegError, OSError, ValueError) as error:
                raise UsageError(
                    f"{self.path} cannot be read as a video: {_words(error)}"
                ) from None
            stack.enter_context(container)
            if not container.streams.video:
                raise UsageError(f"{self.path} holds no video, only {_kinds(container)}")
            yield container

    def frames(self, channels: int = 3) -> Iterator[np.ndarray]:
        """The pixels of `timed`."""
        return (frame.pixels for frame in self.timed(channels))

    def timed(self, channels: int = 3) -> Iterator[Frame]:
        """Frames of uint8 [H, W, channels], upright, in the order in which they are shown.

        Raises:
            UsageError: the file holds no frame.
            RunFailed: it is damaged further on.
        """
        if channels not in (1, 3):
            raise UsageError(f"{self.path} is a video, in which no {channels} bands are")
        count, first = 0, None
        with self._open() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            decoded = container.decode(video=0)
            while True:
                try:
                    frame = next(decoded, None)
                    if frame is None:
                        break
                    pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
                except (self._av.FFmpegError, ValueError, MemoryError) as error:
                    raise RunFailed(
                        f"{self.path} is damaged after frame {count}: {_words(error)}"
                    ) from None
                count += 1
                pixels = pixels.reshape(frame.height, frame.width, channels)
                # A telephone's videos say by how much they are to be turned.
                turns = round(frame.rotation / 90) % 4
                time, unit = None, frame.time_base or stream.time_base
                if frame.pts is not None and unit:
                    first = frame.pts if first is None else first
                    time = (frame.pts - first) * Fraction(unit)
                duration = frame.duration * Fraction(unit) if frame.duration and unit else None
                yield Frame(np.ascontiguousarray(np.rot90(pixels, turns)), time, duration)
        if not count:
            raise UsageError(f"{self.path} holds no frame")


@contextlib.contextmanager
def _spelt(path: Path) -> Iterator[str]:
    """A name for FFmpeg: absolute, or it takes what stands before a colon for a protocol; and text,
    by way of a link where it is in no encoding."""
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="xdino") as folder:
            link = Path(folder) / f"film{path.suffix}"
            link.symlink_to(name)
            yield str(link)
    else:
        yield name


class Writer:
    """A video file that grows by a frame at a time, and appears when it is whole.

        with Writer(path, fps=25) as out:
            out.add(frame)

    The first frame decides the size, made even by repeating the last row or column.

    Args:
        path: ends in .mp4, or in .webm for VP9.
        fps: frames a second; a Fraction is kept exactly. Of frames that say their times (`add`), the
            average.
        tick: the unit of these times, in seconds; None: they are given none.

    Raises:
        RunFailed: the file cannot be written, or there is no encoder.
    """

    def __init__(
        self, path: Path | str, fps: Fraction | float, tick: Fraction | None = None
    ) -> None:
        self.path = Path(path)
        self._av = _av()
        self._tick = tick
        self._rate = Fraction(fps).limit_denominator(100_000)
        if not 0 < self._rate <= FASTEST:
            raise UsageError(f"fps must be above 0 and at most {FASTEST}, got {fps}")
        self._stack = contextlib.ExitStack()
        self._stream: Any = None
        self._count = 0
        self._last = -1

    def __enter__(self) -> "Writer":
        with contextlib.ExitStack() as opening, self._writing():
            beside = opening.enter_context(written_beside(self.path))
            name = opening.enter_context(_spelt(beside))
            kind = "webm" if self.path.suffix.lower() == ".webm" else "mp4"
            self._container = self._av.open(name, "w", format=kind)
            self._container.metadata["comment"] = SIGN
            self._stack = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                with contextlib.suppress(OSError, self._av.FFmpegError):
                    self._container.close()
            else:
                with self._writing():
                    if self._stream is not None:
                        self._container.mux(self._stream.encode())
                    self._container.close()
            if kind is None and self._stream is None:
                raise UsageError(f"{self.path} would hold no frame")
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def add(
        self, picture: np.ndarray, time: Fraction | None = None, duration: Fraction | None = None
    ) -> None:
        """uint8 [H, W, 3], or [H, W] for black and white; of the first one's size.

        Args:
            time, duration: when it is shown and for how long, seconds from the first; None: at the
                film's rate. A time that does not lie behind the one before is moved there.

        Raises:
            UsageError: another size. RunFailed: the disk is full, or the encoder fails.
        """
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
        unit = self._unit
        at = Fraction(self._count) / self._rate if time is None else time
        frame.pts = self._last = max(round(at / unit), self._last + 1)
        if duration is not None:
            frame.duration = max(round(duration / unit), 1)
        frame.time_base = unit
        self._count += 1
        with self._writing():
            self._container.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with world(f"write {self.path}"):
                yield
        except self._av.FFmpegError as error:
            raise RunFailed(f"cannot write {self.path}: {_words(error)}") from None

    @property
    def _unit(self) -> Fraction:
        return 1 / self._rate if self._tick is None else self._tick

    def _begin(self, height: int, width: int) -> None:
        for name, options in ENCODERS:
            if name not in self._av.codecs_available or (
                self.path.suffix.lower() == ".webm" and name == "libx264"
            ):
                continue
            with self._writing():
                stream = self._container.add_stream(name, rate=self._rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = self._unit
            self._stream = stream
            return
        raise RunFailed("this PyAV has neither an H.264 nor a VP9 encoder")


def _kinds(container: Any) -> str:
    return " and ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _words(error: Exception) -> str:
    """What FFmpeg says, without its number and path."""
    return str(getattr(error, "strerror", None) or error).lower()
