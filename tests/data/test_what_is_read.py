"""What counts as an image, what is train, and what a person is told about the rest."""

import gzip
import io
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from xdino.data.pack import pack
from xdino.data.sources import (
    FileSource,
    class_order,
    fingerprint,
    open_source,
    open_splits,
    splits_of,
)
from xdino.errors import UsageError


def encoded(shade: int = 100, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (shade, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def picture(path: Path | bytes, shade: int = 100) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(encoded(shade))


def write_tar(path: Path, *names: str, **contents: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = contents.get(name.rpartition(".")[2], encoded())
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def names(source) -> list[str]:
    return [os.fsdecode(source.member(i)) for i in range(len(source))]


# Which files are images


def test_every_kind_of_file_counts_or_is_counted(tmp_path):
    for suffix in ("jfif", "jpe", "JPG", "avif", "jp2", "mpo", "pbm", "qoi", "tga"):
        picture(tmp_path / f"a.{suffix}")
    picture(tmp_path / "0123456789abcdef")  # recognised by its bytes
    for name in ("b.heic", "c.heic", "d.txt", "README", "e.png.part"):
        (tmp_path / name).write_text("no image here")
    source = open_source(str(tmp_path), "train")
    assert len(source) == 10
    assert source.left_out == {".heic": 2, ".txt": 1, "none": 1, ".part": 1}
    (told,) = source.notices()
    assert told == (
        f"5 files of {tmp_path} left out, for want of the suffix of an image that can be read: "
        ".heic (2), .part (1), .txt (1), none (1)"
    )


def test_a_tar_counts_the_same_files(tmp_path):
    kinds = {"heic": b"x", "txt": b"y", "cls": b"1", "json": b"{}", "README": b"z"}
    path = write_tar(tmp_path / "x.tar", "a.jfif", "a.cls", "b/0123", "b.heic", "README", "c.txt",
                     "@eaDir/a.jpg", ".hidden/a.jpg", **kinds)  # fmt: skip
    for _ in range(2):  # scanned, kept
        source = open_source(str(path))
        assert names(source) == ["a.jfif", "b/0123"]
        assert source.left_out == {".heic": 1, ".txt": 1, "none": 1}
        assert "3 files" in source.notices()[0]


def test_ten_thousand_suffixes_make_one_short_sentence(tmp_path):
    picture(tmp_path / "a.png")
    for i in range(300):
        (tmp_path / f"scan.{i:04}").touch()
    source = open_source(str(tmp_path))
    assert len(source.left_out) == 101
    assert sum(source.left_out.values()) == 300
    assert len(source.notices()[0]) < 400


@pytest.mark.parametrize(
    "folder", ["@eaDir", ".thumbnails", "__MACOSX", "#recycle", "$RECYCLE.BIN"]
)
def test_what_systems_leave_behind_is_no_class(tmp_path, folder):
    for name in ("a/1.png", "b/1.png", f"{folder}/1.png", f"a/{folder}/1.png"):
        picture(tmp_path / name)
    (tmp_path / "a" / "Thumbs.db").touch()
    source = open_source(str(tmp_path), labelled=True)
    assert (len(source), source.classes, source.notices()) == (2, ("a", "b"), [])


def test_a_run_among_its_images_is_neither_image_nor_class(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            picture(tmp_path / part / name / "0.png")
    before = fingerprint(open_source(str(tmp_path)))
    for run in (tmp_path / "train" / "run", tmp_path / "train" / "cat" / "run"):
        picture(run / "views.png")
        for name in ("config.yaml", "environment.json"):
            (run / name).write_text("")
    train, _ = open_splits(str(tmp_path))
    assert train.classes == ("cat", "dog")
    assert fingerprint(open_source(str(tmp_path))) == before
    (run / "config.yaml").unlink()  # no run
    assert "train/cat/run/views.png" in names(open_source(str(tmp_path)))


def test_pipes_devices_and_sockets_are_never_opened(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe.png", tmp_path / "link.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.gif")
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)  # a socket's name has room for some hundred bytes
        bound.bind("socket.png")
    source = open_source(str(tmp_path))
    assert names(source) == ["a.png"]
    assert source.left_out == {"no regular file": 5}
    direct = FileSource("given", tmp_path, [b"pipe.png", b"zero.gif"])
    for index in range(2):
        with pytest.raises(OSError, match="no regular file"):
            direct.read(index)
    (tmp_path / "all.txt").write_text("a.png\npipe.png\nlink.jpg\n")
    with pytest.raises(UsageError, match=r"2 of the 3 .* no regular files: pipe\.png, link\.jpg"):
        open_source(str(tmp_path / "all.txt"))
    for what in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UsageError, match="neither a folder nor a regular file"):
            open_source(str(what))


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path):
    os.symlink(tmp_path / "annex" / "x", tmp_path / "a.png")
    os.symlink("b.png", tmp_path / "b.png")
    source = open_source(str(tmp_path))
    assert names(source) == ["a.png", "b.png"]
    fingerprint(source)
    with pytest.raises(OSError, match=r"a\.png"):
        source.read(0)


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    picture(tmp_path / "a.png")
    with open(tmp_path / "b.png", "wb") as file:
        file.truncate(1 << 40)
    source = open_source(str(tmp_path), max_pixels=1000)
    with pytest.raises(OSError, match="bytes are more than 1,000 pixels need"):
        source.read(1)
    assert fingerprint(source) != fingerprint(open_source(str(tmp_path / "..")))


def test_folders_deeper_than_pythons_stack(tmp_path):
    deep = f"{tmp_path}/{'d/' * (sys.getrecursionlimit() + 10)}"
    subprocess.run(["mkdir", "-p", deep], check=True)
    Path(f"{deep}a.png").write_bytes(encoded())
    assert len(open_source(str(tmp_path))) == 1
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # pytest's own way recurses


# Which part is train


def test_train_never_falls_back_onto_val(tmp_path):
    write_tar(tmp_path / "imgs-0000.tar", "a/1.png", "b/1.png")
    write_tar(tmp_path / "imgs-val-0000.tar", "a/2.png", "b/2.png")
    assert names(open_source(str(tmp_path), "train")) == ["a/1.png", "b/1.png"]
    assert names(open_source(str(tmp_path), "val")) == ["a/2.png", "b/2.png"]
    assert splits_of(str(tmp_path)) == ("train", "val")
    (told,) = open_source(str(tmp_path), "train").notices()
    assert told == "train is 1 tar, without imgs-val-0000.tar"
    (tmp_path / "imgs-0000.tar").unlink()
    with pytest.raises(UsageError, match="nothing to train on but imgs-val-0000"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("held", ["val-0.tar", "x_validation_00.tar", "val00.tar", "a.test.1.tar",
                                  "VALID-3.tar", "eval-0.tar"])  # fmt: skip
def test_tars_that_are_held_out_by_name(tmp_path, held):
    write_tar(tmp_path / "more.tar", "a/1.png")
    write_tar(tmp_path / held, "a/2.png")
    assert names(open_source(str(tmp_path), "train")) == ["a/1.png"]
    assert len(open_source(str(tmp_path))) == 2


@pytest.mark.parametrize("name", ["photos-of-a-train.tar", "train.tar", "a_train_7.tar"])
def test_one_tar_called_train_does_not_replace_the_others(tmp_path, name):
    for other in ("bus.tar", "plane.tar", name):
        write_tar(tmp_path / other, f"{other[0]}/1.png")
    assert len(open_source(str(tmp_path), "train")) == 3
    assert splits_of(str(tmp_path)) == (None,)
    write_tar(tmp_path / "val.tar", "a/2.png")  # now it is a part of the data, as val is
    source = open_source(str(tmp_path), "train")
    assert len(source) == 1
    assert source.notices() == ["train is 1 tar, without bus.tar, plane.tar, val.tar"]


def test_a_class_called_train(tmp_path):
    for label in ("apple", "train", "whale"):
        for i in range(2):
            picture(tmp_path / "flat" / label / f"{i}.png")
            picture(tmp_path / "parts" / "train" / label / f"{i}.png")
            picture(tmp_path / "parts" / "val" / label / f"{i}.png")
    flat = open_source(str(tmp_path / "flat"), "train", labelled=True)
    assert (len(flat), flat.classes) == (6, ("apple", "train", "whale"))
    assert flat.notices() == [f"train is taken for one of the classes of {tmp_path / 'flat'}"]
    for split in open_splits(str(tmp_path / "parts")):
        assert (len(split), split.classes) == (6, ("apple", "train", "whale"))
    inside = open_source(str(tmp_path / "parts" / "train"), "train", labelled=True)
    assert len(inside) == 6
    for what in ("flat", "parts"):
        pack(str(tmp_path / what), tmp_path / f"{what}.tar")
        packed = open_source(str(tmp_path / f"{what}.tar"), "train", labelled=True)
        assert (len(packed), packed.classes) == (6, ("apple", "train", "whale"))


def test_train_among_other_folders(tmp_path):
    picture(tmp_path / "train" / "n01" / "a.png")
    (tmp_path / "devkit").mkdir()
    (tmp_path / "devkit" / "readme.txt").touch()
    picture(tmp_path / "test" / "a.png")
    picture(tmp_path / "unlabeled" / "a.png")
    source = open_source(str(tmp_path), "train")
    assert (names(source), source.notices()) == (["n01/a.png"], [])
    picture(tmp_path / "more" / "b.png")  # images, but train holds folders, as no class does
    source = open_source(str(tmp_path), "train")
    assert names(source) == ["n01/a.png"]
    assert source.notices() == [f"train is {tmp_path / 'train'}, without the images of more"]


@pytest.mark.parametrize("held", ["val", "validation", "test", "Test"])
def test_folders_that_are_held_out_by_name(tmp_path, held):
    picture(tmp_path / held / "n01" / "a.png")
    with pytest.raises(UsageError, match=f"nothing to train on but {held}"):
        open_source(str(tmp_path), "train")
    picture(tmp_path / "images" / "n01" / "b.png")
    source = open_source(str(tmp_path), "train")
    assert names(source) == ["images/n01/b.png"]
    assert source.notices() == [f"train is {tmp_path} without {held}"]
    path = write_tar(tmp_path / "x.tar", f"{held}/n01/a.png", "images/n01/b.png")
    assert names(open_source(str(path), "train")) == ["images/n01/b.png"]
    only = write_tar(tmp_path / "y.tar", f"{held}/n01/a.png")
    with pytest.raises(UsageError, match=f"nothing to train on but {held.lower()}"):
        open_source(str(only), "train")


@pytest.mark.parametrize("held", ["test", "Test", "validation"])
def test_what_lies_beside_a_train_may_be_val_by_another_name(tmp_path, held):
    for name in (f"train/{n}/1.png" for n in "ab"):
        picture(tmp_path / "folder" / name)
    for name in (f"{held}/{n}/2.png" for n in "ab"):
        picture(tmp_path / "folder" / name)
    tar = write_tar(
        tmp_path / "x.tar", "train/a/1.png", "train/b/1.png", f"{held}/a/2.png", f"{held}/b/2.png"
    )
    for data in (str(tmp_path / "folder"), str(tar)):
        assert splits_of(data) == ("train", "val")
        train, val = open_splits(data)
        assert (names(train), names(val)) == (["a/1.png", "b/1.png"], ["a/2.png", "b/2.png"])
        assert train.notices() == []
        assert [held in notice for notice in val.notices()] == [True]
    picture(tmp_path / "folder" / "val" / "a" / "3.png")  # the name itself wins
    assert names(open_source(str(tmp_path / "folder"), "val")) == ["a/3.png"]


@pytest.mark.parametrize("test", ["test-0.tar", "val-0.tar"])
def test_tars_beside_train_ones_are_val_by_their_names(tmp_path, test):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "train-0.tar", "a/1.png", "b/1.png")
    write_tar(tmp_path / "shards" / test, "a/2.png", "b/2.png")
    for data in (str(tmp_path / "shards"), str(tmp_path / "shards" / "*.tar")):
        assert splits_of(data) == ("train", "val")
        train, val = open_splits(data)
        assert (names(train), names(val)) == (["a/1.png", "b/1.png"], ["a/2.png", "b/2.png"])


@pytest.mark.parametrize(
    ("files", "train"),
    [
        (("train/n/1.png", "val/n/2.png"), ["n/1.png"]),
        (("train/1.png", "apple/2.png"), ["apple/2.png", "train/1.png"]),
        (("train/n/1.png", "apple/2.png"), ["n/1.png"]),
        (("train/1.png", "2.png"), ["2.png", "train/1.png"]),
        (("train/1.png", "unlabeled/2.png", "Test/3.png"), ["1.png"]),
        (("val/n/1.png", "apple/2.png"), ["apple/2.png"]),
        (("n/train/1.png", "n/val/2.png"), ["n/train/1.png", "n/val/2.png"]),
    ],
)
def test_folders_and_tars_have_one_rule(tmp_path, files, train):
    for name in files:
        picture(tmp_path / "folder" / name)
    folder = str(tmp_path / "folder")
    tar = str(write_tar(tmp_path / "x.tar", *sorted(files)))
    assert names(open_source(folder, "train")) == names(open_source(tar, "train")) == train
    assert splits_of(folder) == splits_of(tar)


# The order of classes


def test_one_order_of_classes():
    assert class_order({"10", "9", "2"}) == ["2", "9", "10"]
    assert class_order({"010", "9", "10"}) == ["9", "010", "10"]
    assert class_order({"10", "9", "x"}) == ["10", "9", "x"]
    assert class_order(["n02", "n01"]) == ["n01", "n02"]


@pytest.mark.parametrize("kinds", [("tars", "folders"), ("folders", "tars"), ("cls", "folders"),
                                   ("folders", "cls")])  # fmt: skip
def test_labels_agree_between_kinds_of_source(tmp_path, kinds):
    for split, kind in zip(("train", "val"), kinds, strict=True):
        for label in range(12):
            if kind == "folders":
                picture(tmp_path / split / str(label) / "a.png", 20 * label)
        (tmp_path / split).mkdir(exist_ok=True)
        if kind != "folders":
            with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
                for label in range(12):
                    stem = f"{label}/a" if kind == "tars" else f"s{label}"
                    for name, data in ((f"{stem}.png", encoded(20 * label)),
                                       (f"{stem}.cls", b"%d" % label)):  # fmt: skip
                        if kind == "cls" or name.endswith("png"):
                            member = tarfile.TarInfo(name)
                            member.size = len(data)
                            tar.addfile(member, io.BytesIO(data))
    train, val = open_splits(str(tmp_path))
    assert train.classes == val.classes == tuple(map(str, range(12)))
    for source in (train, val):
        for i in range(12):
            assert int(source.read(i)[0, 0, 0]) == 20 * source.labels[i]


def test_classes_in_another_order_are_matched_by_name(tmp_path, monkeypatch):
    from xdino.data import sources

    for split in ("train", "val"):
        for label in ("a", "b", "c"):
            picture(tmp_path / split / label / "x.png", ord(label))
    whole = sources.open_source

    def turned(data, split, *arguments, **options):
        source = whole(data, split, *arguments, **options)
        if split == "val":
            source.classes, source.labels = ("c", "a", "b"), (source.labels + 1) % 3
        return source

    monkeypatch.setattr(sources, "open_source", turned)
    train, val = sources.open_splits(str(tmp_path))
    assert train.classes == val.classes
    assert [train.classes[label] for label in val.labels] == ["a", "b", "c"]


# Names that are no UTF-8


def test_names_that_are_no_utf_8(tmp_path):
    for split in (b"train", b"val"):
        for label in (b"caf\xe9", b"b"):
            picture(os.fsencode(tmp_path) + b"/in/" + split + b"/" + label + b"/\xff.png")
    splits = open_splits(str(tmp_path / "in"))
    for source, split in zip(splits, ("train", "val"), strict=True):
        assert source.classes == ("b", r"caf\xe9")
        assert len(fingerprint(source)) == 16
        assert source.describe(0) == f"{tmp_path}/in/{split}/b/\\xff.png"
    pack(str(tmp_path / "in"), tmp_path / "out.tar")
    for ours, theirs in zip(open_splits(str(tmp_path / "out.tar")), splits, strict=True):
        assert ours.classes == theirs.classes
        assert [ours.member(i) for i in range(2)] == [b"b/\xff.png", b"caf\xe9/\xff.png"]
        assert ours.encoded(1) == theirs.encoded(1)


# Lists


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_as_other_systems_write_them(tmp_path, coding, end):
    picture(tmp_path / "ä.png")
    picture(tmp_path / "b.png")
    text = f"ä.png{end}b.png{end}"
    raw = ("\ufeff" + text).encode("utf-16-le") if coding.endswith("bom") else text.encode(coding)
    (tmp_path / "all.txt").write_bytes(raw)
    assert names(open_source(str(tmp_path / "all.txt"))) == ["ä.png", "b.png"]


def test_what_is_no_list_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.png", encoded())
    write_tar(tmp_path / "a.tar", "a.png").rename(tmp_path / "tar")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a.png\n"))
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "photo").write_bytes(encoded(format="JPEG"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(99))
    (tmp_path / "table").write_bytes(b"PAR1" + bytes(99))
    for name, sentence in (
        ("a.zip", "but a zip archive; unpack it"),
        ("a.gz", "compressed by gzip"),
        ("tar", r"its name must end in \.tar"),
        ("a.bin", "no list of paths: expected"),
        ("photo", "is one image"),
        ("a.parquet", "no Parquet file, or not whole"),
        ("table", "a Parquet file, but not called so"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            open_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_packed_list_is_the_list(tmp_path):
    members = ["train/a.png", "val/b.png", ".cache/c.png", "@eaDir/d.png", "e.dat", "f"]
    for number, name in enumerate(members):
        picture(tmp_path / name, 30 * number)
    (tmp_path / "g.dat").write_bytes(b"no image")
    (tmp_path / "all.txt").write_text("\n".join([*members, "g.dat"]))
    whole = open_source(str(tmp_path / "all.txt"), "train")
    pack(str(tmp_path / "all.txt"), tmp_path / "all.tar")
    packed = open_source(str(tmp_path / "all.tar"), "train")
    assert [packed.encoded(i) for i in range(7)] == [whole.encoded(i) for i in range(7)]


def test_a_pack_says_what_it_left_out(tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.heic").touch()
    (told,) = pack(str(tmp_path / "in"), tmp_path / "out.tar").notices
    assert "1 file of" in told
    assert ".heic (1)" in told


# What the operating system refuses


def test_what_cannot_be_opened_is_a_sentence(tmp_path):
    os.symlink("loop", tmp_path / "loop")
    os.symlink("gone", tmp_path / "dangling")
    (tmp_path / "file.txt").write_text("a.png")
    for data, sentence in (
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "dangling", "is a link to gone, which does not exist"),
        (tmp_path / "file.txt" / "train", "file.txt is a file, not a folder"),
        ("~nobody-of-that-name/x", "home directory"),
        ("x" * 5000, "too long"),
        ("a\0b", "zero byte"),
    ):
        for opened in (open_source, open_splits):
            with pytest.raises(UsageError, match=sentence) as caught:
                opened(str(data))
            assert len(str(caught.value)) < 1000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_a_sentence(tmp_path):
    picture(tmp_path / "in" / "deep" / "a.png")
    for locked in (tmp_path / "in" / "deep", tmp_path / "in", tmp_path):
        locked.chmod(0)
        try:
            with pytest.raises(UsageError, match="Permission denied"):
                open_source(str(tmp_path / "in"))
        finally:
            locked.chmod(0o755)


def test_a_listing_that_fails_is_a_sentence(tmp_path, monkeypatch):
    picture(tmp_path / "deep" / "a.png")
    scandir = os.scandir

    def refuse(folder):
        if os.fsdecode(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="deep cannot be listed: Permission denied"):
        open_source(str(tmp_path))


def test_more_tars_than_descriptors(tmp_path):
    for split in ("train", "val"):
        for i in range(65):
            write_tar(tmp_path / f"{split}-{i:03}.tar", f"n01/{i}.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 64, hard))
    try:
        for source in open_splits(str(tmp_path)):
            assert len([source.read(i) for i in range(len(source))]) == 65
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Tars


def test_joined_tars_are_read_through(tmp_path):
    parts = [write_tar(tmp_path / f"{i}.tar", f"n0{i}/a.png").read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    source = open_source(str(tmp_path / "all.tar"))
    assert names(source) == ["n00/a.png", "n01/a.png", "n02/a.png"]
    assert source.read(2).shape == (9, 12, 3)
    (tmp_path / "junk.tar").write_bytes(parts[0] + b"what a tape held before" * 100)
    assert len(open_source(str(tmp_path / "junk.tar"))) == 1
    spoilt = bytearray(parts[1])
    spoilt[10] ^= 255
    (tmp_path / "bad.tar").write_bytes(parts[0] + bytes(spoilt))
    with pytest.raises(UsageError, match="a damaged header at byte"):
        open_source(str(tmp_path / "bad.tar"))


@pytest.mark.parametrize("other", ["0001.png", "0001.left.jpg"])
def test_a_sample_with_two_images_is_called_so(tmp_path, other):
    path = write_tar(tmp_path / "x.tar", "0001.jpg", other, "0001.cls", "0002.jpg", cls=b"3")
    with pytest.raises(UsageError, match=r"holds several images in the sample 0001 \(0001") as told:
        open_source(str(path))
    assert "damaged" not in str(told.value)
    assert "no tar" not in str(told.value)


@pytest.mark.parametrize("size", [2**40, 2**62, -512])
@pytest.mark.parametrize("kind", [b"L", b"x", b"0"])
def test_a_header_that_announces_too_much(tmp_path, size, kind):
    member = tarfile.TarInfo("a.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    sign = b"\xff" if size < 0 else b"\x80"
    header[124:136] = sign + (size % 2**88).to_bytes(11, "big")
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(10_240))
    with pytest.raises(UsageError):
        open_source(str(tmp_path / "x.tar"))


def test_headers_that_announce_headers(tmp_path):
    member = tarfile.TarInfo("x")
    member.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) * 5000)
    with pytest.raises(UsageError, match="headers that announce headers"):
        open_source(str(tmp_path / "x.tar"))


# IDX


@pytest.mark.parametrize("compress", [False, True])
def test_a_huge_idx_header_takes_no_memory(tmp_path, compress):
    raw = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(784)
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * compress)
    path.write_bytes(gzip.compress(raw) if compress else raw)
    with pytest.raises(UsageError, match="holds 800 bytes where its header announces"):
        open_source(f"fashion_mnist:{tmp_path}")


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path):
    import tracemalloc

    raw = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 28, 28) + bytes(200_000_000)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(raw, 1))
    del raw
    tracemalloc.start()
    with pytest.raises(UsageError, match="holds more where its header announces 800 bytes"):
        open_source(f"fashion_mnist:{tmp_path}")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


# Fingerprints


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(100):
        picture(tmp_path / "photos" / f"n{i % 2}" / f"{i:03}.png", i)
    return tmp_path / "photos"


def test_a_fingerprint_does_not_depend_on_where_the_images_lie(photos, tmp_path, monkeypatch):
    first = fingerprint(open_source(str(photos)))
    monkeypatch.chdir(tmp_path)
    os.symlink(photos, tmp_path / "linked")
    for spelling in ("photos", "photos/", "./photos", "photos/../photos", "linked", f"{photos}//"):
        assert fingerprint(open_source(spelling)) == first
    os.utime(photos / "n0" / "000.png", (1, 1))
    assert fingerprint(open_source("photos")) == first
    photos.rename(tmp_path / "moved")
    assert fingerprint(open_source("moved")) == first
    (tmp_path / "base").mkdir()
    (tmp_path / "moved").rename(tmp_path / "base" / "again")
    assert fingerprint(open_source("base")) == first


def test_a_list_has_the_fingerprint_of_its_files_however_they_are_written(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    spellings = [
        [f"photos/{p.relative_to(photos)}" for p in files],
        [f"./photos//{p.relative_to(photos)}" for p in files],
        [f"../{tmp_path.name}/photos/{p.relative_to(photos)}" for p in files],
        [str(p) for p in files],
        [str(p) if i % 2 else f"photos/{p.relative_to(photos)}" for i, p in enumerate(files)],
    ]
    found = set()
    for number, spelling in enumerate(spellings):
        (tmp_path / f"{number}.txt").write_text("\n".join(spelling))
        found.add(fingerprint(open_source(str(tmp_path / f"{number}.txt"))))
    assert found == {fingerprint(open_source(str(photos)))}


def test_other_images_of_the_same_count_have_another_fingerprint(photos):
    first = fingerprint(open_source(str(photos)))
    path = photos / "n0" / "000.png"
    original = path.read_bytes()
    path.write_bytes(original + b"x")  # a size
    assert fingerprint(open_source(str(photos))) != first
    path.write_bytes(original)
    path.rename(photos / "n0" / "other.png")  # a name
    assert fingerprint(open_source(str(photos))) != first
    (photos / "n0" / "other.png").rename(path)
    assert fingerprint(open_source(str(photos))) == first
    for path in photos.rglob("*.png"):  # contents, names and sizes as before
        path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    assert fingerprint(open_source(str(photos))) != first


def test_a_fingerprint_of_tars(tmp_path):
    def made(name: str, shade: int, *members: str) -> str:
        path = write_tar(tmp_path / name, *members, bmp=encoded(shade, "BMP"))
        return fingerprint(open_source(str(path)))

    first = made("a.tar", 1, "n/a.bmp", "n/b.bmp")
    assert made("b.tar", 1, "n/a.bmp", "n/b.bmp") == first
    assert made("c.tar", 1, "set/n/a.bmp", "set/n/b.bmp") == first
    assert made("d.tar", 2, "n/a.bmp", "n/b.bmp") != first  # as large, but another colour
    assert made("e.tar", 1, "n/a.bmp", "n/c.bmp") != first


def test_a_fingerprint_asks_nothing_of_the_disk_but_its_sample(photos, monkeypatch):
    source = open_source(str(photos))
    asked = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (asked.append(path), real(path))[1])
    fingerprint(source)
    assert len(set(asked)) <= 64


def test_stamps_change_with_every_file(photos, tmp_path):
    first = open_source(str(photos)).stamps()
    assert open_source(f"{photos}/").stamps() == first
    os.utime(photos / "n1" / "001.png", (1, 1))
    assert open_source(str(photos)).stamps() != first
    direct = FileSource("given", photos, [b"n0/000.png"])
    before = direct.stamps()
    os.utime(photos / "n0" / "000.png", (1, 1))
    assert direct.stamps() == before  # as it was looked up
    assert FileSource("given", photos, [b"n0/000.png"]).stamps() != before
    path = write_tar(tmp_path / "x.tar", "a.png")
    packed = open_source(str(path)).stamps()
    os.utime(path, (1, 1))
    assert open_source(str(path)).stamps() != packed
    sample = open_source("fashion_mnist_sample", "val")
    assert sample.stamps() == open_source("fashion_mnist_sample", "val").stamps()
    assert sample.stamps() != open_source("fashion_mnist_sample", "train").stamps()
