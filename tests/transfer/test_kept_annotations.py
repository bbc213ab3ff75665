"""The kept index of a JSON file of annotations: as good as the file, or made again."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from test_detection_data import SQUARE, H, W, annotation, coco_set, picture, tree

from xdino.errors import UsageError
from xdino.runtime import kept
from xdino_transfer.dense_training.detecting import source
from xdino_transfer.detection.layouts import coco, index
from xdino_transfer.detection.layouts.outline_columns import Outlines

RUNS = {"size": [H, W], "counts": [100, 40, 460]}
TOLD = tree(
    [
        annotation(id=1, bbox=[5, 4, 0, 8]),
        annotation(id="two", segmentation=[[1, 1, 5, 5]]),
        annotation(id=3, iscrowd=1, segmentation=RUNS),
        annotation(id=4, image_id=90, category_id=90, area=80.125, bbox=[5.01, 4.3, 9.7, 8]),
        annotation(id=5, image_id=91, segmentation=[*SQUARE, [0.01, 0.29, 9.7, 4.35, 3, 12.99]]),
        annotation(id=6, image_id=91, segmentation=None),
    ],
    images=(7, 90, 91, *range(100, 130)),
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A set whose files are large enough, and were written a while ago."""
    monkeypatch.setattr(index, "LEAST", 0)
    monkeypatch.setattr(source, "SHORTEST", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = coco_set(tmp_path / "data", train=TOLD)
    settle(root)
    return root


def settle(root, seconds=100):
    for path in (root / "annotations").glob("*.json"):
        os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def read(root, share=0.05):
    return coco.read(root / "annotations/instances_train2017.json", root / "train2017", share)


def state(known):
    """All that anything is made of."""
    masks = [known.mask(i, row) for i in range(len(known)) for row in known.of(i, crowd=True)]
    columns = [
        getattr(known, name).tolist()
        for name in ("category_ids", "numbers", "sizes", "starts", "boxes", "labels", "areas", "crowd")
    ]  # fmt: skip
    return (
        json.dumps([known.where, known.classes, columns, known.notices, [*map(str, known.paths)]]),
        known.truth(), np.stack(masks).tobytes(), known.left_out,
        [*source.AnnotatedSource(known)._content()],
        [known.boxes.dtype, known.areas.dtype, known.crowd.dtype],
    )  # fmt: skip


def reads(monkeypatch):
    """Which files are read from here on."""
    seen, real = [], coco._read
    monkeypatch.setattr(
        coco, "_read", lambda path, *more: seen.append(path.name) or real(path, *more)
    )
    return seen


def place(root):
    return root / "annotations" / ".instances_train2017.json.index"


def test_the_same_from_its_index(root, monkeypatch):
    first = read(root)
    seen = reads(monkeypatch)
    again = read(root)
    assert seen == []
    assert state(again) == state(first)
    assert again.left_out.points == again.left_out.dropped == 1
    assert "(first: annotation two)" in again.notices[1]
    assert again.outlines.coordinates.dtype == np.int32
    # Another way to the same files, and other files of the folder.
    monkeypatch.chdir(root.parent)
    other = coco.read(root.relative_to(root.parent) / "annotations/instances_train2017.json",
                      root.relative_to(root.parent) / "train2017")  # fmt: skip
    assert seen == []
    assert other.notices[0].startswith("data/annotations/instances_train2017.json: 1 objects have")
    assert str(other.paths[1]) == "data/train2017/000000000090.jpg"


def test_every_coordinate_comes_back():
    told = [
        [[0.1 + 0.2, 1e-7, 5.123456789, 3, 2.2, 1]],
        None,
        RUNS,
        {"size": [H, W], "counts": "ab"},
    ]
    columns = Outlines.of(told)
    assert columns.coordinates.dtype == np.float64
    assert columns.at(0, (H, W))[0].tolist() == told[0][0]
    assert columns.at(1, (H, W)) is None
    assert columns.at(2, (H, W)) == RUNS
    assert columns.at(3, (H, W)) == {"size": [H, W], "counts": b"ab"}
    assert columns.are_whole(4)
    assert not Outlines.of([None]).any()
    hundredths = np.arange(100_000) / 100
    whole = Outlines.of([[hundredths], None])
    assert whole.coordinates.dtype == np.int32
    assert np.array_equal(whole.at(0, (H, W))[0], hundredths)


def test_pictures_that_come_and_go_are_seen(root, monkeypatch):
    read(root)
    gone = root / "train2017" / f"{7:012}.jpg"
    gone.unlink()
    seen = reads(monkeypatch)
    first = read(root)
    assert "1 of the 33 pictures" in first.notices[0]
    again = read(root)
    assert len(seen) == 1
    assert state(again) == state(first)
    assert (len(again), again.numbers[0]) == (32, 90)
    with pytest.raises(UsageError, match=r"1 of the 33 pictures of .*7\.jpg$"):
        read(root, share=0.01)
    assert len(seen) == 1
    picture(gone)
    assert len(read(root)) == 33
    assert len(seen) == 2


def test_another_file_is_seen_and_a_new_one_not_kept(root, monkeypatch):
    read(root)
    path = root / "annotations" / "instances_train2017.json"
    told = {**TOLD, "annotations": TOLD["annotations"][1:]}
    path.write_text(json.dumps(told))
    seen = reads(monkeypatch)
    for count in (1, 2):  # it was written just now, and may be once more within the clock's tick
        assert read(root).left_out.dropped == 0
        assert len(seen) == count


def test_a_spoilt_index_is_made_again(root, monkeypatch):
    first = state(read(root))
    raw = place(root).read_bytes()
    seen = reads(monkeypatch)
    for spoilt in (
        b"",
        raw[:100],
        raw[:-1],
        raw.replace(b"kite", b"kits", 1),
        raw[:-9] + b"x" + raw[-8:],
    ):
        place(root).write_bytes(spoilt)
        assert state(read(root)) == first
        assert len(seen) == 1
        seen.clear()
    # Whole files, in which things do not fit together.
    good = kept._read(place(root))
    a, told = good.arrays, good.told
    arrays = [
        {"labels": a["labels"] + 9}, {"starts": a["starts"][::-1]}, {"boxes": a["boxes"][:-1]},
        {"name_ends": a["name_ends"] + 1}, {"areas": a["areas"].astype(np.int32)},
        {"outline_first": a["outline_first"] + 1}, {"outline_starts": a["outline_starts"][:-1]},
        {"outline_objects": a["outline_objects"] + 99}, {"outline_coordinates": a["sizes"].ravel()},
    ]  # fmt: skip
    others = [
        {}, {**told, "version": 0}, {**told, "file": [1, 2]}, {**told, "classes": ["car"]},
        {**told, "left_out": {**told["left_out"], "dropped": "1"}},
        {**told, "left_out": {**told["left_out"], "missing": [0]}},
    ]  # fmt: skip
    made = [replace(good, arrays={**a, **spoilt}) for spoilt in arrays]
    for spoilt in made + [replace(good, told=each) for each in others]:
        kept._write(place(root), spoilt)
        seen.clear()
        assert state(read(root)) == first
        assert len(seen) == 1, spoilt


def test_what_cannot_lie_beside_lies_in_the_users_cache(root, tmp_path, monkeypatch):
    real = kept.written_beside

    def refused(path):
        if root in path.parents:
            raise kept.RunFailed(f"cannot write {path}: Read-only file system")
        return real(path)

    monkeypatch.setattr(kept, "written_beside", refused)
    first = state(read(root))
    assert not place(root).exists()
    assert len([*(tmp_path / "cache" / "xdino" / "indexes").iterdir()]) == 1
    seen = reads(monkeypatch)
    assert state(read(root)) == first
    assert seen == []
