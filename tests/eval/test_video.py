"""Videos in and out: decoded again, counted, and as fast as before."""

import contextlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino.errors import RunFailed, UsageError
from xdino_eval.attention import video

av = pytest.importorskip("av")


def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """A bright square that moves to the right."""
    made = []
    for i in range(count):
        frame = np.full((height, width, 3), 40, np.uint8)
        frame[8:24, 4 * i : 4 * i + 16] = (230, 60, 30)
        made.append(frame)
    return made


def write(path, made, fps=Fraction(30000, 1001)):
    with video.Writer(path, fps) as out:
        for frame in made:
            out.add(frame)
    return path


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_what_is_written_plays(tmp_path, suffix, codec):
    made = frames(10, 47, 75)  # odd sides
    path = write(tmp_path / f"a.{suffix}", made)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in (codec, "libvpx-vp9")
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (76, 48)
        assert stream.average_rate == pytest.approx(30000 / 1001, rel=2e-3)
        assert sum(1 for _ in container.decode(video=0)) == 10
    again = video.Video(path)
    back = list(again.frames())
    assert len(back) == 10
    for one, two in zip(made, back, strict=True):
        error = np.abs(one.astype(int) - two[:47, :75].astype(int))
        assert error.mean() < 6, "the same frames in the same order"
    assert next(again.frames(channels=1)).shape == (48, 76, 1)
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_a_film_that_is_closed_early_does_not_hang(tmp_path):
    noise = np.random.default_rng(0)  # takes its decoder long enough
    shots = [noise.integers(0, 256, (48, 76, 3), dtype=np.uint8) for _ in range(10)]
    path = write(tmp_path / "a.webm", shots)
    code = (
        "import sys; from xdino_eval.attention import video; film = video.Video(sys.argv[1])\n"
        "for _ in range(400): assert next(film.frames()).shape == (48, 76, 3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=300)  # takes seconds
    assert done.returncode == 0


def test_a_gif_of_several_frames_is_a_video(tmp_path):
    pages = [Image.fromarray(frame) for frame in frames(4, 40, 60)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=100)
    pages[0].save(tmp_path / "still.gif")
    assert video.is_video(tmp_path / "a.gif")
    assert not video.is_video(tmp_path / "still.gif")
    assert video.Video(tmp_path / "a.gif").fps == 10
    assert len(list(video.Video(tmp_path / "a.gif").frames())) == 4


def test_what_is_no_video_is_said(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(UsageError, match=r"text\.mp4 cannot be read as a video: invalid data"):
        video.Video(tmp_path / "text.mp4")
    with pytest.raises(UsageError, match="there is no video file"):
        video.Video(tmp_path / "none.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UsageError, match="holds no video, only audio"):
        video.Video(tmp_path / "sound.mp4")


def test_a_damaged_video_ends_in_a_sentence_or_early(tmp_path):
    whole = write(tmp_path / "a.webm", frames(30, 64, 200))
    data = whole.read_bytes()
    cut = tmp_path / "cut.webm"
    cut.write_bytes(data[: len(data) // 2])
    try:
        count = len(list(video.Video(cut).frames()))
    except (RunFailed, UsageError) as error:
        assert "cut.webm" in str(error)  # noqa: PT017
    else:
        assert 0 < count < 30


def test_a_failed_video_leaves_no_file(tmp_path):
    made = frames(3, 32, 64)
    with pytest.raises(UsageError, match=r"frame 2 has 32 x 32 pixels"):
        write(tmp_path / "a.mp4", [made[0], made[1][:, :32]])
    with pytest.raises(KeyError), video.Writer(tmp_path / "b.mp4", 5) as out:  # noqa: PT012
        out.add(made[0])
        raise KeyError
    with pytest.raises(UsageError, match="would hold no frame"):
        write(tmp_path / "c.mp4", [])
    with pytest.raises(UsageError, match="fps must be above 0"):
        video.Writer(tmp_path / "d.mp4", 0)
    assert list(tmp_path.iterdir()) == []


def test_without_pyav_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"videos need PyAV: pip install 'xdino\[video\]'"):
        video.Video(tmp_path / "a.mp4")


TIMES = (Fraction(0), Fraction(1, 25), Fraction(1, 2), Fraction(2), Fraction(21, 10), Fraction(5))


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_frames_of_no_steady_rate_keep_their_times(tmp_path, suffix):
    with video.Writer(tmp_path / f"a.{suffix}", 25, Fraction(1, 1000)) as out:
        for time, pixels in zip(TIMES, frames(6, 32, 48), strict=True):
            out.add(pixels, time)
    first = video.Video(tmp_path / f"a.{suffix}")
    assert first.drawn_here
    with video.Writer(tmp_path / "b.mp4", first.fps, first.tick) as out:
        for frame in first.timed():
            out.add(frame.pixels, frame.time, frame.duration)
    again = [frame.time for frame in video.Video(tmp_path / "b.mp4").timed()]
    assert again == list(TIMES)


def test_times_that_do_not_rise_are_moved(tmp_path):
    with video.Writer(tmp_path / "a.mp4", 10, Fraction(1, 1000)) as out:
        for time in (0, 1, 1, Fraction(1, 2), None):
            out.add(np.zeros((32, 32, 3), np.uint8), None if time is None else Fraction(time))
    found = [frame.time for frame in video.Video(tmp_path / "a.mp4").timed()]
    assert found == [0, 1, Fraction(1001, 1000), Fraction(1002, 1000), Fraction(1003, 1000)]


@pytest.mark.parametrize("name", [b"12:30.mp4", b"[/b] \xe9.mp4".replace(b"/", b"-"), b"a b.mp4"])
def test_names_that_ffmpeg_would_take_for_something_else(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    write(path, frames(3, 32, 32))
    assert len(list(video.Video(path).frames())) == 3
    assert os.listdir(os.fsencode(tmp_path)) == [name], "nothing else is left"


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match="cannot write"):
        video.Writer(tmp_path / "file" / "b.mp4", 5).__enter__()

    @contextlib.contextmanager
    def full(_):
        yield Path("/dev/full")

    monkeypatch.setattr(video, "written_beside", full)
    with pytest.raises(RunFailed, match=r"cannot write .*a\.mp4: No space left"):
        write(tmp_path / "a.mp4", frames(3, 32, 32))
