"""`xdino pretrain auto` as a person types it."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import yaml

from xdino import config
from xdino.forecast import choosing
from xdino.forecast.rates import Rates
from xdino_launch.automatic import starting

TINY = ("--train.batch_size", 6, "--model.depth", 1, "--head.prototypes", 32,
        "--head.hidden_dim", 32, "--runtime.device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_pictures):
    """A name with spaces, grey pictures, few of them."""
    return write_pictures(tmp_path_factory.mktemp("auto") / "my images", 14, (20, 24), grey=True)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(choosing, "PILOT_STEPS", 4)


@pytest.fixture
def said(monkeypatch):
    """said(**rates): what timing steps is going to say instead; counts the times it is asked."""
    asked = []

    def say(**rates):
        def timed(settings, *arguments, **options):
            asked.append(settings)
            found = Rates(0.1, settings.train.batch_size, 0, "fp32", "cpu", 1, 2, 14, 4)
            return dataclasses.replace(found, **rates)

        monkeypatch.setattr(choosing, "time_steps", timed)
        return asked

    return say


def test_a_folder_is_trained_on_and_the_same_command_leaves_it_alone(
    xdino, folder, tmp_path, few_steps
):
    run = tmp_path / "a run"
    command = ("pretrain", "auto", "--data.path", folder, "--epochs", 2, "--run", run, *TINY)
    code, out, err = xdino(*command)
    assert code == 0, err
    assert out.strip() == str(run / "backbone.safetensors")
    assert "14 images" in err
    assert "every image of the sample" in " ".join(err.split())
    assert max(map(len, table_of(err))) <= 80
    record = json.loads((run / "auto.json").read_text())
    keys = {choice["key"]: choice for choice in record["choices"]}
    assert keys["train.batch_size"]["reason"] == "given"
    assert keys["train.epochs"]["value"] == "2"
    assert record["minutes_taken"] > 0
    recipe = config.load(str(run / "config.yaml"))
    assert (recipe.model.in_chans, recipe.crops.global_size, recipe.train.epochs) == (1, 20, 2)
    # The recipe alone makes the same weights: what was timed before left nothing behind.
    again = tmp_path / "again"
    assert xdino("pretrain", run / "config.yaml", "--run", again)[0] == 0
    assert weights(again) == weights(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, _, err = xdino(*command)
    assert code == 0
    assert "left alone" in err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def weights(run):
    from safetensors import safe_open

    with safe_open(run / "backbone.safetensors", "pt") as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118


def table_of(err):
    lines = err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("key "))
    end = next(i for i, line in enumerate(lines) if line.startswith("runtime.keep_every"))
    return lines[start : end + 1]


def test_a_run_that_is_continued_goes_on_with_what_was_chosen(
    xdino, folder, tmp_path, said, monkeypatch
):
    asked, run = said(seconds_per_step=0.5), tmp_path / "run"
    command = ("pretrain", "auto", "--data.path", folder, "--run", run, *TINY)

    class Killed(BaseException):
        """Before the first step, as nothing catches it."""

    def killed(*arguments, **options):
        raise Killed

    monkeypatch.setattr(starting, "run_pretraining", killed)
    with pytest.raises(Killed):
        xdino(*command, "--minutes", 2)
    monkeypatch.undo()
    said_again = said_other(monkeypatch)
    first = json.loads((run / "auto.json").read_text())
    assert len(asked) >= 1
    (run / "config.yaml").unlink()  # killed between the two
    code, out, err = xdino(*command, "--minutes", 2, "--print-config")
    assert code == 0, err
    assert said_again == []
    epochs = next(c["value"] for c in first["choices"] if c["key"] == "train.epochs")
    assert yaml.safe_load(out)["train"]["epochs"] == int(epochs)
    for length in (("--minutes", 3), ("--epochs", 4)):
        code, _, err = xdino(*command, *length)
        assert code == 2
        assert "was begun for 2 minutes" in err
    code, _, err = xdino(*command, "--optim.lr", "1")
    assert code == 2
    assert "optim.lr" in err


def said_other(monkeypatch):
    asked = []
    monkeypatch.setattr(choosing, "time_steps", lambda *a, **k: asked.append(a))
    return asked


def test_the_recipe_is_printed_with_its_reasons_and_nothing_is_written(
    xdino, folder, tmp_path, said
):
    said(seconds_per_step=0.5)
    run = tmp_path / "run"
    code, out, err = xdino(
        "pretrain", "auto", "--data.path", folder, "--minutes", 5, "--run", run, "--print-config",
        *TINY,
    )  # fmt: skip
    assert code == 0, err
    assert not run.exists()
    file = tmp_path / "recipe.yaml"
    file.write_text(out)
    recipe = config.load(str(file))
    assert recipe.train.epochs > 100
    assert "depth: 1  # given" in out
    assert out.count("  # ") >= 15


def test_epochs_fill_the_minutes(xdino, folder, tmp_path, said):
    said(seconds_per_step=1.0, steps_per_epoch=2)
    run = tmp_path / "run"
    told = {}
    for minutes in (2, 20):
        code, out, _ = xdino(
            "pretrain", "auto", "--data.path", folder, "--minutes", minutes, "--run", run,
            "--print-config",
        )  # fmt: skip
        assert code == 0
        told[minutes] = yaml.safe_load(out)["train"]["epochs"]
    assert 50 <= told[2] <= 60
    assert 580 <= told[20] <= 600


def test_many_images_are_seen_in_part_and_the_minutes_are_kept(xdino, folder, tmp_path, said):
    """Not one pass fits, or between one and two: epochs are of another number of images."""
    for steps in (500, 70):
        said(seconds_per_step=1.0, steps_per_epoch=steps, images=6 * steps + 1)
        code, out, err = xdino(
            "pretrain", "auto", "--data.path", folder, "--minutes", 2, "--run", tmp_path / "run",
            "--print-config", *TINY,
        )  # fmt: skip
        assert code == 0, err
        train = yaml.safe_load(out)["train"]
        assert train["images_per_epoch"] % 6 == 0
        assert 105 <= train["epochs"] * train["images_per_epoch"] / 6 <= 120
        assert "whole epochs fill the time" in out
    code, out, _ = xdino(
        "pretrain", "auto", "--data.path", folder, "--minutes", 2, "--run", tmp_path / "run",
        "--print-config", *TINY, "--train.images_per_epoch", 7,
    )  # fmt: skip
    assert code == 0
    assert "images_per_epoch: 7  # given" in out


def test_too_few_minutes_try_smaller_networks_then_say_what_it_takes(
    xdino, tmp_path, said, write_pictures
):
    photographs = write_pictures(tmp_path / "photographs", 14, (120, 130))
    asked = said(seconds_per_step=100.0, steps_per_epoch=40_000, images=1_281_167)
    run = tmp_path / "run"
    code, _, err = xdino(
        "pretrain", "auto", "--data.path", photographs, "--minutes", 30, "--run", run
    )
    assert code == 2
    assert "100 steps on 1,281,167 images take about 1.7e+02 minutes" in " ".join(err.split())
    assert "give --minutes" in err
    widths = [settings.model.depth for settings in asked]
    assert widths == sorted(widths, reverse=True)
    assert asked[-1].model.depth == 2
    assert not run.exists()


def test_memory_that_does_not_suffice_halves_the_batch(xdino, folder, tmp_path, monkeypatch):
    import torch

    tried = []

    def timed(settings, *arguments, **options):
        tried.append(settings.train.batch_size)
        if settings.train.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Rates(1.0, 2, 0, "bf16", "cuda:0", 1, 7, 14, 4)

    monkeypatch.setattr(choosing, "time_steps", timed)
    code, out, err = xdino(
        "pretrain", "auto", "--data.path", folder, "--epochs", 3, "--run", tmp_path / "r",
        "--print-config",
    )  # fmt: skip
    assert code == 0, err
    assert tried == [4, 2]
    assert yaml.safe_load(out)["train"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data.path", "D"), "say how long: --minutes 30, or --epochs N"),
        (("--minutes", "5"), "data.path is not set: name the images with --data.path FOLDER"),
        (("--data.path", "D", "--minutes", "0"), "--minutes"),
        (("--data.path", "D", "--minutes", "x"), "takes a finite number"),
        (("--data.path", "D", "--minutes", "nan"), "takes a finite number"),
        (("--data.path", "D", "--minutes", "-3"), "--minutes"),
        (("--data.path", "D", "--epochs", "0"), "--epochs"),
        (("--data.path", "D", "--minutes", "5", "--epochs", "3"), "exclude each other"),
        (("--data.path", "D", "--minutes", "5", "--train.epochs", "3"), "exclude each other"),
        (("--data.path", "D", "--epochs", "5", "--train.epochs", "3"), "give one"),
        (("--data.path", "D", "--minutes", "5", "--optim.lrr", "3"), 'did you mean "lr"'),
        (("--data.path", "D", "--minutes", "5", "--train.batch_size", "x"), "train.batch_size"),
        (("--data.path", "D", "--epochs", "2", "--train.batch_size", "99"), "a batch takes 99"),
        (("--data.path", "nowhere", "--minutes", "5"), "nowhere"),
        (("--data.path", "E", "--minutes", "5"), "no image"),
        (("--data.path", "D", "--minutes", "5", "--runtime.device", "tpu"), "choose auto, cpu"),
        (("--data.path", "D", "--minutes", "5", "--evaluate.data", "D"), "train and no val"),
    ],
)
def test_mistakes_are_one_sentence(xdino, folder, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    places = {"D": str(folder), "E": str(tmp_path / "empty")}
    words = [places.get(word, word) for word in arguments]
    code, out, err = xdino("pretrain", "auto", "--run", tmp_path / "run", *words)
    assert (code, out) == (2, "")
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_minutes_are_for_auto(xdino, tmp_path):
    code, _, err = xdino("pretrain", "debug", "--run", tmp_path / "r", "--minutes", "5")
    assert code == 2
    assert "--minutes is for pretrain auto" in err


def test_a_folder_that_holds_something_else_is_refused(xdino, folder, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    other.mkdir()
    (other / "thesis.txt").write_text("words")
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(config.load("debug")))
    words = ("pretrain", "auto", "--data.path", folder, "--epochs", 1, "--run")
    code, _, err = xdino(*words, other)
    assert code == 2
    assert "not empty and not a run" in err
    code, _, err = xdino(*words, run)
    assert code == 2
    assert "that auto did not choose: continue it by xdino pretrain" in err


def test_two_processes_go_by_what_the_first_chose(folder, tmp_path):
    run = tmp_path / "run"
    small = [str(word) for word in TINY]
    small[1] = "3"
    few_steps = "from xdino.forecast import choosing; choosing.PILOT_STEPS = 4; "
    few_steps += "from xdino_launch.cli import main; main()"
    command = [sys.executable, "-c", few_steps, "pretrain", "auto", "--run-dir", str(run)]
    command += ["--data.path", str(folder), "--epochs", "1", "--runtime.workers", "1", *small]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    where["MASTER_PORT"] = str(20_000 + (os.getpid() + 19) % 20_000)
    both = [
        subprocess.Popen(
            command,
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0].strip() == str(run / "backbone.safetensors")
    assert told[1] == ("", ""), "the first speaks for both"
    record = json.loads((run / "auto.json").read_text())
    assert record["machine"]["processes"] == 2
    assert record["rates"]["images_per_step"] == 6
