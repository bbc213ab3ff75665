"""The loop runs any job: a second kind, a few lines long, stops, resumes and keeps its run."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xdino import checkpoint, config, job, train
from xdino.errors import RunFailed, Stopped, UsageError
from xdino.run_directory import RunDirectory
from xdino.stepping import Stepping, StepResult


class Regression:
    """`job.Job` of a linear classifier on made points: four steps an epoch, one batch a step."""

    begins_at = 0

    def __init__(self, settings: config.Config, points: int = 32) -> None:
        self.config, self.points = settings, points

    def make_plan(self, settings):
        if self.points < settings.train.batch_size:
            raise UsageError(f"a batch of {settings.train.batch_size} needs as many points")
        self.config = settings
        self.device = torch.device("cpu")
        self.steps_per_epoch = self.points // settings.train.batch_size
        self.iterations = self.steps_per_epoch * settings.train.all_epochs
        generator = torch.Generator().manual_seed(settings.train.seed)
        self.x = torch.randn(self.points, 3, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def same_everywhere(self):
        return {"the number of points": self.points}

    def check_disk(self, run_dir):
        pass

    def build(self, from_init):
        torch.manual_seed(self.config.train.seed)
        # Dropout: a run that resumes has to draw on where it stopped.
        self.judged = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 2))
        self.stepping = Stepping(
            {"classifier": self.judged}, "classifier", "adamw", 0, "fp32", self.device
        )

    def ask_every_step(self):
        self.stepping.asks_every_step = True

    def notices(self):
        return ["made points"]

    def facts(self):
        return {"data": "points", "precision": "fp32"}

    def dimensions(self):
        return {"images": self.points}

    def open(self, known_bad):
        pass

    def start(self, iteration):
        pass

    def step(self, number, lr_factor, diagnose, run_dir):
        first = (number - 1) % self.steps_per_epoch * self.config.train.batch_size
        rows = slice(first, first + self.config.train.batch_size)
        self.stepping.begin(self.lr(number) * lr_factor, 0.0)
        with self.stepping.exchanging(last=True), self.stepping.precision():
            loss = nn.functional.cross_entropy(self.stepping.network(self.x[rows]), self.y[rows])
        self.stepping.backward(loss)
        self.stepping.update(self.stepping.watch(loss.detach().view(1), {}))
        return StepResult(loss.detach(), {"accuracy": 50.0} if diagnose else {})

    def skip(self, number):
        pass

    def close(self):
        pass

    def check(self):
        self.stepping.check()

    images_per_step = property(lambda self: self.config.train.batch_size)
    wait_seconds = 0.0

    def columns(self, number, lr_factor):
        return {"lr": self.lr(number) * lr_factor}

    def warning(self, number, result):
        return "it guesses" if number == 1 else None

    def take_bad_report(self):
        return []

    def images_of(self, number):
        return {"indices": [number]}

    def lr(self, number):
        return 0.1

    def state_dict(self, iteration):
        return {
            "points": self.points,
            "classifier": self.judged.state_dict(),
            **self.stepping.state_dict(),
        }

    def load_state_dict(self, state, run_dir):
        if state["points"] != self.points:
            raise UsageError(f"{run_dir} was made with {state['points']} points")
        self.judged.load_state_dict(state["classifier"])
        self.stepping.load_state_dict(state)

    def exporter(self, iteration: int):
        return None

    def before_moving(self, wait):
        pass

    def export(self, path: Path, iteration: int):
        path.parent.mkdir(exist_ok=True)
        facts = {"iteration": iteration}
        told = {checkpoint.HEADER_KEY: json.dumps({"spec": {"arch": "none"}, "facts": facts})}
        save_file(self.judged.state_dict(), path, told)


class Stops(job.Listener):
    def __init__(self, at: int) -> None:
        self.at, self.notices = at, []

    def step(self, row):
        if row["iteration"] == self.at and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    def notice(self, sentence):
        self.notices.append(sentence)


@pytest.fixture
def settings():
    tree = {"train": {"epochs": 3, "batch_size": 8}, "optim": {"warmup_epochs": 0}}
    return config.parse({**tree, "runtime": {"log_every": 1, "device": "cpu"}})


def test_another_job_stops_resumes_to_the_bit_and_leaves_a_run(settings, tmp_path):
    train.run(Regression(settings), tmp_path / "whole")
    ear = Stops(5)
    with pytest.raises(Stopped, match="stopped by SIGTERM after iteration 5 of 12"):
        train.run(Regression(settings), tmp_path / "parts", listener=ear)
    assert ear.notices == ["made points", "it guesses"]
    train.run(Regression(settings), tmp_path / "parts")
    whole, parts = (
        checkpoint.load_state(tmp_path / name / checkpoint.STATE_FILE)
        for name in ("whole", "parts")
    )
    assert whole["iteration"] == parts["iteration"] == 12
    for name, value in whole["classifier"].items():
        assert torch.equal(value, parts["classifier"][name]), name
    rows = [RunDirectory(tmp_path / name).rows() for name in ("whole", "parts")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert rows[0][-1]["loss"] < rows[0][0]["loss"]
    assert set(load_file(tmp_path / "parts" / checkpoint.BACKBONE_FILE)) == {"1.weight", "1.bias"}
    starts = json.loads((tmp_path / "parts" / "environment.json").read_text())["starts"]
    assert [start["iteration"] for start in starts] == [0, 5]


def test_what_a_job_refuses_leaves_nothing(settings, tmp_path):
    with pytest.raises(UsageError, match="a batch of 8 needs as many"):
        train.run(Regression(settings, points=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["stop", "skip 2", "rollback"])
def test_another_job_has_the_policy_for_numbers_that_are_not_finite(policy, settings, tmp_path):
    class Breaks(Regression):
        def make_plan(self, settings):
            super().make_plan(settings)
            self.x[9] = float("nan")  # of the second step of every epoch

    tree = config.to_tree(settings)
    tree["train"] |= {"nonfinite": policy, "epochs": 1}
    tree["optim"]["freeze_last_layer"] = 0
    settings = config.parse(tree)
    if policy == "stop":
        with pytest.raises(RunFailed, match=r"the loss became nan \(iteration 2\)"):
            train.run(Breaks(settings), tmp_path)
    else:
        train.run(Breaks(settings), tmp_path)
        assert [r["iteration"] for r in RunDirectory(tmp_path).rows() if "skipped" in r] == [2]
    assert json.loads((tmp_path / "nonfinite.json").read_text())[0]["ranks"][0]["indices"] == [2]
