"""Tar shards: the same crops as from a folder, WebDataset's by others, and every kind of damage."""

import io
import json
import os
import shutil
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xdino.augment.multi_crop import multi_crop
from xdino.data import tars
from xdino.data.decode import UnreadableImage
from xdino.data.loader import CropLoader
from xdino.data.pack import pack
from xdino.data.sources import fingerprint, open_source, open_splits
from xdino.data.tars import index as index_room
from xdino.errors import RunFailed, UsageError

CROPS = multi_crop(16, local_count=1, local_size=8)


def jpeg(shade: int = 100, size: tuple[int, int] = (12, 9)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path):
    """train (24) and val (8) in two classes: JPEG and PNG of mixed sizes, one empty, odd names."""
    rng = np.random.default_rng(1)
    root = tmp_path / "photos"
    for split, count in (("train", 12), ("val", 4)):
        for label in ("n01", "n02"):
            for i in range(count):
                suffix = ("JPEG", "png")[i % 2]
                path = root / split / label / ("deep" if i == 3 else ".") / f"{i:02}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (20 + 3 * i, 60 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path, "JPEG" if suffix == "JPEG" else "PNG")
    (root / "train" / "n01" / "05.png").write_bytes(b"")
    (root / "train" / "n02" / "00.JPEG").rename(root / "train" / "n02" / "00.a.JPEG")
    shutil.copy(root / "train" / "n02" / "02.JPEG", root / "train" / "n02" / "00.b.JPEG")
    return root


def batches(data: str | Path, workers: int = 0, steps: int = 7) -> list:
    source = open_source(str(data), "train")
    loader = CropLoader(source, CROPS, 8, 3, workers=workers, max_bad_share=0.1)
    return list(loader.iterate(0, steps))


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        (x.indices == y.indices).all()
        and (x.table == y.table).all()
        and all(torch.equal(p, q) for p, q in zip(x.crops, y.crops, strict=True))
        for x, y in zip(a, b, strict=True)
    )


# A raw pack


@pytest.mark.parametrize("number", [None, 3])
def test_a_raw_pack_gives_the_folders_batches_and_labels(folder, tmp_path, number):
    out = tmp_path / ("packed" if number else "packed.tar")
    done = pack(str(folder), out, shards=number)
    assert (done.images, done.shrunk, done.unreadable) == (33, 0, [])
    assert [p.name for p in done.files] == (
        ["packed.tar"]
        if number is None
        else [f"{split}-{i:05}.tar" for split in ("train", "val") for i in range(3)]
    )
    expected = batches(folder)
    for workers in (0, 1, 4):
        assert same(batches(out, workers), expected)
    for ours, theirs in zip(open_splits(str(out)), open_splits(str(folder)), strict=True):
        assert (ours.labels == theirs.labels).all()
        assert ours.classes == theirs.classes == ("n01", "n02")
        for i in range(len(theirs)):
            assert ours.encoded(i) == theirs.encoded(i)
    assert open_splits(str(out))[0].name == str(out)


def test_a_pack_can_be_inspected_and_says_how_it_was_made(folder, tmp_path):
    out = tmp_path / "packed.tar"
    pack(str(folder), out)
    with tarfile.open(out) as tar:
        names = tar.getnames()
        told = json.load(tar.extractfile(tars.PACK_MEMBER))
    assert names[:2] == ["train/n01/00.jpeg", "train/n01/00.cls"]
    assert {"train/n02/00_a.jpeg", "train/n02/00_b.jpeg", "val/n02/deep/03.png"} <= set(names)
    assert names[-1] == tars.PACK_MEMBER
    assert told["source"] == str(folder)
    assert told["shorter_side"] is None
    assert told["splits"]["train"]["fingerprint"] == fingerprint(
        open_source(str(folder), "train", labelled=True)
    )
    again = tmp_path / "again.tar"
    pack(str(folder), again, workers=3)
    assert again.read_bytes() == out.read_bytes()


def test_named_data_are_packed_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path = tmp_path / f"{split}-{kind}-ubyte"
            path.write_bytes(header + array.astype(np.uint8).tobytes())
    out = tmp_path / "fashion.tar"
    pack(f"fashion_mnist:{tmp_path}", out)
    for ours, theirs in zip(
        open_splits(str(out)), open_splits(f"fashion_mnist:{tmp_path}"), strict=True
    ):
        assert (ours.channels, ours.classes) == (1, theirs.classes)
        assert (ours.labels == theirs.labels).all()
        assert all((ours.read(i) == theirs.read(i)).all() for i in range(len(theirs)))
    assert ours.member(0) == b"T_shirt_top/00000.png"


def test_a_list_is_packed_without_its_machine(tmp_path):
    listing = tmp_path / "all.txt"
    (tmp_path / "a.jpg").write_bytes(jpeg())
    listing.write_text(f"a.jpg\n{tmp_path / 'a.jpg'}\n../{tmp_path.name}/a.jpg\n")
    pack(str(listing), tmp_path / "list.tar")
    packed = open_source(str(tmp_path / "list.tar"), "train")
    assert len(packed) == 3
    assert packed.labels is None
    assert not any(packed.member(i).startswith((b"/", b"..")) for i in range(3))


# A shrunk pack


def test_a_shrunk_pack_says_so_wherever_its_name_goes(folder, tmp_path):
    out = tmp_path / "small.tar"
    done = pack(str(folder), out, shorter_side=30, quality=90)
    train, _ = open_splits(str(out))
    assert train.name == f"{out} (shrunk to 30)"
    assert (done.images, len(done.unreadable)) == (33, 1)
    assert "05.png" in done.unreadable[0][0]
    whole = open_splits(str(folder))[0]
    for i in range(len(whole)):
        try:
            before = whole.read(i).shape
        except UnreadableImage:
            assert train.encoded(i) == b""
            continue
        after = train.read(i).shape
        assert min(after) == 3
        assert min(after[:2]) == min(30, *before[:2])
        assert after[0] / after[1] == pytest.approx(before[0] / before[1], rel=0.05)
        if min(before[:2]) <= 30:
            assert train.encoded(i) == whole.encoded(i)
    assert fingerprint(train) != fingerprint(whole)
    # Packed once more as it is, it is still no original.
    pack(str(out), tmp_path / "again.tar")
    assert open_source(str(tmp_path / "again.tar")).name.endswith("(shrunk to 30)")
    folder_of_both = tmp_path / "both"
    folder_of_both.mkdir()
    shutil.copy(out, folder_of_both / "a.tar")
    write_tar(folder_of_both / "b.tar", {"x.jpg": jpeg()})
    assert open_source(str(folder_of_both)).name.endswith("(partly shrunk to 30)")


def test_shrinking_is_close_to_the_picture(tmp_path):
    down, across = np.mgrid[0:400, 0:600]
    picture = np.stack([across * 0.4, down * 0.6, 240 - across * 0.2], axis=-1).astype(np.uint8)
    (tmp_path / "one").mkdir()
    Image.fromarray(picture).save(tmp_path / "one" / "a.png")
    pack(str(tmp_path / "one"), tmp_path / "one.tar", shorter_side=100)
    small = open_source(str(tmp_path / "one.tar")).read(0)
    expected = Image.fromarray(picture).resize((150, 100), Image.Resampling.BICUBIC)
    assert np.abs(small.astype(int) - np.asarray(expected)).mean() < 2


def test_wrong_usage_of_pack(folder, tmp_path):
    out = tmp_path / "x.tar"
    out.touch()
    for arguments, sentence in (
        ({"out": out}, "is there already"),
        ({"out": tmp_path / "x"}, r"must end in \.tar"),
        ({"out": tmp_path / "y.tar", "shards": 2}, "name a folder"),
        ({"out": folder, "shards": 2}, "an empty folder"),
        ({"out": tmp_path / "new", "shards": 100}, "has 25 images"),
        ({"out": tmp_path / "z.tar", "quality": 0}, "quality"),
        ({"out": tmp_path / "z.tar", "data": str(tmp_path / "none")}, "has no none"),
    ):
        with pytest.raises(UsageError, match=sentence):
            pack(**{"data": str(folder), **arguments})
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "z.tar").exists()


def test_a_file_that_vanishes_leaves_no_half_a_pack(folder, tmp_path, monkeypatch):
    from xdino.data.sources import FileSource

    encoded = FileSource.encoded

    def vanish(self, index):
        if index == 7:
            raise FileNotFoundError(2, "No such file or directory")
        return encoded(self, index)

    monkeypatch.setattr(FileSource, "encoded", vanish)
    with pytest.raises(RunFailed, match=r"n01/08\.JPEG cannot be read \(No such file"):
        pack(str(folder), tmp_path / "p.tar")
    assert not list(tmp_path.glob("*.tar*"))
    assert not list(tmp_path.glob(".*tmp"))


# Shards by others


def test_webdataset_shards_with_cls(tmp_path):
    for split, count in (("train", 3), ("validation", 1)):
        for shard in range(2):
            members = {}
            for i in range(count):
                stem = f"{split}{shard}{i}"
                members |= {f"{stem}.cls": b"%d\n" % (10 * i), f"{stem}.jpg": jpeg(10 * i)}
                members |= {f"{stem}.json": b"{}"}
            write_tar(tmp_path / f"set-{split}-{shard}.tar", members)
    train = open_source(str(tmp_path), "train", labelled=True)
    assert train.classes == ("0", "10", "20")
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert abs(int(train.read(5)[..., 0].mean()) - 20) < 3
    assert train.describe(5) == f"{tmp_path / 'set-train-1.tar'}: train12.jpg"
    assert len(open_source(str(tmp_path), "val")) == 2
    with pytest.raises(UsageError, match="differ between train and val; only in train: 10, 20"):
        open_splits(str(tmp_path))
    assert train.channels == 3
    assert open_source(str(tmp_path), "val", channels=1).read(0).shape == (9, 12, 1)


def test_a_tar_of_class_folders_made_by_hand(folder, tmp_path):
    hidden = folder / "train" / "n01" / "._00.JPEG"
    hidden.write_bytes(b"resource fork")
    out = tmp_path / "byhand.tar"
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder / "train", ".")
    source = open_source(str(out), "train", labelled=True)
    assert source.classes == ("n01", "n02")
    assert len(source) == 25
    for i in range(25):
        label = os.fsdecode(source.member(i)).split("/")[0]
        assert source.classes[source.labels[i]] == label
        path = folder / "train" / os.fsdecode(source.member(i))
        assert source.encoded(i) == path.read_bytes()


def test_splits_are_found_in_folders_names_and_members(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "folders" / split).mkdir(parents=True)
        write_tar(tmp_path / "folders" / split / "0.tar", {"a/x.jpg": jpeg(), "b/y.jpg": jpeg()})
    train, val = open_splits(str(tmp_path / "folders"))
    assert (len(train), len(val), val.classes) == (2, 2, ("a", "b"))
    write_tar(tmp_path / "plain.tar", {"a/x.jpg": jpeg(), "b/y.jpg": jpeg()})
    assert len(open_source(str(tmp_path / "plain.tar"), "train")) == 2
    with pytest.raises(UsageError, match="has no folder val inside, only a, b"):
        open_source(str(tmp_path / "plain.tar"), "val")
    # Images beside a tar are the data; the tar is what they came from.
    Image.new("RGB", (9, 9)).save(tmp_path / "loose.png")
    assert open_source(str(tmp_path)).describe(0).endswith("loose.png")


def test_label_mistakes(tmp_path):
    some = write_tar(tmp_path / "some.tar", {"a.jpg": jpeg(), "a.cls": b"1", "b.jpg": jpeg()})
    with pytest.raises(UsageError, match=r"no \.cls beside 1 of its 2 images, among them b\.jpg"):
        open_source(str(some), labelled=True)
    none = write_tar(tmp_path / "none.tar", {"a.jpg": jpeg(), "n/b.jpg": jpeg()})
    with pytest.raises(UsageError, match=r"1 images lie outside of any: a\.jpg"):
        open_source(str(none), labelled=True)
    two = write_tar(tmp_path / "two.tar", {"a.jpg": jpeg(), "a.seg.png": jpeg(), "a.cls": b"1"})
    with pytest.raises(UsageError, match=r"several images in the sample a \(a\.jpg and a\.seg"):
        open_source(str(two))
    names = write_tar(tmp_path / "names.tar", {"a.jpg": jpeg(), "a.cls": b"cat",
                                               "b.jpg": jpeg(), "b.cls": b"ant"})  # fmt: skip
    assert open_source(str(names), labelled=True).classes == ("ant", "cat")
    loose = write_tar(tmp_path / "dots.tar", {"p.1.jpg": jpeg(), "p.2.jpg": jpeg()})
    assert len(open_source(str(loose))) == 2  # no sample is described: every image counts


# Damage


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.jpg": jpeg(i) for i in range(4)}).read_bytes()
    cut = tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = [(m.offset, m.offset_data, m.size) for m in tar]
    end = members[-1][1] + -(-members[-1][2] // 512) * 512
    for length in (100, 512, 700, members[2][0], members[2][0] + 300, members[3][1] + 1, end):
        cut.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"cut short after|is no tar file") as caught:
            open_source(str(cut))
        assert str(caught.value).count("\n") == 0
    cut.write_bytes(whole[: end + 512])  # one block of the end mark is enough
    assert len(open_source(str(cut))) == 4


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{i}.jpg": jpeg(i) for i in range(4)})
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[2].offset
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"after 2 members, the last 1\.jpg \(a damaged header"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"no tar at all" * 100, "is no tar file"),
        (b"\x1f\x8b" + bytes(600), "is compressed, .* gunzip it first"),
        (bytes(1024), "holds no image"),
    ],
)
def test_what_is_no_tar(tmp_path, content, sentence):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        open_source(str(path))


def test_other_mistakes_are_sentences(tmp_path):
    write_tar(tmp_path / "n.tar", {"a.npy": b"x", "b.txt": b"y", "c.tar": b"z"})
    with pytest.raises(UsageError, match=r"holds no image; .* suffixes \.npy, \.tar, \.txt, known"):
        open_source(str(tmp_path / "n.tar"))
    compressed = write_tar(tmp_path / "n.tar.xz", {"a.jpg": jpeg()})
    shutil.move(compressed, tmp_path / "plain.tar")
    with tarfile.open(tmp_path / "n.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "plain.tar", "a.jpg")
    with pytest.raises(UsageError, match="unxz it first"):
        open_source(str(tmp_path / "n.tar.xz"))
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        (tmp_path / "a.jpg").write_bytes(jpeg())
        os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
        tar.add(tmp_path / "a.jpg", "a.jpg")
        tar.add(tmp_path / "b.jpg", "b.jpg")
    with pytest.raises(UsageError, match=r"holds b\.jpg as a link.*--hard-dereference"):
        open_source(str(tmp_path / "links.tar"))
    write_tar(tmp_path / "p.tar", {"a.jpg": jpeg(), tars.PACK_MEMBER: b"{"})
    with pytest.raises(UsageError, match="__xdino_pack__ is damaged"):
        open_source(str(tmp_path / "p.tar"))
    with pytest.raises(UsageError, match=r"has no gone\.tar"):
        open_source(str(tmp_path / "gone.tar"))


def test_names_that_point_outside_reach_nothing(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = write_tar(inside / "x.tar", {"../../escaped.jpg": jpeg(), "/tmp/absolute.jpg": jpeg()})
    source = open_source(str(path))
    assert [source.read(i).shape for i in range(2)] == [(9, 12, 3)] * 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".x.tar.index.npz", "inside", "x.tar"]
    pack(str(path), tmp_path / "again.tar")
    with tarfile.open(tmp_path / "again.tar") as tar:
        images = [name for name in tar.getnames() if name.endswith(".jpg")]
    assert images == ["escaped.jpg", "tmp/absolute.jpg"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_never_escapes_as_another_error(data):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as out:
        for name in ("a.jpg", "a.cls", "b" * 120 + ".jpg"):
            member = tarfile.TarInfo(name)
            member.size = 5
            out.addfile(member, io.BytesIO(b"12345"))
    raw = bytearray(tar.getvalue()[:6000])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(raw)
        try:
            index = tars.open_index(path)
        except UsageError:
            return
        assert (index.offsets + index.sizes <= len(raw)).all()


# The kept index


def test_the_index_is_kept_and_follows_the_file(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(10), "a.cls": b"7"})
    first = tars.open_index(path)
    kept = tmp_path / ".x.tar.index.npz"
    assert kept.exists()
    monkeypatch.setattr(index_room, "scan", None)
    second = tars.open_index(path)
    assert list(second.names) == list(first.names) == [b"a.jpg"]
    assert list(second.classes) == [b"7"]
    monkeypatch.undo()
    write_tar(path, {"b.jpg": jpeg(10), "c.jpg": jpeg(10)})
    assert len(tars.open_index(path)) == 2
    for spoilt in (b"", b"PK\x03\x04 no zip", kept.read_bytes()[:200]):
        kept.write_bytes(spoilt)
        assert len(tars.open_index(path)) == 2


def test_an_index_that_points_outside_is_made_again(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(10)})
    tars.open_index(path)
    kept = tmp_path / ".x.tar.index.npz"
    with np.load(kept) as file:
        arrays = dict(file)
    right = int(arrays["offsets"][0])
    for spoil in ({"offsets": np.array([10**12])}, {"sizes": np.array([-1])},
                  {"name_ends": np.array([0, 99])}, {"offsets": np.array(["a"], object)}):  # fmt: skip
        np.savez(kept, **(arrays | spoil))
        assert tars.open_index(path).offsets.tolist() == [right]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_cannot_be_written_is_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(10)})
    tmp_path.chmod(0o555)
    try:
        assert len(open_source(str(path))) == 1
    finally:
        tmp_path.chmod(0o755)


def test_an_index_that_cannot_be_kept_costs_nothing_else(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(10)})
    (tmp_path / ".x.tar.index.npz").mkdir()
    assert len(open_source(str(path))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.tar.index.npz", "x.tar"]


# Reading


def test_threads_and_forked_processes_read_at_once(tmp_path):
    members = {f"{i:03}.jpg": jpeg(i, (30, 30 + i)) for i in range(50)}
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    wanted, wrong = list(members.values()), []

    def read(start: int) -> None:
        for i in range(300):
            j = (start + 7 * i) % 50
            if source.encoded(j) != wanted[j]:
                wrong.append(j)

    child = os.fork()
    if child == 0:
        read(3)
        os._exit(1 if wrong else 0)
    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_more_tars_than_are_held_open(tmp_path, monkeypatch):
    from xdino.data.sources import TarSource

    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", {f"{i}.jpg": jpeg(40 * i)})
    held = open_source(str(tmp_path))
    monkeypatch.setattr(TarSource, "_HELD_OPEN", 2)
    source = open_source(str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    assert [source.encoded(i) for i in range(4)] == [held.encoded(i) for i in range(4)]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
        del held
        assert len(os.listdir("/proc/self/fd")) == before - 4


def test_a_tar_that_shrinks_under_a_run_is_an_unreadable_image(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{i}.jpg": jpeg(i) for i in range(4)})
    source = open_source(str(path))
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="shorter than when it was indexed"):
        source.read(3)
