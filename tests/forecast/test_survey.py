"""What a look at a data set finds: counts, sizes, what is left out, damage, duplicates."""

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from xdino.errors import UsageError
from xdino.forecast import survey as room
from xdino.forecast.survey import survey


def write(path, size=(40, 30), grey=False, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two folders, three formats, a copy, a damaged file, and what is no image."""
    root = tmp_path / "my photos #1"
    for i in range(6):
        write(root / "a" / f"{i}.jpg", seed=i)
    write(root / "b" / "grey.png", (64, 64), grey=True)
    write(root / "b" / "strip.png", (300, 20))
    shutil.copy(root / "a" / "0.jpg", root / "b" / "copy of 0.jpg")
    (root / "b" / "half.jpg").write_bytes((root / "a" / "1.jpg").read_bytes()[:400])
    (root / "b" / "empty.png").write_bytes(b"")
    for name in ("x.heic", "y.HEIC", "z.cr2", "notes.txt"):
        (root / name).write_bytes(b"?")
    return root


def test_a_folder(folder):
    found = survey(str(folder))
    assert found.images == 11
    assert found.splits == {"train": 11}
    assert found.formats == {".jpg": 8, ".png": 3}
    assert found.left_out == {".heic": 2, ".cr2": 1, ".txt": 1}
    assert "pillow-heif" in found.hints[".heic"]
    assert "rawpy" in found.hints[".cr2"]
    assert ".txt" not in found.hints, "nobody takes it for an image"
    assert found.classes == {"a": 6, "b": 5}
    assert (found.shorter.least, found.longer.most) == (20, 300)
    assert (found.stretched, found.tiny) == (1, 8)  # 20 pixels; the seven and one of 30
    assert found.colours == {"colour": 8, "grey": 1}, "of what has a whole header"
    assert (found.grey, found.channels) == (False, 3)
    assert found.bytes == sum(f.stat().st_size for f in folder.rglob("*.??g"))


def test_what_cannot_be_read_is_named(folder):
    found = survey(str(folder))
    named = {where.rpartition("/")[2]: why for where, why in found.unreadable}
    assert set(named) == {"half.jpg", "empty.png"}
    assert named["empty.png"] == "the file is empty"
    assert found.unreadable_count == 2


def test_equal_files_are_found_by_content_and_not_by_size(tmp_path):
    for i in range(4):  # bitmaps: all of one size
        write(tmp_path / f"{i}.bmp", seed=i)
    assert survey(str(tmp_path)).copies == 0
    (tmp_path / "9.bmp").write_bytes((tmp_path / "2.bmp").read_bytes())
    (tmp_path / "8.bmp").write_bytes((tmp_path / "2.bmp").read_bytes())
    found = survey(str(tmp_path))
    assert found.copies == 2
    assert [[name.rpartition("/")[2] for name in group] for group in found.equal] == [
        ["2.bmp", "8.bmp", "9.bmp"]
    ]


def test_files_that_begin_and_end_alike_are_compared_whole(tmp_path):
    content = bytearray((write(tmp_path / "0.bmp", (80, 80))).read_bytes())
    assert len(content) > 3 * room.ENDS
    content[len(content) // 2] ^= 1
    (tmp_path / "1.bmp").write_bytes(content)
    assert survey(str(tmp_path)).copies == 0


def test_a_sample_is_bounded_and_the_same_every_time(tmp_path, monkeypatch):
    for i in range(30):
        write(tmp_path / f"{i:02}.png", (10 + i, 10), seed=i)
    monkeypatch.setattr(room, "HEADERS", 8)
    monkeypatch.setattr(room, "DECODED", 4)
    monkeypatch.setattr(room, "ALL_COMPARED", 5)
    first, again = survey(str(tmp_path)), survey(str(tmp_path))
    assert first.images == 30
    assert 1 <= first.decoded <= 4
    assert 1 <= first.sampled <= 8
    assert 1 <= first.compared <= 5
    assert (first.shorter, first.longer) == (again.shorter, again.longer)
    whole = survey(str(tmp_path), everything=True)
    assert (whole.sampled, whole.decoded) == (30, 30)
    assert whole.longer.most == 39


@pytest.mark.parametrize("kind", ["list", "tar", "train and val", "named", "one image"])
def test_every_kind_of_data(tmp_path, kind):
    files = [write(tmp_path / "images" / f"{i}.png", seed=i) for i in range(3)]
    data, images, splits = tmp_path / "images", 3, {"train": 3}
    if kind == "list":
        data = tmp_path / "list.txt"
        data.write_text("\n".join(map(str, files[:2])))
        images, splits = 2, {"train": 2}
    elif kind == "tar":
        data = tmp_path / "some.tar"
        with tarfile.open(data, "w") as tar:
            for file in files:
                tar.add(file, file.name)
    elif kind == "train and val":
        data = tmp_path / "both"
        for split, name in (("train", "c"), ("train", "d"), ("val", "c")):
            write(data / split / name / "0.png", seed=len(name))
        images, splits = 2, {"train": 2, "val": 1}
    elif kind == "named":
        data, images, splits = "fashion_mnist_sample", 10_000, {"train": 10_000, "val": 2000}
    else:
        data, images, splits = tmp_path / "alone", 1, {"train": 1}
        write(data / "1.png", (1, 1), grey=True)
    found = survey(str(data))
    assert (found.images, found.splits) == (images, splits)
    assert found.unreadable_count == 0
    assert found.bytes > 0
    assert found.grey == (kind in ("named", "one image"))


def test_sixteen_bits_and_transparency_are_said(tmp_path):
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((40, 40, 4), np.uint8)).save(tmp_path / "clear.png")
    colours = survey(str(tmp_path)).colours
    assert colours == {"colour and transparency": 1, "grey of 16 bits and more": 1}


@pytest.mark.parametrize("what", ["nothing there", "an empty folder", "nothing but raw"])
def test_nothing_to_train_on_is_a_sentence(tmp_path, what):
    folder = tmp_path / "photos"
    if what != "nothing there":
        folder.mkdir()
    if what == "nothing but raw":
        (folder / "x.heic").write_bytes(b"?")
    with pytest.raises(UsageError, match=r"does not exist|holds no image"):
        survey(str(folder))
