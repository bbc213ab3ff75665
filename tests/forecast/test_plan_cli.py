"""`xdino plan`, typed."""

import json

import pytest

from xdino_launch.forecasting import trials


def test_a_cluster_of_gpus_is_forecast_anywhere(xdino):
    code, out, err = xdino(
        "plan", "imagenet_s12_p16", "--device", "h100", "--gpus", 64, "--nodes", 8
    )
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for part in ("46,800 steps of 8,192 images", "64 x h100 on 8 machines, bf16", "TFLOP",
                 "cores a machine", "a step, sent by each GPU", "1,281,167 images",
                 "as one H100 did"):  # fmt: skip
        assert part in text, part
    assert max(map(len, out.splitlines())) <= 80


def test_what_does_not_fit_says_what_would(xdino):
    code, out, _ = xdino(
        "plan", "debug", "--device", "t4", "--images", 10**6, "--train.batch_size", 200_000
    )
    assert code == 0
    assert "does not fit into the memory: lower train.batch_size" in " ".join(out.split())


def test_json(xdino):
    code, out, _ = xdino("plan", "debug", "--device", "a100", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["iterations"] == 100
    assert told["step_seconds"] > 0
    assert told["assumptions"]
    assert told["disk_bytes"] == sum(told["disk"].values())


def test_this_machine_is_timed_unless_told_otherwise(xdino, monkeypatch):
    monkeypatch.setattr(trials, "STEPS", 4)
    monkeypatch.setattr(trials, "SECONDS", 0.1)
    monkeypatch.setattr(trials, "in_a_process", lambda call, *arguments: call(*arguments))
    small = ("--train.batch_size", 20, "--runtime.device", "cpu")
    code, out, err = xdino("plan", "debug", *small)
    assert code == 0, err
    assert "steps of 20 images timed here" in " ".join(out.split())
    code, out, err = xdino("plan", "debug", "--no-steps", *small)
    assert (code, err) == (0, "")
    assert "no step was timed" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--gpus", 2, "--device", "cpu"), "name the GPUs, --device h100"),
        (("--gpus", 9, "--nodes", 2, "--device", "h100"), "cannot be shared out"),
        (("--device", "h1oo"), 'no device is called "h1oo": did you mean "h100"'),
        (("--data.path", "/nowhere/at/all"), "does not exist"),
        (("--images", 5, "--device", "h100"), "lower the batch size"),
        (("--train.epoch", 5), "epochs"),
    ],
)
def test_mistakes_are_sentences(xdino, options, sentence):
    code, out, err = xdino("plan", "debug", *options)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_without_data_their_number_is_asked_for(xdino):
    code, _, err = xdino("plan", "small_data", "--device", "h100")
    assert code == 2
    assert "--images N" in err
