"""`xdino.pretrain`: what it asks of the trainer, and what it refuses before anything is written."""

import dataclasses

import pytest

import xdino as api
from xdino import config as configuration
from xdino import pretraining
from xdino.job import LinesListener, Listener


@pytest.fixture
def asked(monkeypatch, make_run):
    """What the trainer was called with; it leaves a tiny backbone."""
    calls = []

    def pretrain(config, run_dir, evaluator=None, listener=None, command=None, stop=None):
        from pathlib import Path

        calls.append((config, evaluator, listener))
        make_run(Path(run_dir))

    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    return calls


def test_a_recipe_settings_and_epochs(asked, photos, tmp_path, capsys):
    settings = {"optim.lr": 1e-3, "crops.global_scale": (0.5, 1.0), "head.use_bn": True}
    model = api.pretrain(photos, tmp_path / "run", epochs=7, settings=settings, quiet=True)
    assert model.origin.facts["iteration"] == 7
    assert not model.training
    ((config, evaluator, listener),) = asked
    assert (config.data.path, config.train.epochs, config.optim.lr) == (str(photos), 7, 1e-3)
    assert (config.crops.global_scale, config.head.use_bn) == ((0.5, 1.0), True)
    assert config.head.prototypes == configuration.load("small_data").head.prototypes
    assert (evaluator, type(listener)) == (None, Listener)
    assert capsys.readouterr().err == ""


def test_a_whole_configuration_and_an_evaluator(asked, tmp_path, capsys):
    whole = configuration.load("debug", {"optim.lr": "2e-3"})
    for evaluator in (None, lambda backbone: {"number": 1.0}):
        api.pretrain("fashion_mnist_sample", tmp_path / "run", config=whole, evaluator=evaluator)
    assert asked[0][0] == dataclasses.replace(whole)
    assert asked[1][1] is not None
    assert type(asked[0][2]) is LinesListener
    assert capsys.readouterr().err.count("need evaluator=") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "debgu"}, 'did you mean "debug"'),
        ({"settings": {"optim.lrr": 1}}, 'optim.lrr is not a known key: did you mean "lr"'),
        ({"settings": {"lr": 1}}, 'called section.key, got "lr": did you mean "optim.lr"'),
        ({"settings": {"optim.lr": "fast"}}, "optim.lr"),
        ({"settings": {"optim.lr": True}}, "takes a number, got True"),
        ({"epochs": 0}, "train.epochs"),
        ({"epochs": 2.5}, "train.epochs"),
        ({"data": "nowhere"}, "nowhere"),
        ({"settings": {"runtime.device": "tpu"}}, "choose auto, cpu"),
    ],
)
def test_what_cannot_be_is_a_value_error_and_leaves_nothing(tmp_path, photos, options, message):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        api.pretrain(**{"data": photos, "run": run, "quiet": True, **options})
    assert not run.exists()


def test_lines_say_how_it_goes(capsys, monkeypatch):
    listener = LinesListener()
    facts = {"iteration": 0, "iterations": 9, "images": 1234, "steps_per_epoch": 3}
    listener.started({**facts, "data": "photos", "device": "cpu"})
    for iteration in range(1, 10):
        listener.step({"iteration": iteration, "epoch": 1, "loss": 2.5, "lr": 0.1})
    listener.step({"iteration": 9, "epoch": 1, "knn_top1": 50.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pretraining on 1,234 images of photos: iteration 0 of 9")
    assert len(lines) == 4, "the first, the last, and what is a score"
    assert lines[1:3] == [f"epoch 1 · iteration {i}/9 · loss 2.5 · lr 0.1" for i in (1, 9)]
    assert lines[3].endswith("knn_top1 50")
