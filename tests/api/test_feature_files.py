"""Features on disk in four formats, of data of every form, from the command line and from Python."""

import csv
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import xdino as api
import xdino_eval
from xdino_eval.extraction import Options
from xdino_eval.feature_files import formats, rows

FORMATS = ("parquet", "npz", "csv", "safetensors")


def told(path: Path, prefix: str = "") -> list[tuple[str, str, int]]:
    """(name, class, label) of each row of a file; features are compared in `features`."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        found = parquet.read_table(path).to_pylist()
        split = prefix.removesuffix("_") or None
        return [
            (row["path"], row["class_name"] or "", -1 if row["label"] is None else row["label"])
            for row in found
            if split is None or row["split"] == split
        ]
    if path.suffix == ".csv":
        split = prefix.removesuffix("_")
        return [
            (row["path"], row["class_name"], int(row["label"] or -1))
            for row in csv.DictReader(path.open(newline="", encoding="utf-8"))
            if not split or row["split"] == split
        ]
    if path.suffix == ".npz":
        found = np.load(path, allow_pickle=False)
        columns = (found[prefix + name].tolist() for name in ("names", "class_names", "labels"))
        return list(zip(*columns, strict=True))
    with safetensors.safe_open(path, framework="pt") as file:
        about, labels = file.metadata(), file.get_tensor(f"{prefix}labels").tolist()
    classes = [*json.loads(about["classes"]), ""]
    names = json.loads(about[f"{prefix}names"])
    return [(name, classes[label], label) for name, label in zip(names, labels, strict=True)]


def features(path: Path, prefix: str = "") -> torch.Tensor:
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        split = prefix.removesuffix("_")
        kept = [not split or s == split for s in table["split"].to_pylist()]
        return torch.tensor(table["feature"].to_pylist())[torch.tensor(kept)]
    if path.suffix == ".csv":
        split = prefix.removesuffix("_")
        found = list(csv.DictReader(path.open(newline="", encoding="utf-8")))
        return torch.tensor([
            [float(value) for name, value in row.items() if name.startswith("feature_")]
            for row in found if not split or row["split"] == split
        ])  # fmt: skip
    if path.suffix == ".npz":
        return torch.from_numpy(np.load(path)[f"{prefix}features"])
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(f"{prefix}features")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_flat_folder_with_a_space_in_its_name(xdino, run, photos, tmp_path, suffix):
    out = tmp_path / "a folder" / f"features.{suffix}"
    code, printed, err = xdino("features", run, "--data", photos, "--out", out)
    assert (code, printed.strip()) == (0, str(out)), err
    assert "features without labels" in err
    names = ["0.png", "1.png", "2.png", "grey one.png"]
    assert told(out) == [(name, "", -1) for name in names]
    assert torch.equal(features(out), embedded(run, photos))
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing half-written"


def embedded(run, data) -> torch.Tensor:
    return api.load(run).embed(data)


@pytest.mark.parametrize("suffix", FORMATS)
def test_both_splits_and_one(xdino, run, classes, tmp_path, suffix):
    out = tmp_path / f"both.{suffix}"
    code, _, err = xdino("features", run, "--data", classes, "--out", out)
    assert (code, err) == (0, "")
    wanted = [
        (f"train/{name}/{number}.png", name, label)
        for label, name in enumerate(("cat", "dog"))
        for number in range(3)
    ]
    assert told(out, "train_") == wanted
    assert len(told(out, "val_")) == 4
    for split in ("train", "val"):
        expected = embedded(run, classes / split)
        assert torch.equal(features(out, f"{split}_"), expected)
    for split in ("val", "train"):
        alone = tmp_path / f"{split}.{suffix}"
        code, _, err = xdino("features", run, "--data", classes, "--out", alone, "--split", split)
        assert (code, err) == (0, "")
        assert told(alone) == told(out, f"{split}_")
        assert torch.equal(features(alone), features(out, f"{split}_"))


def test_a_list_a_tar_a_name_and_class_folders(xdino, run, make_run, photos, classes, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos}/1.png\n{photos}/grey one.png\n")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(classes, ".")
    grey = make_run(tmp_path / "grey", channels=1)
    for data, weights, wanted in (
        (listed, run, [(f"{photos}/1.png", "", -1), (f"{photos}/grey one.png", "", -1)]),
        (classes / "val", run, [("cat/0.png", "cat", 0), ("cat/1.png", "cat", 0)]),
        (tmp_path / "images.tar", run, [("train/cat/0.png", "cat", 0), ("train/cat/1.png", "cat", 0)]),
        ("fashion_mnist_sample", grey, None),
    ):  # fmt: skip
        out = tmp_path / "one.npz"
        split = ("--split", "val") if wanted is None else ()
        code, _, err = xdino("features", weights, "--data", data, "--out", out, *split)
        assert code == 0, err
        if wanted is None:
            found = np.load(out)
            assert found["features"].shape == (2_000, 16)
            assert found["labels"].shape == (2_000,)
            assert found["class_names"][0] in ("Ankle boot", "Bag", "Coat", "Dress", "Pullover",
                "Sandal", "Shirt", "Sneaker", "T-shirt/top", "Trouser")  # fmt: skip
        else:
            prefix = "train_" if str(data).endswith(".tar") else ""
            assert told(out, prefix)[:2] == wanted, data


@pytest.mark.parametrize("suffix", ["parquet", "npz", "safetensors"])
def test_patch_features(xdino, run, photos, tmp_path, suffix):
    out = tmp_path / f"f.{suffix}"
    code, _, err = xdino("features", run, "--data", photos, "--out", out, "--patches")
    assert code == 0, err
    expected = api.load(run).embed(photos, patches=True)[1]
    assert expected.shape == (4, 4, 4, 16)
    if suffix == "npz":
        found = torch.from_numpy(np.load(out)["patches"])
    elif suffix == "safetensors":
        with safetensors.safe_open(out, framework="pt") as file:
            found = file.get_tensor("patches")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(out)
        shape = json.loads(table.schema.metadata[b"patches"])
        found = torch.tensor(table["patches"].to_pylist()).reshape(-1, *shape)
    torch.testing.assert_close(found, expected)


def test_an_image_that_cannot_be_read_is_left_out_and_named(xdino, run, tmp_path, paint):
    for number in range(3):
        paint(tmp_path / "data" / f"{number}.png", number)
    (tmp_path / "data" / "1.png").write_bytes(b"no image")
    for suffix in FORMATS:
        out = tmp_path / f"f.{suffix}"
        code, _, err = xdino("features", run, "--data", tmp_path / "data", "--out", out)
        assert code == 0
        assert "skipped" in err
        assert "1.png" in err
        assert [name for name, *_ in told(out)] == ["0.png", "2.png"]
    for number in (0, 2):
        (tmp_path / "data" / f"{number}.png").write_bytes(b"no image")
    code, printed, err = xdino(
        "features", run, "--data", tmp_path / "data", "--out", tmp_path / "none.csv"
    )
    assert (code, printed) == (1, "")
    assert "no image of" in err
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x.pt"), "written as .parquet, .npz, .csv or .safetensors, and x.pt"),
        (("--out", "x.csv", "--patches"), "CSV has no place for patch features"),
        (("--out", "x.npz", "--split", "val"), "has no folder val"),
        (("--out", "x.npz", "--split", "both"), "has no folder val"),
        (("--out", "x.npz", "--split", "test"), "'test' is not one of"),
    ],
)
def test_what_cannot_be_written_is_a_sentence(
    xdino, run, photos, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = xdino("features", run, "--data", photos, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_classes_that_differ_between_the_splits_are_refused(xdino, run, tmp_path, paint):
    for name in ("train/cat", "train/dog", "val/cat", "val/cow"):
        paint(tmp_path / "data" / name / "0.png", 0)
    code, _, err = xdino("features", run, "--data", tmp_path / "data", "--out", tmp_path / "f.csv")
    assert code == 2
    assert "differ between train and val" in err


def test_parquet_without_pyarrow_names_the_extra(xdino, run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    code, _, err = xdino("features", run, "--data", photos, "--out", tmp_path / "f.parquet")
    assert code == 2
    assert "pip install 'xdino[parquet]', or write .npz" in err


def test_parquet_comes_in_row_groups_and_says_whose_features(run, photos, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(formats, "ROW_GROUP", 100)
    model = api.load(run)
    out = tmp_path / "f.parquet"
    assert xdino_eval.save_features(model, photos, out, options=Options(batch_size=3)) == out
    file = parquet.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 1]
    about = file.schema_arrow.metadata
    assert about[b"checkpoint"].decode() == model.origin.sha256
    assert about[b"features"] == b"teacher, iteration 7"
    assert b"centre crop 32" in about[b"transform"]
    assert file.schema_arrow.field("feature").type.list_size == 16


def test_the_cache_gives_the_same_rows(xdino, run, classes, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "PIECE", 4)
    plain, kept = tmp_path / "plain.npz", tmp_path / "kept.npz"
    xdino("features", run, "--data", classes, "--out", plain)
    for _ in range(2):
        code, _, err = xdino(
            "features", run, "--data", classes, "--out", kept, "--cache", tmp_path / "cache"
        )
        assert code == 0, err
        assert told(kept, "train_") == told(plain, "train_")
        assert torch.equal(features(kept, "train_"), features(plain, "train_"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_names_that_are_no_unicode_are_written_anyway(xdino, run, tmp_path, paint):
    data = tmp_path / "data"
    good = paint(data / "a.png", 0)
    odd = bytes(data) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(good.read_bytes())
    for suffix in FORMATS:
        code, _, err = xdino("features", run, "--data", data, "--out", tmp_path / f"f.{suffix}")
        assert code == 0, err
        assert [name for name, *_ in told(tmp_path / f"f.{suffix}")] == ["a.png", r"caf\xe9.png"]


def test_knn_on_arrays(run, classes):
    model = api.load(run)
    bank, queries = model.embed(classes / "train"), model.embed(classes / "val")
    labels, answers = ["cat"] * 3 + ["dog"] * 3, ["cat"] * 2 + ["dog"] * 2
    named = xdino_eval.knn(bank, labels, queries, answers, k=(1, 3))
    numbered = xdino_eval.knn(bank.numpy(), np.arange(6) // 3, queries * 5, [0, 0, 1, 1], k=[1, 3])
    assert named == numbered, "names or numbers, and only directions count"
    assert named.keys() == {1, 3}
    assert all(0 <= top1 <= top5 <= 100 for top1, top5 in named.values())
    unknown = xdino_eval.knn(bank, labels, queries, ["cow"] * 4, k=1)
    assert unknown == {1: (0.0, 0.0)}
    with pytest.raises(ValueError, match="one an image"):
        xdino_eval.knn(bank, [labels], queries, answers)
    with pytest.raises(ValueError, match="6 training features, but labels of shape"):
        xdino_eval.knn(bank, labels[:-1], queries, answers)
    with pytest.raises(ValueError, match="training features have 16 numbers, test features 3"):
        xdino_eval.knn(bank, labels, torch.ones(4, 3), answers)
