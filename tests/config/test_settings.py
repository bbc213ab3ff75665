"""Every key says what it is: for the help, above the key, and on a page."""

import re
from pathlib import Path

import pytest
import yaml

from xdino import config
from xdino.config import keys as described
from xdino.errors import UsageError
from xdino_transfer.dense_training.detecting.recipe import Detection
from xdino_transfer.dense_training.segmenting.recipe import Segmentation
from xdino_transfer.finetuning.recipe import FineTuning

ALL = [key for keys in config.settings().values() for key in keys]
PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
OTHERS = (
    (FineTuning, "eval/xdino_transfer/finetuning/recipe.py"),
    (Segmentation, "eval/xdino_transfer/dense_training/segmenting/recipe.py"),
    (Detection, "eval/xdino_transfer/dense_training/detecting/recipe.py"),
)
WITH_LABELS = [key for kind, _ in OTHERS for keys in config.settings(kind).values() for key in keys]
UNITS = (
    "pixels", "epochs", "iterations", "images", "share", "probability", "factor", "number", "width",
    "micro-batches", "temperature", "learning rate", "strength", "norm", "channels", "a value a channel",
    "weight", "rounds", "directions", "square of", "seconds", "bytes",
)  # fmt: skip


def test_every_key_says_what_it_is():
    assert [key.name for key in ALL] == config.dotted_keys()
    assert [key.name for key in ALL if not key.meaning.endswith(".")] == []
    assert [section for section in config.settings() if not config.about(section)] == []
    named = [name for kind, _ in OTHERS for name in config.dotted_keys(kind)]
    assert [key.name for key in WITH_LABELS] == named
    assert [key.name for key in WITH_LABELS if not key.meaning.endswith((".", "?"))] == []
    for kind, _ in OTHERS:
        assert [name for name in config.settings(kind) if not config.about(name, kind)] == []


def test_every_number_has_its_unit():
    numbers = [key for key in ALL if re.search("number", key.values)]
    assert len(numbers) > 50
    numbers += [key for key in WITH_LABELS if re.search("number", key.values)]
    bare = [k.name for k in numbers if not any(unit in k.meaning.lower() for unit in UNITS)]
    assert bare == []


@pytest.mark.parametrize(
    ("name", "metavar", "values"),
    [
        ("runtime.kernels", "auto|plain|fused", "auto, plain or fused"),
        ("model.in_chans", "N", "whole number from 1 to 16, or null"),
        ("head.use_bn", "true|false", "true or false"),
        ("train.epochs", "N", "whole number from 1"),
        ("loss.centre_momentum", "NUMBER", "number from 0 to 1"),
        ("model.eta", "NUMBER", "number above 0 and at most 10000, or null"),
        ("model.drop_path", "NUMBER", "number from 0 and below 1"),
        ("optim.warmup_epochs", "NUMBER|SHARE%", "number from 0, or a share of the run such as 10%"),
        ("data.path", "TEXT", "text"),
        ("crops.local_scale", "NUMBER,NUMBER",
         "2 values with a comma between them, each number above 0 and at most 1"),
        ("evaluate.protocols", "knn|quality|logistic|grid|patch-knn|patch-linear,...",
         "values with a comma between them, each knn, quality, logistic, grid, patch-knn or "
         "patch-linear"),
    ],
)  # fmt: skip
def test_types_in_words(name, metavar, values):
    (key,) = [key for key in ALL if key.name == name]
    assert (key.metavar, key.values) == (metavar, values)


def test_defaults_are_written_as_the_command_line_takes_them():
    given = {key.name: key.default_text for key in ALL}
    assert config.load("debug", given) == config.Config()


def test_a_commented_configuration_is_a_recipe_of_the_same_lines(tmp_path):
    for name in config.recipes():
        before = config.load(name)
        text = config.commented(before, config.comments(name))
        lines = [line for line in text.splitlines() if line.strip() and "#" not in line]
        assert yaml.safe_load("\n".join(lines)) == config.to_tree(before)
        assert max(map(len, text.splitlines())) <= 80
        (tmp_path / "again.yaml").write_text(text)
        assert config.load(str(tmp_path / "again.yaml")) == before


def test_what_a_recipe_says_of_its_keys_is_kept(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "# a head\n\noptimizer:\n  # found by trying;\n  # twice\n  lr: 1e-3  # at 256\n"
        'data:\n  path: "a # b"\ntrain: {epochs: 20}  # a flow\nloss:\n'
    )
    told = {"optim.lr": "found by trying; twice at 256"}
    assert config.comments(str(recipe)) == told
    assert "  # found by trying; twice at 256\n  lr: 0.001\n" in config.commented(
        config.load(str(recipe)), told
    )
    recipe.write_text("")
    assert config.comments(str(recipe)) == {}
    with pytest.raises(UsageError, match="cannot read"):
        config.comments(str(tmp_path / "none.yaml"))


def test_heads_are_read_to_their_end():
    assert config.head("fashion_mnist_curriculum")["expected"].endswith("README.md)")
    for name in config.recipes(None):
        assert set(config.head(name)) == {"about", *config.HEAD}, name
        assert all(config.head(name).values())


def test_without_the_source_the_keys_are_there_all_the_same(monkeypatch):
    def gone(module):
        raise OSError("could not get source code")

    described._texts.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(described.inspect, "getsource", gone)
        keys = [key for part in config.settings().values() for key in part]
    described._texts.cache_clear()
    assert [key.name for key in keys] == config.dotted_keys()
    assert {key.meaning for key in keys} == {""}


def test_the_page_of_settings_is_that_of_the_schema():
    assert PAGE.read_text() == described.page(*OTHERS), (
        "write it anew: python tests/config/test_settings.py"
    )


if __name__ == "__main__":
    PAGE.write_text(described.page(*OTHERS))
