"""The command line as a person meets it: results on standard output, one sentence for a mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from xdino_launch import cli

SMALL = ("--train.batch_size", "50", "--data.path")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Labelled folders of two kinds of images: bright blobs on the left, and on the right."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for label in ("left", "right"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                start = 2 if label == "left" else 18
                image[8:24, start : start + 12] += 150
                Image.fromarray(image).save(root / split / label / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["pretrain", "debug", "--run", str(path), "--data.path", str(folder),
                 "--train.batch_size", "20", "--crops.mean", "null", "--crops.std", "null"]  # fmt: skip
    cli.main(arguments)
    return path


def test_unknown_keys_name_themselves_and_the_nearest(xdino, tmp_path):
    run = tmp_path / "r"
    code, out, err = xdino(
        "pretrain", "debug", "--run", run, "--model.archh", "x", "--optim.lrr", "1"
    )
    assert (code, out) == (2, "")
    assert 'model.archh is not a known key: did you mean "arch"?' in err
    assert 'optim.lrr is not a known key: did you mean "lr"?' in err
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], 'there is no command "pretrian": did you mean "pretrain"?'),
        (["pretrain", "debgu", "--run", "r"], 'did you mean "debug"'),
        (["pretrain", "debug"], "Missing option '--run'"),
        (["pretrain", "debug", "--run", "r", "--lr", "1"], 'did you mean "--optim.lr"'),
        (["pretrain", "debug", "--run", "r", "--optim.lr"], "--optim.lr needs a value"),
        (["pretrain", "debug", "--run", "r", "--train.epochs", "0"], "train.epochs"),
        (["pretrain", "debug", "--run", "r", "--data.path", "nowhere"], "nowhere"),
        (["pretrain", "debug", "--run", "r", "--data.path", "fashion_mnits"], "fashion_mnist"),
        (["knn", "nowhere", "--data", "fashion_mnist_sample"], "no weights file or run directory"),
        (["knn", "w", "--data", "d", "--k", "ten"], "--k takes numbers"),
        (["knn", "w", "--data", "d", "--k", "0"], "from 1 up"),
        (["knn", "w", "--data", "d", "--temperature", "0"], "above 0"),
        (["linear", "w", "--data", "d", "--protocol", "svm"], "svm"),
        (["attention", "w", "--out", "o"], "Missing argument 'IMAGES...'"),
        (["attention", "w", "i.png", "--out", "o", "--mass", "2"], "--mass"),
        (["features", "w", "--data", "d"], "--out"),
        (["pretrain", "debug", "--run", "r", "--optim.lr", "1", "--optim.lr=2"],
         "given twice, with '1' and '2'"),
        (["pretrain", "debug", "--run", "r", "--optim.lr", "1", "--optimizer.lr", "2"], "given twice"),
        (["pretrain", "debug", "--run", "r", "--optim.lr", "on"], "takes a finite number"),
        (["pretrain", "debug", "--run", "r", "--crops.local_size", "64"], "larger than crops.gl"),
        (["pretrain", "--optim.lr", "1", "debug", "--run", "r"], "name the recipe first"),
        (["pretrain", "debug", "--run", "r", "--data.path", "~nosuchuser/x"], "home directory"),
        (["pretrain", "debug", "--run", "r", "--runtime.device", "mps"], "choose auto, cpu or cuda"),
        (["submit", "debug", "--run", "r", "--hours", "0.008"], "--hours"),
        (["submit", "debug", "--run", "r", "--hours", "nan"], "--hours"),
        (["knn", "w", "--data", "d", "--temperature", "nan"], "--temperature takes numbers"),
        (["knn", "w", "--data", "d", "--k", "1_000"], "--k takes numbers"),
        (["knn", "w", "--data", "d", "--seed", "99999999999999999999"], "--seed"),
        (["knn", "w", "--data", "d", "--workers", "1000000000"], "--workers"),
        (["knn", "w", "--data", "d", "--size", "1000000"], "--size"),
        (["pretrain", "debug", "--print-config", "--runtime.device", "mps"], "gpus (mps) are not"),
        (["knn", "w", "--data", "d", "--device", "mps"], "Apple's GPUs (mps) are not supported"),
        (["replay", "r", "--device", "tpu"], "choose auto, cpu or cuda"),
        (["submit", "debug", "--run", "r", "--runtime.device", "gpu"], "choose auto, cpu or cuda"),
        (["knn", "w", "--data", "d", "--device", "cuda:x"], "choose auto, cpu or cuda"),
        (["knn", "w", "--data", "d", "--device", ""], "choose auto, cpu or cuda"),
        (["knn", "w", "--data", "~nosuchuser/x"], "home directory"),
        (["knn", "w", "--data", ""], "is empty"),
        (["knn", "x" * 300, "--data", "d"], "File name too long"),
        (["knn", "w", "--data", "d", "--out", "/tmp"], "is a folder"),
        (["quality", "w", "--data", "d", "--device", "meta"], "choose auto, cpu or cuda"),
        (["linear", "w", "--data", "d", "--lr", "nan"], "--lr"),
        (["linear", "w", "--data", "d", "--lr", "inf"], "--lr"),
        (["linear", "w", "--data", "d", "--c", "inf"], "--c takes numbers"),
        (["linear", "w", "--data", "d", "--c", "nan"], "--c takes numbers"),
        (["linear", "w", "--data", "d", "--c", "0"], "--c must be above 0"),
        (["linear", "w", "--data", "d", "--c", "-1"], "--c must be above 0"),
        (["davis", "w", "--data", "d", "--out", "o", "--temperature", "nan"], "--temperature"),
        (["attention", "w", "i.png", "--out", "o", "--device", "xpu"], "choose auto, cpu or cuda"),
        (["attention", "w", "i.png", "--out", "o", "--fps", "inf"], "--fps"),
        (["report", "x" * 300], "File name too long"),
        (["bench", "step", "--device", "gpu"], "choose auto, cpu or cuda"),
        (["bench", "step", "--kernels", "fast"], "--kernels cannot be 'fast'"),
        (["bench", "step", "--batch", "1000000", "--global-size", "8000"], "take about"),
        (["bench", "knn", "--bank", "10000000", "--dim", "10000000"], "take about"),
        (["bench", "scaling", "--against", "vit_tiny_patch16_224", "--sizes", "33,64"], "--sizes 33"),
        (["bench", "scaling", "--seconds", "nan"], "--seconds"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    xdino, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = xdino(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_to_start_from_are_named_once(xdino, tmp_path):
    command = ["pretrain", "debug", "--run", tmp_path / "run", "--print-config", "--init", "a.pt"]
    code, out, _ = xdino(*command, "--train.init", "a.pt")
    assert (code, "init: a.pt" in out) == (0, True)
    code, out, error = xdino(*command, "--train.init", "b.pt")
    assert (code, out) == (2, "")
    assert "--init is 'a.pt', but --train.init is 'b.pt': give one" in error


def test_pretrain_prints_the_backbone_and_leaves_a_finished_run_alone(xdino, run, folder):
    code, out, err = xdino("pretrain", run / "config.yaml", "--run", run)
    assert code == 0
    assert out.strip() == str(run / "backbone.safetensors")
    assert "finished run" in err
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "knn_top1" in metrics[-1]


def test_a_run_is_continued_by_its_name_alone(xdino, run, tmp_path):
    code, out, err = xdino("pretrain", "--run", run)
    assert (code, out.strip()) == (0, str(run / "backbone.safetensors"))
    assert "finished run" in err
    code, out, err = xdino("pretrain", "--optim.lr", "1", "--run", run)  # an option is no recipe
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "optim.lr (0.0005 against 1.0)" in err
    nothing = tmp_path / "nothing"
    (tmp_path / "broken" / "config.yaml").mkdir(parents=True)
    for folder in (nothing, tmp_path / "broken", tmp_path / ("x" * 300)):
        code, out, err = xdino("pretrain", "--run", folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds no run to continue: name a recipe first" in xdino("pretrain", "--run", nothing)[2]
    assert not nothing.exists()


def test_print_config_resolves_everything(xdino, tmp_path):
    code, out, _ = xdino(
        "pretrain", "debug", "--run", tmp_path / "r", "--optim.lr=0.5", "--print-config"
    )
    assert code == 0
    assert "lr: 0.5" in out
    assert not (tmp_path / "r").exists()


def test_knn_and_linear_write_rows_with_their_protocol(xdino, run, folder):
    code, out, _ = xdino("knn", run, "--data", folder, "--k", "1,5", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["settings"]["k"] for row in rows] == [1, 5]
    code, out, _ = xdino("linear", run, "--data", folder)
    assert code == 0
    assert "logistic" in out
    code, out, _ = xdino(
        "linear", run, "--data", folder, "--protocol", "sgd", "--epochs", "2", "--json"
    )
    assert code == 0
    rows = json.loads((run / "results.json").read_text())
    stored = [row for row in rows if row["settings"].get("weights") != "best"]  # not while training
    assert len(stored) == 4
    for row in stored:
        assert {"protocol", "settings", "top1", "top5", "data", "transform", "train_size",
                "val_size", "checkpoint"} <= set(row)  # fmt: skip
        assert (row["train_size"], row["val_size"]) == (80, 20)
        assert "teacher, iteration" in row["features"]


def test_cached_features_need_no_network(xdino, run, folder, tmp_path, monkeypatch):
    command = ("knn", run, "--data", folder, "--k", "5", "--json", "--out", tmp_path / "r.json",
               "--cache", tmp_path / "cache")  # fmt: skip
    first = json.loads(xdino(*command)[1])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    from xdino.xcit import XCiT

    monkeypatch.setattr(XCiT, "forward", None)
    second = json.loads(xdino(*command)[1])
    assert first[0]["top1"] == second[0]["top1"]
    assert first[0]["transform"] == second[0]["transform"]


def test_an_evaluation_has_a_limit_of_pixels_of_its_own(xdino, run, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    Image.new("RGB", (64, 64), "white").save(data / "val" / "left" / "large.png")
    command = ("knn", run, "--data", data, "--k", "5", "--json", "--out", tmp_path / "r.json",
               "--cache", tmp_path / "cache")  # fmt: skip
    code, out, told = xdino(*command, "--max-pixels", 1024)
    assert (code, json.loads(out)[0]["val_size"]) == (0, 20)
    assert "large.png: 64 x 64 pixels are more than the limit of 1,024 pixels" in told
    code, out, told = xdino(*command)  # what was skipped is not what the cache answers now
    assert (code, json.loads(out)[0]["val_size"]) == (0, 21)
    assert "skipped" not in told


def test_attention_features_and_export(xdino, run, folder, tmp_path):
    picture = folder / "val" / "left" / "000.png"
    code, out, _ = xdino("attention", run, picture, "--out", tmp_path / "a")
    assert code == 0
    written = out.split()
    assert written
    assert all(Image.open(path).size for path in written)
    code, out, err = xdino("attention", run, tmp_path / "none.png", "--out", tmp_path / "a")
    assert (code, err.count("\n")) == (2, 1)
    (tmp_path / "bad.png").write_text("no image")
    code, _, err = xdino("attention", run, tmp_path / "bad.png", "--out", tmp_path / "a")
    assert code == 2
    assert "cannot be read as an image" in err
    file = tmp_path / "features.safetensors"
    assert xdino("features", run, "--data", folder, "--out", file)[0] == 0
    from safetensors.torch import load_file

    assert load_file(file)["train_features"].shape == (80, 32)
    exported = tmp_path / "weights.safetensors"
    assert xdino("export", run, "--out", exported)[0] == 0
    one = json.loads(xdino("knn", run, "--data", folder, "--k", "5", "--json")[1])
    two = json.loads(xdino("knn", exported, "--data", folder, "--k", "5", "--json")[1])
    assert one[0]["top1"] == two[0]["top1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "0.5,0.5"], "--mean and positive|one value a channel|must match"),
        (["--mean", "0.5,0.5", "--std", "1,1"], "--mean takes one value a channel: 3, got 2"),
        (["--mean", "nan,0,0"], "--mean takes numbers"),
        (["--std", "0,1,1"], "--std must be above 0"),
        (["--size", "8192", "--batch-size", "100000"], "the images of a batch take about"),
    ],
)
def test_views_that_the_network_does_not_take(xdino, run, folder, tmp_path, options, message):
    code, out, err = xdino("knn", run, "--data", folder, "--out", tmp_path / "r.json", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_the_network_does_not_take_names_the_nearest(xdino, folder, tmp_path):
    from safetensors.torch import save_file

    from xdino.backbones import BackboneSpec

    network = BackboneSpec("test_vit", input_size=160).build()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    command = (
        "knn",
        tmp_path / "w.safetensors",
        "--arch",
        "test_vit",
        "--data",
        folder,
        "--k",
        "1",
    )
    code, _, err = xdino(*command, "--size", "70")
    assert code == 2
    assert "--size 70" in err


def test_brackets_in_names_are_names(xdino, run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "[" / "]")
    code, out, err = xdino("knn", run, "--data", "[/]", "--k", "1", "--out", "[red].json")
    assert code == 0, err
    assert "[/]" in out
    shutil.copytree(run, tmp_path / "[x" / "]")
    code, out, err = xdino("knn", "[x/]", "--data", folder, "--k", "1")
    assert code == 0, err


def test_a_run_folder_that_cannot_be_is_a_sentence(xdino, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name in ("loop", "file", "file/below", "x" * 300):
        code, out, err = xdino("pretrain", "debug", "--run", name)
        assert (code in (1, 2), out, err.count("\n")) == (True, "", 1), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_failures_of_the_world_are_exit_code_1(xdino, folder, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"damaged")
    code, _, err = xdino("knn", tmp_path / "weights.pth", "--data", folder)
    assert (code, err.count("\n")) == (1, 1)
    assert "damaged" in err


def test_a_signal_stops_resumably_with_exit_code_75(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "xdino_launch", "pretrain", "debug", "--run", str(run),
               "--train.epochs", "50", "--evaluate.every", "0", "--runtime.log_every", "1"]  # fmt: skip
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=-1, text=True
    )
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 75, err
    assert "the same command continues it" in err
    assert (run / "checkpoints" / "last.pt").exists()


def test_help_is_there_and_quick_commands_import_no_torch():
    code = (
        "import sys\nfrom xdino_launch import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


SLIPS = (
    ("pretrain", "debug", "--run", "r", "--data.path", "slip"),
    ("pretrain", "debug", "--run", "r", "--evaluate.data", "slip"),
    ("pretrain", "debug", "--run", "r", "--init", "slip"),
    ("knn", "slip", "--data", "fashion_mnist_sample"),
    ("knn", "there", "--data", "slip"),
    ("linear", "there", "--data", "slip"),
    ("linear", "there", "--data", "there", "--apply", "slip"),
    ("neighbours", "there", "--data", "slip", "--out", "o"),
    ("features", "there", "--data", "slip", "--out", "f.safetensors"),
    ("quality", "there", "--data", "slip"),
    ("attention", "there", "slip", "--out", "o"),
    ("segment-score", "there", "--data", "slip"),
    ("retrieval", "there", "--data", "slip"),
    ("copydetection", "there", "--data", "slip"),
    ("davis", "there", "--data", "slip", "--out", "o"),
    ("export", "slip", "--out", "w.safetensors"),
    ("pack", "slip", "--out", "p.tar"),
    ("report", "slip"),
    ("replay", "slip"),
    ("runs", "slip"),
)


def test_a_mistyped_path_is_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "there").mkdir()
    code = (
        "import sys\nfrom xdino_launch import cli\n"
        f"for command in {SLIPS!r}:\n"
        "    try: cli.main(command)\n"
        "    except SystemExit as stop: assert stop.code == 2, command\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == len(SLIPS)
    for command, sentence in zip(SLIPS, told, strict=True):
        assert re.search("(no|called) .*slip", sentence), (command, sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
