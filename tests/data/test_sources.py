"""Sources: what they hold, and the sentence for everything that can be missing or misspelt."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdino.data.sources import fingerprint, open_source, open_splits
from xdino.errors import UsageError


def picture(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (shade, 0, 0)).save(path)
    return path


@pytest.fixture
def imagenet(tmp_path):
    """train and val, two classes, one nested folder, a hidden file and a text file."""
    root = tmp_path / "imagenet"
    for split, count in (("train", 3), ("val", 2)):
        for label in ("n01", "n02"):
            for i in range(count):
                picture(root / split / label / f"{i}.JPEG")
    picture(root / "train" / "n02" / "deep" / "x.png")
    (root / "train" / "n01" / "._0.JPEG").write_bytes(b"resource fork")
    (root / "train" / "n01" / "notes.txt").write_text("no image")
    return root


def write_idx(path: Path, array: np.ndarray, compress: bool = True) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", np.arange(count) % 10, compress=False)
    return tmp_path


# Fashion-MNIST


def test_fashion_mnist_files(fashion, monkeypatch):
    train = open_source(f"fashion_mnist:{fashion}", "train")
    assert (len(train), train.channels) == (30, 1)
    assert train.read(4).shape == (28, 28, 1)
    assert train.labels.tolist() == [i % 10 for i in range(30)]
    assert train.classes[9] == "Ankle boot"
    assert train.describe(17) == f"train image 17 of fashion_mnist:{fashion}"
    monkeypatch.setenv("XDINO_FASHION_MNIST", str(fashion))
    val = open_source("fashion_mnist", "val", channels=3)
    assert (len(val), val.channels, val.read(0).shape) == (20, 3, (28, 28, 3))
    assert len(open_splits("fashion_mnist")[1]) == 20


def test_shipped_sample():
    train, val = open_splits("fashion_mnist_sample")
    assert (len(train), len(val)) == (10_000, 2_000)
    assert np.bincount(train.labels).min() > 900
    assert fingerprint(train) != fingerprint(val)


def test_fashion_mnist_that_is_absent_says_how_to_get_it(tmp_path):
    with pytest.raises(UsageError, match=r"apt-get install dataset-fashion-mnist.*fashion_mnist:"):
        open_source(f"fashion_mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda raw: raw[: len(raw) // 2], "cannot be read whole"),
        (lambda raw: b"not gzip at all", "cannot be read whole"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-5]), "header announces"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "header announces"),
        (lambda raw: gzip.compress(b"\0\0\x0d\x03" + bytes(12)), "no IDX file"),
        (lambda raw: gzip.compress(b"\0\0"), "no IDX file"),
    ],
)
def test_damaged_idx_is_refused_whole(fashion, spoil, sentence):
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UsageError, match=sentence):
        open_source(f"fashion_mnist:{fashion}")


def test_images_and_labels_must_agree(fashion):
    write_idx(fashion / "train-labels-idx1-ubyte", np.zeros(29), compress=False)
    with pytest.raises(UsageError, match="30 train images but 29 labels"):
        open_source(f"fashion_mnist:{fashion}")
    write_idx(fashion / "train-labels-idx1-ubyte", np.full(30, 10), compress=False)
    with pytest.raises(UsageError, match="labels from 0 to 9"):
        open_source(f"fashion_mnist:{fashion}")


# Folders


def test_folder_with_splits(imagenet):
    train, val = open_splits(str(imagenet))
    assert (len(train), len(val)) == (7, 4)
    assert train.classes == val.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert train.describe(6) == str(imagenet / "train" / "n02" / "deep" / "x.png")
    assert train.read(6).shape == (9, 12, 3)


def test_pretraining_takes_the_root_or_a_plain_folder(imagenet):
    assert len(open_source(str(imagenet), "train")) == 7
    assert len(open_source(str(imagenet / "val"), "train")) == 4
    assert len(open_source(str(imagenet))) == 11
    flat = open_source(str(imagenet / "val" / "n01"))
    assert flat.labels is None
    assert flat.classes is None
    with pytest.raises(UsageError, match="has no folder val"):
        open_source(str(imagenet / "train"), "val")


def test_luma_of_a_folder(imagenet):
    assert open_source(str(imagenet), channels=1).read(0).shape == (9, 12, 1)


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{i:03}.png" for i in np.random.default_rng(0).permutation(50)]
    for name in names:
        picture(tmp_path / name)
    source = open_source(str(tmp_path))
    assert [Path(source.describe(i)).name for i in range(50)] == sorted(names)


def test_links_are_followed_but_not_in_circles(tmp_path, imagenet):
    linked = tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    os.symlink(imagenet / "val" / "n01", linked / "b")
    os.symlink(linked, linked / "a" / "up")
    assert len(open_source(str(linked))) == 2


def test_suffixes_in_any_case(tmp_path):
    for suffix in ("JPG", "Jpeg", "png", "WEBP", "bmp", "tif", "TIFF", "gif", "ppm"):
        picture(tmp_path / f"x.{suffix}")
    assert len(open_source(str(tmp_path))) == 9


def test_folder_mistakes(tmp_path, imagenet):
    with pytest.raises(UsageError, match='did you mean "imagenet"'):
        open_source(str(tmp_path / "imagnet"))
    with pytest.raises(UsageError, match="has no nowhere"):
        open_source(str(tmp_path / "nowhere" / "deeper"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=r"holds no image$"):
        open_source(str(empty))
    (empty / "a.npz").touch()
    (empty / "README").touch()
    with pytest.raises(UsageError, match=r"suffixes \.npz, none, known are \.jpg"):
        open_source(str(empty))
    with pytest.raises(UsageError, match='did you mean "fashion_mnist"'):
        open_source("fashionmnist")
    with pytest.raises(UsageError, match='split must be "train" or "val"'):
        open_source("fashion_mnist_sample", "test")
    with pytest.raises(UsageError, match="channels must be 1 or 3, got 4"):
        open_source("fashion_mnist_sample", channels=4)


def test_label_mistakes(imagenet):
    (imagenet / "val" / "n03").mkdir()
    with pytest.raises(UsageError, match="without an image: n03"):
        open_splits(str(imagenet))
    picture(imagenet / "val" / "n03" / "a.png")
    (imagenet / "train" / "n02").rename(imagenet / "train" / "n04")
    with pytest.raises(UsageError, match="only in train: n04; only in val: n02, n03"):
        open_splits(str(imagenet))
    picture(imagenet / "train" / "loose.png")
    with pytest.raises(UsageError, match=r"1 images lie outside of any: loose\.png"):
        open_splits(str(imagenet))
    with pytest.raises(UsageError, match="has no train and no val"):
        open_splits(str(imagenet / "val"))


# Lists


def test_list_of_paths(tmp_path):
    inside, outside = picture(tmp_path / "lists" / "a.png"), picture(tmp_path / "b c.png")
    listing = tmp_path / "lists" / "all.txt"
    listing.write_text(f"# two pictures\n\na.png\n{outside}\n")
    source = open_source(str(listing), "train")
    assert [source.describe(i) for i in range(2)] == [str(inside), str(outside)]
    assert source.read(1).shape == (9, 12, 3)
    with pytest.raises(UsageError, match="has no classes"):
        open_source(str(listing), labelled=True)


def test_list_mistakes(tmp_path):
    listing = tmp_path / "all.txt"
    listing.write_text("\n".join(f"gone{i}.png" for i in range(9)))
    with pytest.raises(UsageError, match=r"9 of the 9 files .* gone0\.png.* and 4 more"):
        open_source(str(listing))
    listing.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names no image"):
        open_source(str(listing))
    with pytest.raises(UsageError, match="is one image"):
        open_source(str(picture(tmp_path / "a.png")))


def test_fingerprint_is_that_of_the_names_below_the_folder(tmp_path, imagenet):
    first = fingerprint(open_source(str(imagenet), "train"))
    moved = tmp_path / "moved"
    imagenet.rename(moved)
    assert fingerprint(open_source(str(moved), "train")) == first
    assert len(first) == 16
    assert fingerprint(open_source(str(moved), "train", labelled=True)) != first
    picture(moved / "train" / "n01" / "new.png")
    assert fingerprint(open_source(str(moved), "train")) != first
