"""What `knn`, `linear`, `features`, `quality` and `export` share: whose weights, where numbers go."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.head import DINOHead
from xdino.student_teacher import MultiCropNetwork


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory whose student and teacher differ."""
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    spec = BackboneSpec("xcit_nano_12_p8", shape=shape, input_size=16, resize=16)
    path = tmp_path_factory.mktemp("judged") / "run"
    teacher, student = spec.build(), spec.build()
    checkpoint.save_backbone(
        path / "backbone.safetensors", teacher, spec, role="teacher", iteration=3
    )
    learner = {
        role: MultiCropNetwork(network, DINOHead(16, 8, 8, 4)).state_dict()
        for role, network in (("teacher", teacher), ("student", student))
    }
    state = {"learner": learner, "iteration": 3, "spec": spec.to_dict(), "sampler": {}, "rng": []}
    checkpoint.save_state(path / checkpoint.STATE_FILE, state)
    return path


def corrupted(root: Path, level: int) -> Path:
    """One folder of many that have the same names below them, as ImageNet-C has."""
    rng = np.random.default_rng(level)
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            path = root / str(level) / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return root / str(level)


def test_the_cache_tells_roles_and_folders_apart(run, tmp_path, xdino):
    folders = [corrupted(tmp_path, level) for level in (1, 2)]
    seen = {}
    for name, weights, role, data in (
        ("teacher 1", run, "teacher", folders[0]),
        ("student 1", run, "student", folders[0]),
        ("teacher 2", run, "teacher", folders[1]),
    ):
        for cached in (False, True, True):
            out = tmp_path / "f.safetensors"
            options = ("--cache", tmp_path / "cache") if cached else ()
            code, *_ = xdino(
                "features", weights, "--data", data, "--role", role, "--out", out, *options
            )
            assert code == 0
            found = load_file(out)["val_features"]
            assert torch.equal(seen.setdefault(name, found), found), (name, cached)
    assert len(list((tmp_path / "cache").iterdir())) == 6
    assert not any(torch.equal(seen[a], seen[b]) for a in seen for b in seen if a < b), (
        "three different sets of features"
    )
    again = folders[0] / "val" / "a" / "0.png"
    shutil.copy(folders[1] / "val" / "a" / "0.png", again)
    os.utime(again, (1, 1))
    xdino("features", run, "--data", folders[0], "--out", out, "--cache", tmp_path / "cache")
    assert not torch.equal(load_file(out)["val_features"], seen["teacher 1"]), "a file was changed"


def test_the_student_is_judged_and_exported_as_the_student(run, tmp_path, xdino):
    data = corrupted(tmp_path, 1)
    told = {}
    for role in ("teacher", "student"):
        code, out, _ = xdino("knn", run, "--data", data, "--k", "3", "--role", role, "--json",
                             "--out", tmp_path / "r.json")  # fmt: skip
        assert code == 0
        (told[role],) = json.loads(out)
        assert told[role]["features"] == f"{role}, iteration 3"
        code, _, error = xdino(
            "export", run, "--role", role, "--out", tmp_path / f"{role}.safetensors"
        )
        assert code == 0, error
    assert told["teacher"]["checkpoint"] != told["student"]["checkpoint"]
    exported = checkpoint.load_backbone(tmp_path / "student.safetensors", role="student")
    learned = checkpoint.load_backbone(run, role="student")
    assert torch.equal(exported.norm.bias, learned.norm.bias)
    assert torch.equal(exported.cls_token, learned.cls_token)
    for weights in (run / "backbone.safetensors", tmp_path / "teacher.safetensors"):
        for command in (("knn", "--data", data), ("quality", "--data", data),
                        ("export", "--out", tmp_path / "x.safetensors")):  # fmt: skip
            code, out, error = xdino(command[0], weights, "--role", "student", *command[1:])
            assert (code, out) == (2, "")
            assert "holds the teacher alone" in error


def test_a_number_is_printed_before_it_is_written(run, tmp_path, xdino):
    data = corrupted(tmp_path, 1)
    (tmp_path / "file").touch()
    (tmp_path / "damaged.json").write_text("[{")
    for out, sentence in ((tmp_path / "file" / "r.json", "cannot write"),
                          (tmp_path / "damaged.json", "damaged.json")):  # fmt: skip
        for command in (("knn", "--k", "3", "--json"), ("linear", "--c", "1", "--json"),
                        ("quality", "--views", "2", "--json")):  # fmt: skip
            code, told, error = xdino(command[0], run, "--data", data, "--out", out, *command[1:])
            assert code == 1, command
            assert json.loads(told), command
            assert sentence in error
            assert "Traceback" not in error
    assert (tmp_path / "damaged.json").read_text() == "[{"


def test_a_cache_that_cannot_be_written_costs_a_warning(run, tmp_path, xdino):
    data = corrupted(tmp_path, 1)
    (tmp_path / "file").touch()
    for options in ((), ("--bank-block", "4")):
        code, told, error = xdino("knn", run, "--data", data, "--k", "3", "--json", "--cache",
                                  tmp_path / "file" / "cache", *options)  # fmt: skip
        assert code == 0
        assert "xdino: the features are not kept: cannot write" in error
        assert "UserWarning" not in error
        assert json.loads(told)


def launched(command: list[str], processes: int = 2) -> list[subprocess.CompletedProcess]:
    """The command under a launcher's environment, each process of it."""
    environment = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + (os.getpid() + 77) % 20_000),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "xdino_launch", *command],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *out)
        for process, out in zip(started, told, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_write_one_row_and_say_one_sentence(run, tmp_path):
    data = corrupted(tmp_path, 1)
    out = tmp_path / "rows.json"
    linear, knn = ["linear", str(run), "--c", "1"], ["knn", str(run), "--k", "3"]
    first, second = launched([*linear, "--data", str(data), "--out", str(out)])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout
    assert not second.stdout
    assert len(json.loads(out.read_text())) == 1
    (tmp_path / "file").touch()
    for command in (linear, knn):
        refused = str(tmp_path / "file" / "r.json")
        for process in launched([*command, "--data", str(data), "--out", refused]):
            assert process.returncode == 1
            assert "cannot write" in process.stderr
            assert "Traceback" not in process.stderr
