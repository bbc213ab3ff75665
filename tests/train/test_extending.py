"""Epochs behind a finished run: --extend and train.extended."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_run import configuration

from xdino import checkpoint, config
from xdino.errors import Stopped, UsageError
from xdino.plan import make_plan
from xdino.pretraining import pretrain

from .listening import Ear, rows


def told(run):
    """What metrics.jsonl says, but for clocks and memory."""
    clocks = ("images_per_second", "tokens_per_second", "wait_share", "resident_mb")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows(run)]


def weights(run):
    return checkpoint.sha256(run / "backbone.safetensors")


def learnt(run):
    """All that a state holds of student, teacher, centre and optimiser."""
    return checkpoint.load_state(run / "checkpoints" / "last.pt")["learner"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def dropping(images):
    """dropping(**overrides): a run whose drop path draws random numbers, so that they are kept."""
    return partial(configuration, images, model__drop_path=0.3)


@pytest.fixture(scope="module")
def planned(dropping, tmp_path_factory):
    """A run of two epochs that was planned with one and then two behind them, and left alone."""
    run = tmp_path_factory.mktemp("planned") / "run"
    pretrain(dropping(train__extended=[1, 2]), run)
    return run


def test_extending_twice_is_as_if_it_had_been_planned(dropping, planned, tmp_path):
    """Whatever stops and kills come between: the same bytes, row by row."""
    run, ear = tmp_path / "run", Ear()
    pretrain(dropping(), run)
    before = told(run)
    assert [row["iteration"] for row in before] == [*range(1, 7)]
    with pytest.raises(Stopped):
        pretrain(dropping(), run, extend=1, listener=Ear(at=7, act=stop))
    assert "extended:\n  - 1\n" in (run / "config.yaml").read_text()
    pretrain(dropping(), run, extend=1, listener=ear)  # the same command again goes on
    assert told(run)[:6] == before
    assert [row["iteration"] for row in told(run)] == [*range(1, 10)]
    assert any("2 epochs, extended by 1: in the last 1 lr is at most" in n for n in ear.notices)

    with pytest.raises(KeyboardInterrupt):
        pretrain(dropping(), run, extend=2, listener=Ear(at=11, act=kill))
    pretrain(dropping(), run)  # the recipe alone, too
    assert told(run) == told(planned)
    assert weights(run) == weights(planned)
    assert same(learnt(run), learnt(planned))

    ear = Ear()
    pretrain(dropping(), run, listener=ear)
    pretrain(dropping(train__extended=[1, 2]), run, listener=ear)
    assert len([n for n in ear.notices if "finished run of 15 iterations: left alone" in n]) == 2


def stop():
    os.kill(os.getpid(), signal.SIGUSR2)


def kill():
    raise KeyboardInterrupt


def test_what_is_learned_before_does_not_depend_on_it(dropping, planned, tmp_path):
    """The first six steps of a run that was planned longer are those of the shorter one."""
    pretrain(dropping(), tmp_path)
    assert told(planned)[:6] == told(tmp_path)
    sizes = {"curriculum__global_size": 16, "curriculum__local_size": 8}
    small_first = dropping(curriculum__share=0.5, train__extended=[4], **sizes)
    assert make_plan(small_first).early_iterations == 3, "half of the two epochs"


def test_a_run_is_extended_by_the_key_as_well(dropping, planned, tmp_path):
    """For `submit`, whose command is started again and again: the key says what there is in all."""
    run = tmp_path / "run"
    pretrain(dropping(), run)
    for _ in "ab":
        pretrain(dropping(train__extended=[1]), run)
        assert rows(run)[-1]["iteration"] == 9
    pretrain(config.load(str(planned / "config.yaml")), run)
    assert weights(run) == weights(planned)
    with pytest.raises(UsageError, match=r"extended by 1,2 epochs .*, and here it is 4: leave"):
        pretrain(dropping(train__extended=[4]), run)
    with pytest.raises(UsageError, match="both add epochs: give one"):
        pretrain(dropping(train__extended=[1, 2, 3]), run, extend=3)


def test_only_a_finished_run_is_extended(dropping, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        UsageError, match=r"--extend 2 adds epochs to a finished run, and .*run holds"
    ):
        pretrain(dropping(), run, extend=2)
    assert not run.exists()
    with pytest.raises(Stopped):
        pretrain(dropping(), run, listener=Ear(at=4, act=stop))
    before = (run / "config.yaml").read_text()
    for more in ({"extend": 2}, {"config": dropping(train__extended=[2])}):
        with pytest.raises(UsageError, match=r"not finished \(at iteration 4 of 6\)"):
            pretrain(**({"config": dropping(), "run_dir": run} | more))
    assert (run / "config.yaml").read_text() == before
    pretrain(dropping(), run)
    with pytest.raises(Stopped):
        pretrain(dropping(), run, extend=2, listener=Ear(at=8, act=stop))
    with pytest.raises(UsageError, match=r"not finished \(at iteration 8 of 12\)"):
        pretrain(dropping(), run, extend=3)


def test_other_epochs_name_the_extension(dropping, planned):
    with pytest.raises(UsageError, match=r"train.epochs 2, and here it is 9: .*--extend 4 adds"):
        pretrain(dropping(train__epochs=9), planned)
    with pytest.raises(UsageError, match=r"Leave train.epochs at 2; choose another folder"):
        pretrain(dropping(train__epochs=1), planned)
    with pytest.raises(UsageError, match="holds a run of another configuration"):
        pretrain(dropping(train__epochs=9, optim__lr=1.0), planned)


def test_a_damaged_state_is_mended_before_it_is_extended(dropping, tmp_path):
    pretrain(dropping(), tmp_path)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UsageError, match="not finished"):
        pretrain(dropping(), tmp_path, extend=1)
    pretrain(dropping(), tmp_path)
    pretrain(dropping(), tmp_path, extend=1)
    assert [row["iteration"] for row in rows(tmp_path)] == [*range(1, 10)]


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "many", ""])
def test_the_command_line_refuses_what_is_no_number_of_epochs(xdino, tmp_path, wrong):
    code, out, error = xdino("pretrain", "debug", "--run", tmp_path / "run", "--extend", wrong)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "--extend" in error
    assert not (tmp_path / "run").exists()


def test_the_command_line_extends(dropping, planned, tmp_path, xdino):
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(dropping()))
    command = ("pretrain", tmp_path / "recipe.yaml", "--run", tmp_path / "run")
    code, _, error = xdino(*command, "--extend", 1)
    assert (code, error.count("\n")) == (2, 1)
    assert xdino(*command)[0] == 0
    for epochs in (1, 2):
        code, out, error = xdino(*command, "--extend", epochs)
        assert (code, out.split()) == (0, [str(tmp_path / "run" / "backbone.safetensors")]), error
    assert weights(tmp_path / "run") == weights(planned)
    code, _, error = xdino(*command)
    assert code == 0
    assert "left alone (--extend N adds epochs)" in error


def test_two_processes_extend_alike(images, tmp_path):
    """Both know of it; the run planned so from the start has the same bytes."""
    small = {
        "data.path": images, "train.epochs": 1, "train.batch_size": 5, "evaluate.every": 0,
        "runtime.log_every": 1, "crops.mean": "null", "crops.std": "null", "runtime.workers": 1,
    }  # fmt: skip
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    worker = Path(__file__).with_name("extending_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(worker), str(tmp_path), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(tmp_path / "planned")
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [(start["iteration"], start["processes"]) for start in starts] == [(0, 2), (2, 2)]
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
