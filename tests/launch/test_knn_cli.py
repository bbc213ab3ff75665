"""`xdino knn` as a person meets it: its protocols, its refusals, and two processes for one."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_launch.cli import xdino

WORKER = Path(__file__).with_name("knn_worker.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    spec = BackboneSpec("xcit_nano_12_p8", shape=shape, input_size=16, resize=16)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    checkpoint.save_backbone(path, spec.build().eval(), spec)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three kinds of noise, 70 images to vote, 14 to judge; two and one cannot be read."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 70), ("val", 14)):
        for number in range(count):
            path = root / split / "abc"[number % 3] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 200, (16, 16, 3))
            pixels[..., number % 3] += 25
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    for broken in ("train/a/000.png", "train/c/068.png", "val/b/004.png"):
        (root / broken).write_bytes(b"no image")
    return root


def invoked(*arguments: str) -> str:
    """What a command printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(xdino, arguments, catch_exceptions=False).stdout


def knn(weights: Path, folder: Path, *options: str) -> list[dict]:
    judged = [str(weights), "--data", str(folder)]
    return json.loads(invoked("knn", *judged, "--json", "--batch-size", "16", *options))


def timeless(rows: list[dict]) -> list[dict]:
    return [row | {"seconds": 0} for row in rows]


def test_a_grid_in_one_table(weights, folder):
    rows = knn(weights, folder, "--k", "1,9", "--temperature", "0.04,0.07")
    assert [row["settings"] for row in rows] == [
        {"k": k, "temperature": T} for k in (1, 9) for T in (0.04, 0.07)
    ]
    for row in rows:
        assert (row["train_size"], row["val_size"]) == (68, 13)
        assert len(row["notes"]) == 2
        assert row["notes"][0].startswith("2 images of")


def test_every_search_and_block_gives_one_answer(weights, folder, tmp_path):
    plain = timeless(knn(weights, folder, "--k", "1,9"))
    for options in (
        ("--search", "torch"),
        ("--bank-block", "10"),
        ("--bank-block", "20", "--cache", str(tmp_path / "cache"), "--search", "torch"),
        ("--bank-block", "20", "--cache", str(tmp_path / "cache")),
    ):
        assert timeless(knn(weights, folder, "--k", "1,9", *options)) == plain, options
    assert len(list((tmp_path / "cache").iterdir())) == 3 + 1, "pieces of 32 images"


def test_leave_one_out_takes_one_folder(weights, folder):
    for data in (folder, folder / "train"):
        (row,) = knn(weights, data, "--k", "5", "--leave-one-out")
        assert row["protocol"] == "k-NN, leave-one-out"
        assert (row["train_size"], row["val_size"], len(row["notes"])) == (68, 68, 1)


def test_few_shot_rows_have_mean_and_spread(weights, folder):
    rows = knn(weights, folder, "--k", "3", "--shots", "1,5", "--repeats", "3", "--seed", "7")
    assert [(row["settings"]["shots"], row["train_size"]) for row in rows] == [(1, 3), (5, 15)]
    assert rows[1]["settings"]["repeats"] == 3
    assert rows[1]["settings"]["top1_std"] >= 0
    assert "mean of 3 draws" in rows[1]["notes"][-1]


def test_an_index_says_what_it_found(weights, folder):
    (row,) = knn(weights, folder, "--k", "5", "--search", "hnsw")
    assert row["settings"]["search"] == "hnsw"
    assert 0 < row["settings"]["recall"] <= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--search", "fiass"), 'there is no search "fiass": did you mean "faiss"'),
        (("--search", "integers"), "choose one of auto, faiss, torch, ivf, hnsw"),
        (("--bank-block", "0"), "1 row or more, got 0"),
        (("--temperature", "0.1,-1"), "--temperature must be above 0"),
        (("--temperature", "warm"), "--temperature takes numbers"),
        (("--shots", "0"), "--shots takes numbers of images from 1 up"),
        (("--shots", "1", "--leave-one-out"), "not with --leave-one-out"),
        (("--shots", "24"), r"24 shots need 24 images of every class, .* fewer of a \(23\), b"),
    ],
)
def test_refusals(weights, folder, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        knn(weights, folder, *options)


def test_a_class_of_one_image(weights, folder, tmp_path):
    for name in ("one/x.png", "two/x.png", "two/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / "train/a/003.png").read_bytes())
    with pytest.raises(UsageError, match=r"2 images of every class, .* fewer of one \(1\)"):
        knn(weights, tmp_path, "--leave-one-out")


def launched(commands: list[list[str]], out: Path, processes: int = 2) -> list[list]:
    """What `knn_worker` printed in each process."""
    environment = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + (os.getpid() + 31) % 20_000),
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), json.dumps(commands), str(out)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * processes
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(weights, folder, tmp_path):
    """And print once: the first process alone. One launch for all commands."""
    asked = [
        ("--k", "1,9,60", "--temperature", "0.07,0.5"),
        ("--k", "5", "--search", "torch", "--bank-block", "7"),
        ("--k", "1,5,100", "--leave-one-out"),
        ("--k", "3", "--shots", "1,4", "--repeats", "2"),
        ("--k", "3", "--search", "ivf"),
        ("--k", "3", "--batch-size", "64"),  # too few batches for two: one has nothing
    ]
    refused = ("--k", "3", "--shots", "60")
    judged = [str(weights), "--data", str(folder)]
    command = ["knn", *judged, "--json", "--batch-size", "16"]
    others = [
        ["features", *judged, "--out", str(tmp_path / "two.safetensors")],
        ["neighbours", *judged, "--queries", "3", "--out", str(tmp_path / "two")],
        ["neighbours", *judged, "--images", "nowhere.png", "--out", str(tmp_path / "two")],
    ]
    commands = [[*command, *options] for options in (*asked, refused)]
    # Others that share: every protocol of a probe is compared in tests/eval/test_turns.py.
    probe = [
        "linear",
        *judged,
        "--json",
        "--batch-size",
        "16",
        "--protocol",
        "sgd",
        "--epochs",
        "1",
    ]
    kept = [*probe[:-4], "--protocol", "logistic", "--cache", str(tmp_path / "cache")]
    probes = [probe, kept]
    first, second = launched([*commands, *probes, *others], tmp_path)
    there = slice(len(commands), len(commands) + 2)
    for one, ours, nothing in zip(probes, first[there], second[there], strict=True):
        assert timeless(json.loads(ours)) == timeless(json.loads(invoked(*one))), one
        assert nothing == "", "the first process tells"
    for options, ours in zip(asked, first, strict=False):
        assert timeless(json.loads(ours)) == timeless(knn(weights, folder, *options)), options
    rows = json.loads(first[0])
    assert rows[0]["train_size"] == 68
    assert rows[0]["notes"][0].startswith("2 images of")
    for told in (first, second):
        assert "60 shots need 60 images of every class" in told[len(asked)]
        assert told[-2:] == ["there is no image file nowhere.png", "the last one fails"]
    printing = [*range(len(asked)), len(asked) + 1, len(asked) + 2]
    assert [second[place] for place in printing] == [""] * len(printing), "only the first prints"

    assert first[-4].split() == [str(tmp_path / "two.safetensors")]
    one = invoked("features", *judged, "--out", str(tmp_path / "one.safetensors")).strip()
    both = [load_file(file) for file in (one, first[-4].strip())]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])

    *_, numbers = first[-3].split()
    *_, expected = sheets(weights, folder, "--queries", "3", "--out", str(tmp_path / "one"))
    assert json.loads(Path(numbers).read_text()) == json.loads(expected.read_text())


# Neighbour sheets


def sheets(weights: Path, data: Path, *options: str) -> list[Path]:
    printed = invoked("neighbours", str(weights), "--data", str(data), *options)
    return [Path(line) for line in printed.split()]


def test_neighbours_of_a_split_of_a_folder_and_of_files(weights, folder, tmp_path):
    files = sheets(weights, folder, "--queries", "10", "--k", "4", "--out", str(tmp_path / "a"))
    assert [file.name for file in files] == [
        "neighbours-001-sheet.png", "neighbours-002-sheet.png", "neighbours.json",
    ]  # fmt: skip
    told = json.loads(files[-1].read_text())
    assert (told["k"], told["train_size"], len(told["queries"])) == (4, 68, 9), "one cannot be read"
    for query in told["queries"]:
        assert query["label"] == Path(query["image"]).parent.name
        assert "/val/" in query["image"]
        assert len(query["neighbours"]) == 4
    flat = folder / "train" / "a"  # no labels, no val
    *_, numbers = sheets(weights, flat, "--queries", "3", "--out", str(tmp_path / "b"))
    told = json.loads(numbers.read_text())
    for query in told["queries"]:
        assert query["label"] is None
        assert query["index"] not in [near["index"] for near in query["neighbours"]]
    given = folder / "train" / "b" / "001.png"
    *_, numbers = sheets(weights, folder, "--images", str(given), "--out", str(tmp_path / "c"))
    (query,) = json.loads(numbers.read_text())["queries"]
    assert query["image"] == str(given)
    assert query["neighbours"][0]["image"] == str(given)
    assert query["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_neighbours_of_a_run_lie_in_the_run(weights, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "backbone.safetensors").write_bytes(weights.read_bytes())
    files = sheets(run, folder, "--queries", "2")
    assert [file.relative_to(run).as_posix() for file in files] == [
        "neighbours/neighbours-001-sheet.png", "neighbours/neighbours.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "needs --out FOLDER"),
        (("--out", "o", "--images", "nowhere.png"), "there is no image file nowhere.png"),
        (("--out", "o", "--images", "x", "--queries", "2"), "not both"),
    ],
)
def test_refusals_of_neighbours(weights, folder, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        sheets(weights, folder, *options)
