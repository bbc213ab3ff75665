"""ImageNet as it is downloaded: a tar of tars, a flat tar, and the devkit that says the labels."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from xdino.data.pack import pack
from xdino.data.sources import open_source, open_splits, splits_of
from xdino.errors import UsageError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, TRUTH = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt"
# Numbers of the devkit are not in the order of the synsets.
NUMBERS = {"n01440764": 3, "n01751748": 1, "n02085620": 2}
VAL_CLASSES = ["n01751748", "n02085620", "n01440764", "n01751748"]


def jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 255, (int(rng.integers(20, 40)), 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def meta() -> bytes:
    buffer = io.BytesIO()
    rows = [(number, name) for name, number in NUMBERS.items()]
    table = np.array(rows, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(buffer, {"synsets": table.reshape(-1, 1)})
    return buffer.getvalue()


@pytest.fixture
def downloaded(tmp_path):
    """(folder with the three files, the same images as a folder of folders)."""
    rng = np.random.default_rng(0)
    root, loose = tmp_path / "downloaded", tmp_path / "extracted"
    root.mkdir()
    inner = {}
    for name in NUMBERS:
        images = {f"{name}_{i}.JPEG": jpeg(rng) for i in range(3)}
        inner[f"{name}.tar"] = tarred(images)
        for file, data in images.items():
            (loose / "train" / name).mkdir(parents=True, exist_ok=True)
            (loose / "train" / name / file).write_bytes(data)
    (root / TRAIN).write_bytes(tarred(inner))
    val = {f"ILSVRC2012_val_{i + 1:08}.JPEG": jpeg(rng) for i in range(4)}
    backwards = dict(reversed(val.items()))  # labels go by the names, not by the tar's order
    (root / VAL).write_bytes(tarred(backwards))
    for (file, data), name in zip(val.items(), VAL_CLASSES, strict=True):
        (loose / "val" / name).mkdir(parents=True, exist_ok=True)
        (loose / "val" / name / file).write_bytes(data)
    devkit = {
        f"{DEVKIT}/data/{TRUTH}": "".join(f"{NUMBERS[n]}\n" for n in VAL_CLASSES).encode(),
        f"{DEVKIT}/data/meta.mat": meta(),
    }
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        for name, data in devkit.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return root, loose


def content(source) -> dict[tuple[str, str], bytes]:
    return {
        (source.classes[source.labels[i]], os.path.basename(source.member(i).decode())): (
            source.encoded(i)
        )
        for i in range(len(source))
    }


def test_what_is_downloaded_is_the_folder_of_folders(downloaded):
    root, loose = downloaded
    assert splits_of(str(root)) == ("train", "val")
    ours, theirs = open_splits(str(root)), open_splits(str(loose))
    for tar, folder in zip(ours, theirs, strict=True):
        assert tar.classes == folder.classes == tuple(sorted(NUMBERS))
        assert content(tar) == content(folder)
    train = open_source(str(root), "train")
    assert [train.member(i) for i in (0, 8)] == [
        b"n01440764/n01440764_0.JPEG",
        b"n02085620/n02085620_2.JPEG",
    ]
    assert train.describe(0).endswith(f"{TRAIN}: n01440764/n01440764_0.JPEG")
    assert ours[1].notices() == [f"labels of {root} are those of {root / DEVKIT}.tar.gz"]
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) == sorted(
        [TRAIN, VAL, f"{DEVKIT}.tar.gz"]
    )


def test_it_packs(downloaded, tmp_path):
    root, _ = downloaded
    pack(str(root), tmp_path / "packed.tar")
    for ours, theirs in zip(
        open_splits(str(tmp_path / "packed.tar")), open_splits(str(root)), strict=True
    ):
        assert content(ours).keys() == {
            (name, file.replace("JPEG", "jpeg")) for name, file in content(theirs)
        }
        assert (ours.labels == theirs.labels).all()


def named(classes: list[str], suffix: str, between: str) -> str:
    return "".join(
        f"ILSVRC2012_val_{i + 1:08}{suffix}{between}{name}\n" for i, name in enumerate(classes)
    )


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("val.txt", named(VAL_CLASSES, ".JPEG", " ")),
        ("val.txt", "\n".join(["# by hand", *VAL_CLASSES])),
        ("imagenet_2012_validation_synset_labels.txt", "\r\n".join(VAL_CLASSES)),
        ("LOC_val_solution.csv", "ImageId,PredictionString\n"
         + named([f"{n} 1 2 30 40 {n} 5 6 7 8" for n in VAL_CLASSES], "", ",")),
    ],
)  # fmt: skip
def test_labels_are_taken_from_a_text(downloaded, file, text):
    root, loose = downloaded
    (root / f"{DEVKIT}.tar.gz").unlink()
    (root / file).write_text(text)
    val = open_splits(str(root))[1]
    assert content(val) == content(open_splits(str(loose))[1])
    assert val.notices() == [f"labels of {root} are those of {root / file}"]


def test_an_unpacked_devkit(downloaded):
    root, loose = downloaded
    with tarfile.open(root / f"{DEVKIT}.tar.gz") as tar:
        tar.extractall(root, filter="data")
    (root / f"{DEVKIT}.tar.gz").unlink()
    assert content(open_splits(str(root))[1]) == content(open_splits(str(loose))[1])


def test_mistakes_about_labels_are_sentences(downloaded):
    root, _ = downloaded
    devkit = root / f"{DEVKIT}.tar.gz"
    whole = devkit.read_bytes()
    devkit.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"is damaged .*; copy it again|holds no"):
        open_splits(str(root))
    devkit.unlink()
    with pytest.raises(UsageError, match=r"4 images lie outside.*devkit.*NAME CLASS"):
        open_splits(str(root))
    assert len(open_source(str(root), "train")) == 9  # pretraining needs none
    (root / TRUTH).write_text("1\n2\n3\n1\n")
    with pytest.raises(UsageError, match=r"holds no meta\.mat; ImageNet's devkit has both"):
        open_splits(str(root))
    (root / "meta.mat").write_bytes(b"no matlab")
    with pytest.raises(UsageError, match="do not match"):
        open_splits(str(root))
    (root / "meta.mat").write_bytes(meta())
    (root / TRUTH).write_text("1\n2\n")
    with pytest.raises(UsageError, match="has 2 labels, but there are 4 images"):
        open_splits(str(root))
    (root / TRUTH).unlink()
    (root / "val.txt").write_text(named(VAL_CLASSES[:3], ".JPEG", "\t"))
    with pytest.raises(UsageError, match=r"no class of ILSVRC2012_val_00000004\.JPEG; expected"):
        open_splits(str(root))
    (root / "val.txt").write_text("")
    with pytest.raises(UsageError, match="has 0 labels, but there are 4"):
        open_splits(str(root))


def inside(tmp_path: Path, name: str, data: bytes) -> str:
    path = tmp_path / "outer.tar"
    rng = np.random.default_rng(1)
    path.write_bytes(tarred({"a.tar": tarred({"x.jpg": jpeg(rng)}), name: data, "c.txt": b"end"}))
    return str(path)


def test_damage_inside_is_never_a_smaller_data_set(tmp_path):
    good = tarred({f"{i}.jpg": jpeg(np.random.default_rng(i)) for i in range(3)})
    assert len(open_source(inside(tmp_path, "b.tar", good))) == 4
    for cut in (600, 1_024, 2_048):
        with pytest.raises(UsageError, match=r"its member b\.tar.*(damaged|no tar)"):
            open_source(inside(tmp_path, "b.tar", good[:cut]))
    with pytest.raises(UsageError, match=r"its member b\.tar is compressed"):
        open_source(inside(tmp_path, "b.tar", b"\x1f\x8b" + bytes(600)))
    with pytest.raises(UsageError, match=r"its member b\.tar.*(damaged|no tar)"):
        open_source(inside(tmp_path, "b.tar", b"x" * 2_000))


def test_a_tar_in_a_tar_in_a_tar_is_left_out_and_said(tmp_path):
    deep = tarred({"deeper.tar": tarred({"x.jpg": b"1" * 600}), "y.jpg": b"2"})
    source = open_source(inside(tmp_path, "b.tar", deep))
    assert [source.member(i) for i in range(len(source))] == [b"a/x.jpg", b"b/y.jpg"]
    assert source.left_out == {".tar": 1, ".txt": 1}


def test_odd_names_inside(tmp_path):
    path = tmp_path / "o.tar"
    inner = tarred({"./x.jpg": b"1", "._x.jpg": b"no"})
    path.write_bytes(tarred({"./sub/dogs.TAR": inner, "._dogs.tar": inner, "cats.tar": tarred({})}))
    source = open_source(str(path))
    assert [source.member(i) for i in range(len(source))] == [b"sub/dogs/x.jpg"]
