"""Data sets of transfer in their real layouts, made small; and each way in which they can be wrong."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from xdino.data import fingerprint
from xdino.errors import RunFailed, UsageError
from xdino_transfer.datasets import few, few_of_each, open_labelled, open_scored

RNG = np.random.default_rng(0)
TEN = [f"kind{i}" for i in range(10)]


def pixels(count: int) -> np.ndarray:
    """uint8 [N, 3, 32, 32]"""
    return RNG.integers(0, 256, (count, 3, 32, 32), np.uint8)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).save(path)


@pytest.fixture
def cifar10(tmp_path) -> tuple[Path, np.ndarray]:
    """The binary archive with 20 images a batch, and the first batch's pixels."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    batches = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batches[name] = pixels(20)
        labels = np.arange(20, dtype=np.uint8) % 10
        records = np.concatenate([labels[:, None], batches[name].reshape(20, -1)], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder, batches["data_batch_1"]


def old_pickle(path: Path, value: object) -> None:
    """As Python 2 and numpy 1 wrote the archives."""
    data = pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")
    path.write_bytes(data)


@pytest.fixture
def cifar100(tmp_path) -> Path:
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    old_pickle(folder / "meta", {"fine_label_names": [f"fine{i}" for i in range(100)]})
    for name, count in (("train", 200), ("test", 30)):
        labels = [i % 100 for i in range(count)]
        data = pixels(count).reshape(count, -1)
        old_pickle(folder / name, {"data": data, "fine_labels": labels, "coarse_labels": labels})
    return folder.parent


@pytest.fixture
def flowers(tmp_path) -> Path:
    folder = tmp_path / "flowers"
    for number in range(1, 251):
        picture(folder / "jpg" / f"image_{number:05}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(250) % 102 + 1})
    sets = {"trnid": np.arange(1, 103), "valid": np.arange(103, 205), "tstid": np.arange(205, 251)}
    scipy.io.savemat(folder / "setid.mat", sets)
    return folder


@pytest.fixture
def cars(tmp_path) -> Path:
    folder = tmp_path / "cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer", "Acura RL", "Audi S4"], object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, file in (
        ("train", "devkit/cars_train_annos"),
        ("test", "cars_test_annos_withlabels"),
    ):
        entries = np.zeros(6, [("bbox_x1", object), ("class", object), ("fname", object)])
        for i in range(6):
            entries[i] = (1, i % 3 + 1, f"{i + 1:05}.jpg")
            picture(folder / f"cars_{part}" / f"{i + 1:05}.jpg")
        scipy.io.savemat(folder / f"{file}.mat", {"annotations": entries})
    return folder


@pytest.fixture
def inat(tmp_path) -> Path:
    """Species 0, 1, 2; train names 2 first."""
    folder = tmp_path / "inat"
    species = [
        {"id": i, "name": f"species{i}", "family": "ab"[i % 2], "supercategory": "Aves"}
        for i in range(3)
    ]
    folder.mkdir()
    (folder / "categories.json").write_text(json.dumps(species))
    for split, order in (("train", (2, 0, 1, 2)), ("val", (0, 2))):
        images = [
            {"id": 10 + i, "file_name": f"train_val2018/Aves/{c}/{split}{i}.jpg"}
            for i, c in enumerate(order)
        ]
        notes = [{"image_id": 10 + i, "category_id": c} for i, c in enumerate(order)]
        (folder / f"{split}2018.json").write_text(
            json.dumps({"images": images, "annotations": notes})
        )
        for image in images:
            picture(folder / image["file_name"])
    return folder


@pytest.fixture
def halves(tmp_path) -> Path:
    for part in ("train", "test"):
        for name in ("2", "10", "train"):
            picture(tmp_path / "halves" / part / name / "a.png")
    return tmp_path / "halves"


# Right layouts


def test_cifar_binary(cifar10):
    folder, first = cifar10
    train, val = open_labelled(str(folder))
    assert (len(train), len(val), train.channels) == (100, 20, 3)
    assert train.classes == val.classes == tuple(TEN)
    np.testing.assert_array_equal(train.read(7), first[7].transpose(1, 2, 0))
    assert train.labels[:12].tolist() == [*range(10), 0, 1]
    assert train.describe(7) == f"train image 7 of {folder}"
    assert train.member(3) == b"kind3/00003.png"
    assert fingerprint(train) != fingerprint(val)
    grey, _ = open_labelled(str(folder.parent), channels=1)
    luma = np.asarray(Image.fromarray(train.read(7)).convert("L"))
    np.testing.assert_array_equal(grey.read(7)[..., 0], luma)


def test_cifar_binary_100_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)))
    for name in ("train", "test"):
        fine = np.arange(100, dtype=np.uint8)[:, None]
        records = np.concatenate([fine // 5, fine, pixels(100).reshape(100, -1)], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    train, _ = open_labelled(str(folder))
    assert train.labels.tolist() == list(range(100))
    assert train.classes[99] == "fine99"


def test_cifar_pickled(cifar100):
    train, val = open_labelled(str(cifar100))
    assert (len(train), len(val), train.read(0).shape) == (200, 30, (32, 32, 3))
    assert train.labels[150] == 50
    assert train.classes[50] == "fine50"


def test_the_pickled_and_the_binary_archive_are_one(cifar10, tmp_path):
    folder, _ = cifar10
    other = tmp_path / "cifar-10-batches-py"
    other.mkdir()
    old_pickle(other / "batches.meta", {b"label_names": TEN})
    for path in folder.glob("*.bin"):
        rows = np.fromfile(path, np.uint8).reshape(20, -1)
        old_pickle(other / path.stem, {"data": rows[:, 1:], "labels": rows[:, 0].tolist()})
    assert [fingerprint(s) for s in open_labelled(str(folder))] == [
        fingerprint(s) for s in open_labelled(str(other))
    ]


def test_flowers(flowers):
    train, val = open_labelled(str(flowers))
    assert (len(train), len(val), len(train.classes)) == (204, 46, 102)
    assert val.describe(0).endswith("jpg/image_00205.jpg")
    assert (val.labels[0], val.classes[val.labels[0]]) == (0, "1")
    assert train.read(0).shape == (9, 12, 3)


def test_cars(cars):
    train, val = open_labelled(str(cars))
    assert train.classes == val.classes == ("AM General Hummer", "Acura RL", "Audi S4")
    assert train.labels.tolist() == val.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert val.describe(4).endswith("cars_test/00005.jpg")
    assert val.read(4).shape == (9, 12, 3)


def test_inaturalist_is_numbered_as_train_names_it(inat):
    train, val = open_labelled(str(inat))
    assert train.classes == val.classes == ("species2", "species0", "species1")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 2, 0], [1, 0])
    families, _ = open_labelled(str(inat), category="family")
    assert (families.classes, families.labels.tolist()) == (("a", "b"), [0, 0, 1, 0])
    assert train.read(0).shape == (9, 12, 3)


def test_inaturalist_as_the_published_loader_wants_it(inat):
    for path in [*(inat / "train_val2018" / "Aves").iterdir()]:
        path.rename(inat / "train_val2018" / path.name)
    train, _ = open_labelled(str(inat))
    assert train.describe(0).endswith("train_val2018/2/train0.jpg")
    assert train.labels.tolist() == [0, 1, 2, 0]


def test_train_and_test(halves):
    train, val = open_labelled(str(halves))
    assert train.classes == val.classes == ("10", "2", "train")
    assert val.describe(0) == str(halves / "test" / "10" / "a.png")


def test_what_pretraining_opens_opens_too(halves):
    (halves / "test").rename(halves / "val")
    assert [len(source) for source in open_labelled(str(halves))] == [3, 3]


# Parts


def test_few_of_every_class(cifar10):
    train, _ = open_labelled(str(cifar10[0]))
    part = few(train, 0.25, seed=3)
    assert np.bincount(part.labels).tolist() == [3] * 10
    assert (part.classes, part.name) == (train.classes, f"{train.name} (25 %)")
    where = [train.describe(i) for i in range(100)]
    chosen = [where.index(part.describe(i)) for i in range(len(part))]
    assert chosen == sorted(chosen)
    for i, index in enumerate(chosen):
        np.testing.assert_array_equal(part.read(i), train.read(index))
        assert part.labels[i] == train.labels[index]
    larger = few(train, 0.5, seed=3)
    assert {part.describe(i) for i in range(30)} < {larger.describe(i) for i in range(50)}
    assert len({fingerprint(s) for s in (part, larger, train, few(train, 0.25, 4))}) == 4
    assert fingerprint(part) == fingerprint(few(train, 0.25, seed=3))
    assert few(train, 1, 0) is train
    assert np.bincount(few(train, 0.001, 0).labels).tolist() == [1] * 10
    assert np.bincount(few_of_each(train, 4, 0).labels).tolist() == [4] * 10
    assert len(few_of_each(train, 1000, 0)) == 100
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            few(train, wrong, 0)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        few_of_each(train, 0, 0)


# Wrong ones


def refused(data: Path, sentence: str, **options: object) -> None:
    with pytest.raises(UsageError, match=sentence):
        open_labelled(str(data), **options)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "data_batch_4.bin").unlink(), r"CIFAR-10 is not whole: .*data_batch_4\.bin"),
        (lambda f: (f / "test_batch.bin").rename(f / "test_batc.bin"), 'did you mean "test_batc'),
        (lambda f: (f / "batches.meta.txt").unlink(), r"batches\.meta\.txt does not exist"),
        (lambda f: (f / "batches.meta.txt").write_text("a b"), "names 2 classes, and CIFAR-10 has 10"),
        (
            lambda f: (f / "test_batch.bin").write_bytes(b"\0" * 3072),
            "truncated or no CIFAR-10: 3,072 bytes are no whole records of 3,073",
        ),
        (lambda f: (f / "test_batch.bin").write_bytes(b""), "0 bytes are no whole records"),
        (
            lambda f: (f / "test_batch.bin").write_bytes(b"\x0a" + b"\0" * 3072),
            "1 labels outside of 0 to 9, the first 10",
        ),
        (
            lambda f: [p.write_bytes(b"\1" + b"\0" * 3072) for p in f.glob("data_*.bin")],
            "classes without an image: kind0, kind2, kind3, kind4, kind5 and 4 more",
        ),
    ],
)  # fmt: skip
def test_wrong_binary_archives(cifar10, spoil, sentence):
    folder, _ = cifar10
    spoil(folder)
    refused(folder, sentence)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({"data": np.zeros((3, 3072), np.uint8)}, "it has no fine_labels"),
        ({}, "it has no data and no fine_labels"),
        ([1, 2], "it holds a list"),
        ({"data": np.zeros((3, 3071), np.uint8), "fine_labels": [0, 1, 2]}, "expected rows of 3,072"),
        ({"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0, 1]}, "with one label each"),
        ({"data": "text", "fine_labels": [0, 1]}, "its values are no numbers"),
        ({"data": [[300] * 3072], "fine_labels": [0]}, "its values are no numbers"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [-1]}, "outside of 0 to 99"),
    ],
)  # fmt: skip
def test_wrong_pickled_archives(cifar100, batch, sentence):
    old_pickle(cifar100 / "cifar-100-python" / "test", batch)
    refused(cifar100, sentence)


def test_a_pickle_that_asks_for_more_runs_nothing(cifar100, tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return open, (str(tmp_path / "ran"), "w")

    (cifar100 / "cifar-100-python" / "test").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(RunFailed, match="nothing of it ran"):
        open_labelled(str(cifar100))
    assert not (tmp_path / "ran").exists()


def test_wrong_flowers(flowers):
    (flowers / "jpg" / "image_00007.jpg").unlink()
    refused(flowers, r"1 of the 204 images of the train split of .*jpg/image_00007\.jpg")
    (flowers / "setid.mat").write_bytes(b"not MATLAB")
    refused(flowers, r"setid\.mat is damaged or no MATLAB file")
    scipy.io.savemat(flowers / "setid.mat", {"trnid": [1], "valid": [251], "tstid": [2]})
    refused(flowers, "numbers images up to 251, and .* has labels for 250")
    scipy.io.savemat(flowers / "setid.mat", {"trnid": [1], "valid": [2]})
    refused(flowers, "has classes without an image: 3, 4")
    scipy.io.savemat(flowers / "imagelabels.mat", {"labels": np.full(250, 103)})
    refused(flowers, "labels outside of 0 to 101, the first 102")
    scipy.io.savemat(flowers / "imagelabels.mat", {"labels": np.full(250, 0.5)})
    refused(flowers, "holds no whole numbers in labels")
    scipy.io.savemat(flowers / "imagelabels.mat", {"other": 1})
    refused(flowers, "holds no labels")
    (flowers / "imagelabels.mat").unlink()
    refused(flowers, r"Flowers-102 is not whole: .*imagelabels\.mat does not exist")


def test_wrong_cars(cars):
    (cars / "cars_test" / "00002.jpg").unlink()
    refused(cars, r"1 of the 6 images of the val split")
    (cars / "cars_test_annos_withlabels.mat").unlink()
    refused(cars, r"cars_test_annos_withlabels\.mat does not exist")
    kit = cars / "devkit"
    scipy.io.savemat(kit / "cars_meta.mat", {"class_names": np.array(["a", "b"], object)})
    refused(cars, "2 labels outside of 0 to 1, the first 2")
    scipy.io.savemat(kit / "cars_train_annos.mat", {"annotations": np.arange(3)})
    refused(cars, "no fname and class for every image")
    (kit / "cars_meta.mat").unlink()
    refused(cars, r"cars_meta\.mat does not exist")


def test_wrong_inaturalist(inat):
    refused(inat, 'data.category "familly" is not in .*did you mean "family"', category="familly")
    (inat / "train_val2018" / "Aves" / "0" / "val0.jpg").unlink()
    refused(inat, r"1 of the 2 images of the val split")
    (inat / "val2018.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    refused(inat, "its images lack id or file_name")
    image = {"id": 1, "file_name": "a/b.jpg"}
    (inat / "val2018.json").write_text(json.dumps({"images": [image], "annotations": []}))
    refused(inat, "has no annotation for 'a/b.jpg'")
    (inat / "val2018.json").write_text('{"images": [], "annotations": []}')
    refused(inat, "the val split of .* holds no image")
    (inat / "val2018.json").write_text("{")
    refused(inat, "is damaged: it is no JSON")
    (inat / "val2018.json").unlink()
    refused(inat, r"iNaturalist is not whole: .*val2018\.json")
    (inat / "categories.json").unlink()
    refused(inat, r"categories\.json does not exist, or lists no categories")
    (inat / "train2019.json").write_text("{}")
    refused(inat, "holds several years of iNaturalist: 2018, 2019")


def test_wrong_halves(halves):
    (halves / "test" / "10").rename(halves / "test" / "11")
    refused(halves, "differ between train and val; only in train: 10; only in val: 11")
    (halves / "test" / "12").mkdir()
    refused(halves, "class folders without an image: 12")


def test_one_class_is_none(tmp_path):
    for part in ("train", "test"):
        picture(tmp_path / part / "only" / "a.png")
    refused(tmp_path, "has 1 class, and telling classes apart needs two")
    refused(tmp_path / "nowhere", "does not exist")


def test_what_is_scored_on_may_be_all_that_there_is(tmp_path, halves, cifar10):
    assert [len(open_scored(str(halves), split)[0]) for split in ("train", "val")] == [
        len(source) for source in open_labelled(str(halves))
    ]
    source, train_size = open_scored(str(cifar10[0]))
    assert (len(source), train_size) == (20, 100)
    for name in ("cat", "dog"):
        for i in range(3):
            picture(tmp_path / "flat" / name / f"{i}.png")
            picture(tmp_path / "only_val" / "val" / name / f"{i}.png")
            picture(tmp_path / "only_test" / "test" / name / f"{i}.png")
            picture(tmp_path / "only_train" / "train" / name / f"{i}.png")
    for folder in ("flat", "only_val", "only_test"):
        source, train_size = open_scored(str(tmp_path / folder))
        assert (len(source), source.classes, train_size) == (6, ("cat", "dog"), 0), folder
    source, _ = open_scored(str(tmp_path / "only_train"), "train")
    assert len(source) == 6
    with pytest.raises(UsageError, match="it has no val"):
        open_scored(str(tmp_path / "only_train"))
    picture(tmp_path / "flat" / "test" / "0.png")  # a class of that name
    assert open_scored(str(tmp_path / "flat"))[0].classes == ("cat", "dog", "test")
    assert len(open_scored("fashion_mnist_sample")[0]) == 2_000
