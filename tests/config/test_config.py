"""Configuration: strict, every mistake at once, the nearest name for each."""

import dataclasses

import pytest

from xdino import config
from xdino.errors import UsageError


def test_defaults_are_the_published_ones():
    c = config.Config()
    published = {
        "head.prototypes": 65536, "head.hidden_dim": 2048, "head.bottleneck_dim": 256,
        "head.norm_last_layer": True, "head.use_bn": False, "loss.student_temp": 0.1,
        "loss.warmup_teacher_temp": 0.04, "loss.teacher_temp": 0.04,
        "loss.warmup_teacher_temp_epochs": 0, "loss.centre_momentum": 0.9,
        "teacher.momentum": 0.996, "teacher.momentum_end": 1.0, "optim.name": "adamw",
        "optim.lr": 5e-4, "optim.min_lr": 1e-6, "optim.warmup_epochs": 10,
        "optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "optim.clip_grad": 3.0,
        "optim.freeze_last_layer": 1, "train.epochs": 100, "train.batch_size": 64,
        "model.drop_path": 0.1, "crops.global_size": 224, "crops.global_scale": (0.4, 1.0),
        "crops.local_size": 96, "crops.local_count": 8, "crops.local_scale": (0.05, 0.4),
        "crops.global_blur": (1.0, 0.1), "crops.global_solarize": (0.0, 0.2),
        "crops.local_blur": 0.5, "crops.flip": 0.5, "crops.jitter": 0.8, "crops.brightness": 0.4,
        "crops.contrast": 0.4, "crops.saturation": 0.2, "crops.hue": 0.1, "crops.grayscale": 0.2,
    }  # fmt: skip
    for key, value in published.items():
        section, leaf = key.split(".")
        assert getattr(getattr(c, section), leaf) == value, key


def test_all_mistakes_are_reported_at_once_with_the_nearest_name():
    with pytest.raises(UsageError) as error:
        config.parse(
            {
                "model": {"archh": "x"},
                "optim": {"lrr": 1, "lr": "fast", "name": "adam"},
                "trian": {"epochs": 1},
                "loss": {"epochs": 3},
            }
        )
    text = str(error.value)
    for part in (
        'model.archh is not a known key: did you mean "arch"?',
        'optim.lrr is not a known key: did you mean "lr"?',
        "optim.lr:",
        "optim.name cannot be 'adam': did you mean \"adamw\"?",
        'trian is not a known key: did you mean "train"?',
        'loss.epochs is not a known key: did you mean "train.epochs"?',
    ):
        assert part in text, text


def test_yaml_round_trip(tmp_path):
    for name in config.recipes():
        c = config.load(name, {"optim.lr": "1e-3", "crops.global_scale": "[0.2, 0.9]"})
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml(c))
        assert config.load(str(path)) == c
        assert c.optim.lr == 1e-3


def test_warm_ups_as_shares_of_the_run():
    assert config.in_epochs("3.33%", 300) == pytest.approx(9.99)
    assert config.in_epochs(10, 300) == 10
    assert config.parse({"optim": {"warmup_epochs": "10%"}}).optim.warmup_epochs == "10%"
    with pytest.raises(UsageError, match="share of the run"):
        config.parse({"optim": {"warmup_epochs": "ten"}})


def test_warm_up_longer_than_the_run_names_both_numbers_and_the_mend():
    with pytest.raises(UsageError, match=r"optim.warmup_epochs is 10.0, longer than the run of 5"):
        config.parse({"train": {"epochs": 5}})
    with pytest.raises(UsageError, match="warmup_teacher_temp_epochs is 30"):
        config.parse({"train": {"epochs": 20}, "loss": {"warmup_teacher_temp_epochs": 30}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"crops": {"global_scale": [0.9, 0.1]}}, "must rise"),
        ({"crops": {"mean": [0.5]}}, "given together"),
        ({"model": 3}, "model is a section"),
        ({"train": {"epochs": 0}}, "train.epochs: input should be greater than or equal to 1"),
        ({"runtime": {"wandb": "onlin"}}, 'did you mean "online"'),
        ({"model": {"patch_size": 14}}, "model.patch_size cannot be 14"),
    ],
)
def test_values_that_cannot_be(tree, message):
    with pytest.raises(UsageError) as error:
        config.parse(tree)
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match='did you mean "debug"'):
        config.load("debgu")
    with pytest.raises(UsageError, match="cannot read"):
        config.load(str(tmp_path / "none.yaml"))
    for text, message in (
        ("a: [", "is not YAML"),
        ("- 1", "must hold sections"),
        ("model: 3", "sections"),
    ):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            config.load(str(path))


def test_runtime_does_not_count_as_a_difference():
    a = config.Config()
    b = dataclasses.replace(a, runtime=config.Runtime(workers=1))
    c = dataclasses.replace(a, optim=config.Optim(lr=1.0))
    assert config.differing_keys(a, b) == []
    assert config.differing_keys(a, c) == ["optim.lr (0.0005 against 1.0)"]
