"""The kept index of many files: as good as a new listing, or made again."""

import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino.data import listing
from xdino.data.files import folders, lists, source
from xdino.data.files import index as files_index
from xdino.data.sources import fingerprint, open_source, open_splits
from xdino.data.tars import store
from xdino.errors import UsageError
from xdino.runtime import kept


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """An index is worth it for three images, and the user's cache is not the user's."""
    monkeypatch.setattr(files_index, "LEAST", 3)
    monkeypatch.setattr(files_index, "_A_FOLDER", 1)
    monkeypatch.setattr(store.LocalTars, "least", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settle(root: Path, seconds: int = 100) -> None:
    """Let all folders have changed a while ago."""
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir() or p.suffix == ".txt")]:
        os.utime(folder, (time.time() - seconds,) * 2)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "data" / "photos"
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8 + i, 9), (20 * i, 9, 9)).save(path)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    settle(root)
    return root


def state(source) -> tuple:
    labels = None if source.labels is None else source.labels.tolist()
    return (
        [source.member(i) for i in range(len(source))], [source.encoded(i) for i in range(len(source))],
        source.sizes().tolist(), labels, source.classes, source.left_out, source.remarks,
        fingerprint(source), source.stamps(), source.channels, source.name, source.describe(0),
    )  # fmt: skip


def listings(monkeypatch) -> list:
    """What is listed from here on."""
    seen, real = [], os.scandir
    monkeypatch.setattr(listing.os, "scandir", lambda path: seen.append(path) or real(path))
    return seen


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("split", ["train", "val", None])
def test_a_folder_is_the_same_from_its_index(photos, monkeypatch, split, labelled):
    if split is None and labelled:
        photos = photos / "train"
    first = state(open_source(str(photos), split, labelled=labelled))
    seen = listings(monkeypatch)
    again = open_source(str(photos), split, labelled=labelled)
    assert seen == []
    assert again.facts_are_old
    assert state(again) == first
    assert len(list(photos.parent.glob(".photos.*.index"))) == (0 if photos.name == "train" else 1)


def test_an_index_knows_no_place_and_no_working_directory(photos, monkeypatch):
    first = open_source(str(photos), "train", labelled=True)
    monkeypatch.chdir(photos.parent)
    seen = listings(monkeypatch)
    again = open_source("photos", "train", labelled=True)
    assert seen == []
    assert fingerprint(again) == fingerprint(first)
    assert again.describe(0) == "photos/train/cat/0.png"
    assert again.encoded(3) == first.encoded(3)


def add(root: Path) -> None:
    Image.new("RGB", (5, 5)).save(root / "train" / "dog" / "new.png")


def remove(root: Path) -> None:
    (root / "train" / "cat" / "3.png").unlink()


def rename(root: Path) -> None:
    (root / "train" / "cat" / "3.png").rename(root / "train" / "cat" / "x.png")


def add_folder(root: Path) -> None:
    (root / "train" / "cow").mkdir()
    Image.new("RGB", (5, 5)).save(root / "train" / "cow" / "new.png")


def replace(root: Path) -> None:
    Image.new("RGB", (50, 5)).save(root / "train" / "cat" / "beside.png")
    os.replace(root / "train" / "cat" / "beside.png", root / "train" / "cat" / "2.png")


def write_into(root: Path) -> None:
    path = root / "train" / "cat" / "2.png"
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("change", [add, remove, rename, add_folder, replace, write_into])
def test_a_change_is_seen(photos, monkeypatch, change):
    before = state(open_source(str(photos), "train", labelled=True))
    change(photos)
    seen = listings(monkeypatch)
    now = state(open_source(str(photos), "train", labelled=True))
    assert len(seen) > 0
    monkeypatch.setattr(folders, "indexed", lambda *a: a[-1]())
    assert now == state(open_source(str(photos), "train", labelled=True))
    assert now != before


def test_what_was_changed_just_now_is_not_kept(photos):
    """A file that comes within the clock's next tick would not change the folder's time."""
    os.utime(photos / "train" / "cat")
    open_source(str(photos), "train")
    assert list(photos.parent.glob(".*.index")) == []


def damaged(raw: bytes) -> list[bytes]:
    middle, end = bytearray(raw), bytearray(raw)
    middle[len(raw) // 2] ^= 1
    end[-1] ^= 128
    told = raw.replace(b"cat", b"cow", 1)
    return [b"", b"x", raw[:100], raw[:-1], bytes(middle), bytes(end), told,
            b"\xff" * 8 + raw[8:], raw.replace(b'"U8"', b'"I8"')]  # fmt: skip


def test_a_damaged_index_is_made_again(photos, monkeypatch):
    first = state(open_source(str(photos), "train", labelled=True))
    (file,) = photos.parent.glob(".*.index")
    raw = file.read_bytes()
    seen = listings(monkeypatch)
    for spoilt in damaged(raw):
        file.write_bytes(spoilt)
        seen.clear()
        assert state(open_source(str(photos), "train", labelled=True)) == first
        assert len(seen) > 0
        assert kept._read(file) is not None


def test_an_index_of_another_kind_is_not_believed(photos, tmp_path):
    first = state(open_source(str(photos), "train", labelled=True))
    (file,) = photos.parent.glob(".*.index")
    good = kept._read(file)
    n = len(good.arrays["facts"])
    for spoilt in (
        {"facts": good.arrays["facts"][:-1]},
        {"path_ends": good.arrays["path_ends"][::-1]},
        {"folder_times": good.arrays["folder_times"][:-1]},
        {"paths": good.arrays["paths"].astype(np.int64)},
        {"labels": np.full(n, 7)},
    ):
        kept._write(file, kept.Kept(good.told, {**good.arrays, **spoilt}))
        assert state(open_source(str(photos), "train", labelled=True)) == first, spoilt
    for told in ({}, {**good.told, "classes": None}, {**good.told, "described": "zz"},
                 {**good.told, "this": [1, 2]}):  # fmt: skip
        kept._write(file, kept.Kept(told, good.arrays))
        assert state(open_source(str(photos), "train", labelled=True)) == first, told


def test_data_that_cannot_be_written_to_are_indexed_in_the_users_cache(
    photos, tmp_path, monkeypatch
):
    real = kept.written_beside

    def refused(path):
        if photos.parent in path.parents:
            raise kept.RunFailed(f"cannot write {path}: Read-only file system")
        return real(path)

    monkeypatch.setattr(kept, "written_beside", refused)
    first = state(open_source(str(photos), "train"))
    (file,) = (tmp_path / "cache" / "xdino" / "indexes").iterdir()
    assert re.fullmatch(r"[0-9a-f]{16}-photos\.train\.index", file.name)
    assert not list(photos.parent.glob(".*"))
    seen = listings(monkeypatch)
    assert state(open_source(str(photos), "train")) == first
    assert seen == []


# Lists


def test_a_list_costs_no_look_at_each_file(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(files_index, "_SAMPLED", 2)
    images = sorted((photos / "train").rglob("*.png"))
    text = tmp_path / "all.txt"
    text.write_text("\n".join([*map(str, images), "data/photos/val/cat/0.png"]))
    settle(tmp_path)
    first = state(open_source(str(text), "train"))
    looked, real = [], listing.status_of
    for room in (listing, lists, source, files_index):
        monkeypatch.setattr(room, "status_of", lambda path: looked.append(path) or real(path))
    again = open_source(str(text), "train")
    assert again.listed
    assert len(looked) == 1 + 3 + 2  # the list, the folders, the sample
    assert state(again) == first
    images[5].unlink()
    with pytest.raises(UsageError, match="1 of the 13 files"):
        open_source(str(text), "train")
    text.write_text("\n".join(map(str, images[:4])))
    assert len(open_source(str(text), "train")) == 4


# Tars


@pytest.fixture
def shards(photos, tmp_path):
    from xdino.data.pack import pack

    pack(str(photos), tmp_path / "shards", shards=3)
    return tmp_path / "shards"


def test_shards_are_the_same_from_their_index(shards, monkeypatch):
    first = [state(s) for s in open_splits(str(shards))]
    assert {f.name for f in shards.glob(".tars*")} == {
        ".tars.train.labelled.index",
        ".tars.all.labelled.index",
    }
    monkeypatch.setattr(store, "open_index", None)
    assert [state(s) for s in open_splits(str(shards))] == first
    monkeypatch.undo()
    monkeypatch.setattr(store.LocalTars, "least", 3)
    tar = shards / "train-00001.tar"
    os.utime(tar, ns=(1, tar.stat().st_mtime_ns + 1))  # written again
    with monkeypatch.context() as inside:
        inside.setattr(store, "open_index", None)
        with pytest.raises(TypeError):
            open_splits(str(shards))
    assert [state(s)[:4] for s in open_splits(str(shards))] == [s[:4] for s in first]
    (shards / "train-00002.tar").unlink()
    assert len(open_source(str(shards), "train")) < len(first[0][0])


def test_a_spoilt_index_of_shards_is_made_again(shards):
    first = state(open_source(str(shards), "train"))
    file = shards / ".tars.train.index"
    good = kept._read(file)
    a = good.arrays
    for spoilt in ({"offsets": a["offsets"] + 10**9}, {"tar": a["tar"] + 3},
                   {"sizes": a["sizes"] - 10**6}, {"names": a["names"][:-1]}):  # fmt: skip
        kept._write(file, kept.Kept(good.told, {**a, **spoilt}))
        assert state(open_source(str(shards), "train")) == first


def test_two_processes_at_once(photos):
    """Four open at once what none has indexed; each ends with a true state."""
    expected = fingerprint(open_source(str(photos), "train", labelled=True))
    (file,) = photos.parent.glob(".*.index")
    file.unlink()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_open_often, [str(photos)] * 4, chunksize=1) == [{expected}] * 4
    assert len(list(photos.parent.iterdir())) == 2, "nothing is left lying"


def _open_often(data: str) -> set[str]:
    return {fingerprint(open_source(data, "train", labelled=True)) for _ in range(20)}
