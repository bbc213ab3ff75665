"""Configuration: strict, every mistake at once, the nearest name for each."""

import dataclasses
from pathlib import Path

import pytest

from xdino import config
from xdino.config import recipe_files
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


def leaf(key, text, tmp_path=None):
    """The value of `key` given as text on the command line and, in the same words, by a recipe."""
    section, name = key.split(".")
    found = getattr(getattr(config.load("debug", {key: text}), section), name)
    if tmp_path is not None:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"{section}:\n  {name}: {text}\n")
        assert getattr(getattr(config.load(str(path)), section), name) == found
    return found


@pytest.mark.parametrize(
    "text",
    ["photos #1", "@x", "*x", "%x", "[2024] x", "2024", "no", "~", "null", "a: b", "'x", "&a"],
)
def test_a_string_key_takes_the_text_as_it_is(text, tmp_path):
    assert leaf("data.path", text) == text
    path = tmp_path / "recipe.yaml"  # and it comes back from what a run writes down
    path.write_text(config.to_yaml(config.load("debug", {"data.path": text, "train.init": text})))
    again = config.load(str(path))
    assert again.data.path == text
    assert again.train.init == (None if text in ("~", "null") else text)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.epochs", "010", 10), ("optim.lr", "1e-3", 1e-3), ("optim.lr", "5", 5.0),
        ("optim.lr", ".5", 0.5), ("runtime.wandb", "off", "off"), ("model.patch_size", "8", 8),
        ("head.norm_last_layer", "no", False), ("head.norm_last_layer", "1", True),
        ("runtime.compile", "Off", False), ("model.eta", "~", None), ("model.eta", "null", None),
        ("evaluate.linear", "none", None), ("optim.warmup_epochs", "05%", "05%"),
        ("optim.warmup_epochs", "0.5", 0.5), ("crops.global_scale", "[0.3, 1.0]", (0.3, 1.0)),
        ("train.init", "null", None), ("train.init", "none", "none"), ("evaluate.data", "2024", "2024"),
        ("runtime.wandb", "no", "off"), ("runtime.wandb", "False", "off"),
        ("runtime.wandb", "on", "online"), ("runtime.wandb", "yes", "online"),
        ("runtime.wandb", "offline", "offline"),
    ],
)  # fmt: skip
def test_texts_mean_the_same_in_recipes_and_on_the_command_line(key, text, value, tmp_path):
    assert leaf(key, text, tmp_path) == value
    assert type(leaf(key, text)) is type(value)


def test_tuples_need_no_brackets():
    assert leaf("crops.global_scale", "0.3,1.0") == (0.3, 1.0)
    assert leaf("crops.mean", "0.5") == (0.5,)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *((key, text) for key in ("optim.lr", "train.epochs", "model.depth")
          for text in ("1:30", "on", "true", "0x10", "1_000", "nan", "inf", ".inf", "٣", "1e999", "")),
        ("train.seed", "12345678901234567890"), ("train.seed", "9" * 5000), ("train.epochs", "1e2"),
        ("optim.warmup_epochs", "-1"), ("optim.warmup_epochs", "nan"), ("optim.warmup_epochs", "-5%"),
        ("loss.student_temp", "0"), ("crops.std", "nan"), ("crops.mean", "inf"), ("model.in_chans", "0"),
        ("model.in_chans", "17"), ("head.prototypes", "99999999999999"), ("head.use_bn", "maybe"),
        ("crops.global_scale", "0.5"), ("train.init", ""), ("data.path", "a\0b"), ("data.path", "\ud800"),
        ("runtime.wandb", "maybe"), ("optim.lr", "1" * 400),
    ],
)  # fmt: skip
def test_texts_that_no_key_of_its_kind_takes(key, text):
    with pytest.raises(UsageError, match=key.replace(".", r"\.")) as error:
        config.load("debug", {key: text})
    assert len(str(error.value)) < 300


def test_python_values_are_as_strict():
    for tree in (
        {"optim": {"lr": True}}, {"train": {"epochs": float("nan")}}, {"optim": {"lr": float("inf")}},
        {"data": {"path": 2024}}, {"crops": {"global_scale": [True, 1]}}, {"optim": {"lr": None}},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            config.parse(tree)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model:\n  arch: a\n  arch: b", r"line 3: arch is there already, in line 2"),
        ("model: {}\noptim: {}\nmodel: {}", r"line 3: model is there already, in line 1"),
        ("optim: {}\noptimizer: {lr: 1}", "optim is given twice"),
        ("loss: {center_momentum: 0.5, centre_momentum: 0.6}", "centre_momentum is given twice"),
        ("a: &a [x]\nb: *a", "line 1: anchors and aliases"),
        ("model: !!python/object/apply:os.system [ls]", "line 1: tags"),
        ("model: {arch: [[[[x]]]]}", "too deep"),
        ("[" * 50_000, "must hold sections|too deep|is not YAML"),
        ("model: {arch: x}\n---\nmodel: {arch: y}", "line 2: a second document"),
        ("? [a]\n: b", "a key must be a word"),
        ("model:\n\tarch: x", "is not YAML"),
        ("optim.lr: 1", "write lr below optim:"),
        ("# " + "x" * 200_000, "larger than"),
    ],
)  # fmt: skip
def test_recipes_that_say_something_twice_or_are_no_recipes(tmp_path, text, sentence):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        config.load(str(path))


def test_an_alias_bomb_fails_fast(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="anchors") as error:
        config.load(str(path))
    assert len(str(error.value)) < 300


def test_files_that_are_no_text(tmp_path):
    for name, content in (("latin", b"data: {path: \xe9}"), ("wide", "data:".encode("utf-16"))):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content)
        with pytest.raises(UsageError, match="no text in UTF-8"):
            config.load(str(path))
    (tmp_path / "zero.yaml").write_bytes(b"data: {path: \0}")
    with pytest.raises(UsageError, match="is not YAML"):
        config.load(str(tmp_path / "zero.yaml"))
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("loop.yaml", "folder.yaml", "x" * 300, "a\0b", "/dev/null", "--optim.lr"):
        with pytest.raises(UsageError):
            config.load(str(tmp_path / name) if "yaml" in name else name)
    (tmp_path / "bom.yaml").write_bytes("\ufefftrain: {epochs: 30}".encode())
    assert config.load(str(tmp_path / "bom.yaml")).train.epochs == 30


def test_others_spellings_are_understood():
    c = config.load("debug", {"optimizer.lr": "0.5", "loss.center_momentum": "0.8"})
    assert (c.optim.lr, c.loss.centre_momentum) == (0.5, 0.8)
    assert config.parse({"optimiser": {"lr": 0.25}}).optim.lr == 0.25


def test_options_that_cancel_each_other():
    for key in ("compile", "activation_checkpointing"):
        with pytest.raises(UsageError, match=rf"runtime\.{key} cancel each other"):
            config.parse({"runtime": {"kernels": "fused", key: True}})
        assert config.unfused(config.parse({"runtime": {key: True}})) == [f"runtime.{key}"]
    with pytest.raises(
        UsageError, match=r"crops\.local_size is 64, larger than crops\.global_size"
    ):
        config.parse({"crops": {"global_size": 32, "local_size": 64}})
    assert config.parse({"crops": {"global_size": 32, "local_size": 64, "local_count": 0}})


def test_what_may_change_when_a_run_is_continued():
    def differing(**sections):
        return [
            key.split(" ")[0]
            for key in config.differing_keys(config.Config(), config.parse(sections))
        ]

    assert differing(evaluate={"every": 5, "data": "x", "linear": "grid", "limit": 5}) == []
    assert differing(train={"init": "x"}, data={"path": "x", "max_bad_share": 0.5}) == []
    assert differing(evaluate={"input_size": 64, "resize": 70}) == [
        "evaluate.input_size",
        "evaluate.resize",
    ]
    assert differing(data={"max_pixels": 5}, train={"seed": 1}) == ["data.max_pixels", "train.seed"]


def test_a_key_below_a_section_that_is_a_text(tmp_path):
    (tmp_path / "recipe.yaml").write_text("optim: fast\n")
    for name, overrides in (
        (str(tmp_path / "recipe.yaml"), {"optim.lr": "1e-3"}),
        ("debug", {"optim": "fast", "optim.lr": "1e-3"}),
    ):
        with pytest.raises(UsageError, match="section"):
            config.load(name, overrides)


def test_an_installed_wheel_has_its_recipes_inside(tmp_path, monkeypatch):
    assert config.recipes_dir() == Path(__file__).parents[2] / "configs"
    package = tmp_path / "site-packages" / "xdino"
    monkeypatch.setattr(recipe_files, "__file__", str(package / "config" / "recipe_files.py"))
    (package / "configs").mkdir(parents=True)  # where the wheel puts them, beside the code
    (package / "configs" / "mine.yaml").write_text("optim:\n  lr: 1e-3\n")
    assert config.recipes() == ["mine"]
    assert config.load("mine").optim.lr == 1e-3
