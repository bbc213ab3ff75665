"""A folder of everything that goes wrong: an epoch on it, what is named, and what memory it takes."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from xdino.data.decode import UnreadableImage, decode
from xdino.data.loader import BadImage, CropLoader
from xdino.data.sources import open_source
from xdino.errors import RunFailed
from xdino.plan import make_plan
from xdino.pretraining import pretrain

from .listening import Ear


def huge_png(side: int = 20_000) -> bytes:
    """A real black picture of 400 million pixels in 50 kB, one bit a pixel."""
    row = bytes(1 + side // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def jpeg_that_says(width: int, height: int) -> bytes:
    """A JPEG whose header announces another size than it has."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


@pytest.fixture
def zoo(images, tmp_path):
    """20 ordinary images and eleven others; five of these cannot be read."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(0)

    def noise(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    noise(1, 1).save(folder / "one.png")
    noise(20, 1000).save(folder / "wide.jpg")
    noise(1000, 20).save(folder / "tall.png")
    noise(1, 50).save(folder / "line.png")
    noise(30, 40).convert("CMYK").save(folder / "cmyk.jpg")
    noise(30, 40).convert("P").save(folder / "palette.gif")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "huge.jpg").write_bytes(jpeg_that_says(20_000, 20_000))
    (folder / "cut.png").write_bytes((folder / "tall.png").read_bytes()[:3000])
    (folder / "text.jpg").write_text("no image")
    return folder


BAD = {"cut.png", "huge.jpg", "huge.png", "text.jpg", "zero.jpg"}


@pytest.mark.parametrize("workers", [0, 4])
def test_an_epoch_on_all_of_it_names_what_it_skips(tiny, zoo, tmp_path, workers):
    configuration = tiny(
        data__path=str(zoo), data__max_bad_share=0.2, train__batch_size=31, runtime__workers=workers
    )
    ear = Ear()
    pretrain(configuration, tmp_path / "run", listener=ear)
    assert [row["iteration"] for row in ear.rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in ear.rows)
    told = " ".join(n for n in ear.notices if "skipped 5 unreadable images" in n)
    assert "huge.png (400,000,000 pixels are more than the limit of 178,956,970 pixels" in told
    assert "huge.jpg (20000 x 20000 pixels are more" in told
    assert "zero.jpg (the file is empty)" in told
    lines = (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [row["image"].split("/")[-1] for row in listed] == sorted(BAD)
    assert all(row["reason"] and row["iteration"] == 1 for row in listed)


def test_the_limit_is_configurable(tiny, zoo):
    plan = make_plan(tiny(data__path=str(zoo), data__max_pixels=576))  # 24 x 24, not a pixel more
    assert plan.source.max_pixels == 576
    loader = CropLoader(plan.source, plan.crops, 31, 0, workers=2, max_bad_share=0.5)
    next(loader.iterate(0, 1))
    assert {where.split("/")[-1] for where, _ in loader.bad.values()} == BAD | {
        "wide.jpg", "tall.png", "cmyk.jpg", "palette.gif"}  # fmt: skip
    reason = dict(loader.bad.values())[str(zoo / "cmyk.jpg")]
    assert "(data.max_pixels, or --max-pixels of an evaluation)" in reason


def test_huge_images_are_refused_in_little_memory(zoo):
    """In a process that may take 100 MB more: decoded, each would need 400 MB to 1.6 GB."""
    code = """
import resource, sys
from pathlib import Path
from xdino.data.decode import UnreadableImage, decode
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 100 * 2**20,) * 2)
for name in sys.argv[1:]:
    for channels in (1, 3):
        try:
            decode(Path(name).read_bytes(), channels)
        except UnreadableImage as error:
            print(error)
"""
    names = [str(zoo / name) for name in ("huge.png", "huge.jpg")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pixels are more than the limit of 178,956,970 pixels") == 4
    # It is the size that is refused, not the file.
    assert decode(huge_png(1000), 1, max_pixels=10**6).shape == (1000, 1000, 1)


def test_a_higher_limit_lifts_pillows_own(zoo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # of its own; it refuses above 1,000
    # By its full name the module: `xdino.data` calls its function so.
    monkeypatch.setattr(sys.modules["xdino.data.decode.pictures"], "MAX_PIXELS", 1_000)
    data = (zoo / "palette.gif").read_bytes()  # 1,200 pixels
    with pytest.raises(UnreadableImage, match=r"1,200 pixels are more than the limit of 1,000 pix"):
        decode(data, max_pixels=2_000)
    source = open_source(str(zoo), max_pixels=2_000)
    assert source.max_pixels == 2_000
    assert decode(data, max_pixels=2_000).shape == (30, 40, 3)


def test_a_restart_counts_on_and_forgets_what_was_mended(zoo):
    source = open_source(str(zoo))
    plan = {"batch_size": 31, "seed": 0, "workers": 0, "max_bad_share": 0.2}
    from xdino.augment.multi_crop import multi_crop

    crops = multi_crop(16, local_count=0)
    first = CropLoader(source, crops, **plan)
    next(first.iterate(0, 1))
    known = first.take_bad_report()
    assert {image.where.split("/")[-1] for image in known} == BAD
    again = CropLoader(source, crops, **plan, known_bad=known)
    assert again.bad == first.bad
    next(again.iterate(0, 1))
    assert again.take_bad_report() == []
    (zoo / "zero.jpg").write_bytes((zoo / "wide.jpg").read_bytes())
    strangers = [BadImage(0, "another/folder.png", "gone"), BadImage(999, "x", "y")]
    mended = CropLoader(source, crops, **plan, known_bad=[*known, *strangers])
    assert {where.split("/")[-1] for where, _ in mended.bad.values()} == BAD - {"zero.jpg"}
    with pytest.raises(RunFailed, match=r"4 of 31 images .*max_bad_share"):
        CropLoader(source, crops, 31, 0, workers=0, max_bad_share=0.1, known_bad=known)


def test_a_stopped_run_keeps_its_list(tiny, zoo, tmp_path):
    configuration = tiny(
        data__path=str(zoo), data__max_bad_share=0.1, train__batch_size=31, runtime__workers=0
    )
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"4 of 31 images .* cannot be read"):
            pretrain(configuration, tmp_path / "run")
        lines = (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()
        assert len(lines) == 4
    (tmp_path / "run" / "unreadable.jsonl").open("a").write('{"index": 3, "ima')  # cut short
    for name in BAD:
        (zoo / name).write_bytes((zoo / "palette.gif").read_bytes())
    pretrain(configuration, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_that_runs_out_names_the_image_in_hand(zoo, monkeypatch, workers):
    from xdino.augment.multi_crop import multi_crop
    from xdino.data import loader as room

    def out_of_memory(image):
        if image.shape[:2] == (1000, 20):
            raise MemoryError("no room")
        return lambda *rest: None

    monkeypatch.setattr(room, "cutter", out_of_memory)
    loader = CropLoader(
        open_source(str(zoo)), multi_crop(16, local_count=0), 31, 0, workers=workers,
        max_bad_share=0.2,
    )  # fmt: skip
    with pytest.raises(MemoryError) as caught:
        next(loader.iterate(0, 1))
    assert any(f"while cropping {zoo / 'tall.png'}" in note for note in caught.value.__notes__)
