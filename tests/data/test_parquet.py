"""Hugging Face's Parquet image sets: the same images as in a folder, and mistakes as sentences."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from xdino.data import parquet
from xdino.data.loader import CropLoader
from xdino.data.pack import pack
from xdino.data.sources import fingerprint, open_source, open_splits, splits_of
from xdino.errors import UsageError

from .test_remote import CROPS, same

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = ["wild cat", "dog"]


def image(rng: np.random.Generator, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 255, (int(rng.integers(20, 40)), 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def table(images: list[bytes | None], labels: list | None = None, names=NAMES, column="image"):
    structs = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array(structs, kind)}
    if labels is not None:
        columns["label"] = pa.array(labels)
    found = pa.table(columns)
    if names is None:
        return found
    told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    return found.replace_schema_metadata({"huggingface": json.dumps(told)})


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "set" / "data").mkdir(parents=True)
    wanted = {}
    for name, count in (("train-00000-of-00002", 9), ("train-00001-of-00002", 8),
                        ("validation-00000-of-00001", 6)):  # fmt: skip
        images = [image(rng, ("JPEG", "PNG")[i % 2]) for i in range(count)]
        wanted[name] = images
        labels = [i % 2 for i in range(count)]
        pq.write_table(
            table(images, labels), tmp_path / "set" / "data" / f"{name}.parquet", row_group_size=4
        )
    return tmp_path / "set", wanted


def test_images_and_labels_are_those_of_the_rows(data):
    folder, wanted = data
    assert splits_of(str(folder)) == ("train", "val")
    train, val = open_splits(str(folder))
    images = [x for name, part in wanted.items() if name.startswith("train") for x in part]
    assert [train.encoded(i) for i in range(len(train))] == images
    assert train.classes == val.classes == ("wild cat", "dog")
    assert train.labels.tolist() == [i % 2 for i in range(9)] + [i % 2 for i in range(8)]
    assert train.sizes().tolist() == list(map(len, images))
    assert train.describe(10).endswith("train-00001-of-00002.parquet: row 1")
    assert train.member(1) == b"dog/00000001.png"
    assert val.read(0).shape[2] == 3
    one = folder / "data" / "train-00000-of-00002.parquet"
    assert len(open_source(str(one), "train")) == 9


def test_batches_do_not_depend_on_what_is_kept(data, monkeypatch):
    folder, _ = data
    source = open_source(str(folder), "train")
    expected = list(CropLoader(source, CROPS, 8, 3, workers=0).iterate(0, 5))
    monkeypatch.setattr(parquet, "KEPT_BYTES", 5_000)
    small = open_source(str(folder), "train")
    assert fingerprint(small) == fingerprint(source)
    assert same(list(CropLoader(small, CROPS, 8, 3, workers=3).iterate(0, 5)), expected)
    assert len(small._kept) == 1, "a group is larger than what may be kept"
    (said,) = [notice for notice in small.notices() if "xdino pack" in notice]
    assert "slow in random order" in said


def test_a_pack_of_it_has_the_same_images(data, tmp_path):
    folder, _ = data
    pack(str(folder), tmp_path / "packed.tar")
    for ours, theirs in zip(
        open_splits(str(tmp_path / "packed.tar")), open_splits(str(folder)), strict=True
    ):
        assert [ours.encoded(i) for i in range(len(ours))] == [
            theirs.encoded(i) for i in range(len(theirs))
        ]
        assert (ours.labels == theirs.labels).all()
        assert ours.classes == theirs.classes


def test_names_of_columns_and_kinds_of_labels(tmp_path):
    rng = np.random.default_rng(0)
    images = [image(rng) for _ in range(3)]
    path = tmp_path / "x.parquet"
    pq.write_table(table(images, ["b", "a", "b"], None, "img"), path)
    source = open_source(str(path), labelled=True)
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ("a", "b"))
    pq.write_table(pa.table({"picture": pa.array(images), "label": [10, 9, 10]}), path)
    source = open_source(str(path), labelled=True)
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ("9", "10"))
    assert source.encoded(2) == images[2]


def test_mistakes_are_sentences(tmp_path, data):
    folder, _ = data
    rng = np.random.default_rng(0)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    with pytest.raises(UsageError, match="no column of images' bytes, only text, label"):
        open_source(str(path))
    pq.write_table(table([image(rng), None]), path)
    source = open_source(str(path))
    with pytest.raises(OSError, match="it has no bytes"):
        source.read(1)
    with pytest.raises(UsageError, match="has no labels: expected a column called label"):
        open_source(str(path), labelled=True)
    pq.write_table(table([image(rng)] * 2, [0, -1]), path)
    with pytest.raises(UsageError, match="rows without a label"):
        open_source(str(path), labelled=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="is no Parquet file, or not whole"):
        open_source(str(path))
    with pytest.raises(UsageError, match="calls itself validation or test"):
        open_source(str(folder / "data" / "train-00000-of-00002.parquet"), "val")
