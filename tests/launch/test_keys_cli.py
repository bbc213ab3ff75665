"""Recipes and keys on the command line: help, lists, completion, what continues a run."""

import json
import os
import re
import subprocess
import sys

import click
import pytest

from xdino import config
from xdino_launch import cli


def test_alone_it_shows_its_help_on_lines_of_its_own(xdino):
    code, out, error = xdino()
    assert (code, error) == (0, "")
    assert out == xdino("--help")[1]
    assert out.startswith("Usage: xdino [OPTIONS] COMMAND")
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.split("Options:")[1]
    code, out, error = xdino("bench")
    assert (code, error) == (0, "")
    assert out.startswith("Usage: xdino bench")


def test_every_command_stands_in_the_help_once(xdino):
    out = xdino("--help")[1]
    for name in cli.xdino.commands:
        assert len(re.findall(rf"^  {name} ", out, re.MULTILINE)) == 1, name
    assert {name for names in cli.CHAPTERS.values() for name in names} <= set(cli.xdino.commands)


@pytest.mark.parametrize("command", ["pretrain", "submit"])
def test_the_help_lists_every_key_with_meaning_and_default(xdino, command):
    code, out, error = xdino(command, "--help")
    assert (code, error) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    flat = " ".join(out.split()).replace("- ", "-")  # lines are broken at hyphens, too
    for keys in config.settings().values():
        for key in keys:
            told = (
                f"--{key.name} {key.metavar} {key.meaning} [default: {key.default_text or 'none'}]"
            )
            assert " ".join(told.split()).replace("- ", "-") in flat, key.name


def test_print_config_needs_no_run_and_says_what_the_keys_mean(xdino, tmp_path):
    code, out, error = xdino("pretrain", "demo", "--print-config", "--optim.lr", "0.5")
    assert (code, error) == (0, "")
    assert out.startswith("model:\n")
    assert "  # Number of outputs, K.\n  prototypes: 1024\n" in out
    assert "BatchNorm tells the images apart from the first one" in out  # the recipe's own words
    assert "2e-3 at 64" not in out  # of a value that the command line replaced
    (tmp_path / "mine.yaml").write_text(out)
    assert config.load(str(tmp_path / "mine.yaml")) == config.load("demo", {"optim.lr": "0.5"})
    code, out, error = xdino("pretrain", "--print-config")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "small_data" in error


def test_recipes_are_listed_and_shown(xdino, tmp_path):
    code, out, _ = xdino("recipes")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for name in config.recipes(None):
        assert f"{name}:\n" in out
    assert json.loads(xdino("recipes", "--json")[1])["debug"]["hardware"] == "any"
    assert xdino("recipes", "demo")[1] == (config.recipes_dir() / "demo.yaml").read_text()
    (tmp_path / "note.txt").write_text("my diary")
    for name, why in (
        ("deno", 'did you mean "demo"'),
        (tmp_path / "note.txt", "must hold sections"),
    ):
        code, out, error = xdino("recipes", name)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert why in error


def test_a_run_of_several_processes_is_continued_by_as_many(xdino, tmp_path, monkeypatch):
    from xdino_launch import processes

    launched = []
    monkeypatch.setattr(processes, "launch", lambda n, told: launched.append((n, told)) or 0)
    run = tmp_path / "run"
    run.mkdir()
    for device, option in (("cpu", "processes"), ("cuda", "gpus")):
        (run / "config.yaml").write_text(
            config.to_yaml(config.load("debug", {"runtime.device": device}))
        )
        (run / "environment.json").write_text('{"starts": [{"processes": 1}, {"processes": 2}]}')
        monkeypatch.setattr("xdino.runtime.device.cuda_devices", lambda: 2)
        assert xdino("pretrain", "--run", run)[0] == 0
        count, told = launched.pop()
        assert (count, told[:2]) == (2, ["pretrain", str(run / "config.yaml")])
        assert told[-2:] == ["--runtime.device", device], option
    (run / "environment.json").write_text("{")  # damaged: as one process, which says what is wrong
    monkeypatch.setattr("xdino_launch.local.run_pretraining", lambda *a, **k: run / "b")
    assert xdino("pretrain", "--run", run) == (0, f"{run / 'b'}\n", "")


@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        ("pretrain fash", ["fashion_mnist", "fashion_mnist_curriculum"], "demo"),
        (
            "pretrain demo --optim.w",
            ["--optim.warmup_epochs", "--optim.weight_decay"],
            "--optim.lr",
        ),
        ("pretrain demo --pr", ["--print-config", "--processes"], "--optim.lr"),
        ("pretrain demo --optim.name ", ["adamw", "sgd", "lars"], "demo"),
        ("pretrain --optim.name l", ["lars"], "sgd"),
        ("pretrain demo --runtime.compile ", ["true", "false"], "demo"),
        ("recipes de", ["debug", "demo"], "small_data"),
        ("submit demo --train.e", ["--train.epochs"], "--train.seed"),
        ("ne", ["neighbours"], "knn"),
    ],
)
def test_the_tab_key_knows_recipes_keys_and_words(words, offered, not_offered):
    before = ["xdino", *words.split(" ")]
    done = subprocess.run(
        [sys.executable, "-c", "from xdino_launch.cli import main; main()"],
        env=os.environ | {"_XDINO_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(before),
                          "COMP_CWORD": str(len(before) - 1)},
        capture_output=True, text=True,
    )  # fmt: skip
    found = [line.partition(",")[2] for line in done.stdout.splitlines()]
    assert done.stderr == ""
    assert set(offered) <= set(found)
    assert not_offered not in found


def options_of(command):
    """Option names that the help shows, and the words behind each."""
    shown = {}
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            names, told = param.get_help_record(click.Context(command))
            for name in re.findall(r"--[\w-]+", names):
                shown[name] = told
    return shown


def every_command():
    for name, command in cli.xdino.commands.items():
        below = command.commands if isinstance(command, click.Group) else {"": command}
        yield from ((f"{name} {part}".strip(), one) for part, one in below.items())


def test_options_mean_one_thing_in_every_command():
    for name, command in every_command():
        shown = options_of(command)
        if "--size" in shown and not name.startswith("bench"):
            assert shown["--size"].startswith("Side of the square that the network sees"), name
        if "--results" in shown:
            assert shown["--results"].startswith("Append to this results.json"), name
        if "--out" in shown:
            assert "results.json" not in shown["--out"], name
        for option, start in (("--json", "JSON on standard output"), ("--seed", "")):
            assert shown.get(option, start).startswith(start), name


@pytest.mark.parametrize(
    ("command", "older"),
    [("knn", "--out"), ("quality", "--out"), ("retrieval", "--out"), ("davis", "--size"),
     ("attention", "--size"), ("segment-score", "--size"), ("retrieval", "--size")],
)  # fmt: skip
def test_older_names_of_options_are_understood_and_not_shown(command, older):
    known = {name for param in cli.xdino.commands[command].params for name in param.opts}
    assert older in known
    assert older not in options_of(cli.xdino.commands[command])
