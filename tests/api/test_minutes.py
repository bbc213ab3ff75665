"""`xdino.pretrain(minutes=)`: the recipe is chosen, and the same call goes on by it."""

from dataclasses import replace

import pytest
import yaml

import xdino
from xdino.errors import UsageError
from xdino.forecast import choosing, fitting


def test_minutes_choose_a_recipe_and_the_same_call_loads_the_finished_run(
    photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(choosing, "PILOT_SECONDS", (0.2, 1.0))
    plain = fitting.length  # fills the minutes, which a busy machine may or may not have

    def short(*arguments):
        found = plain(*arguments)
        assert found.epochs > 2
        return replace(found, epochs=2)

    monkeypatch.setattr(fitting, "length", short)
    folder, run = photos, tmp_path / "run"
    tiny = {"model.depth": 1, "model.embed_dim": 32, "head.hidden_dim": 32, "head.prototypes": 32}
    tiny |= {"runtime.workers": 0, "train.batch_size": 2}
    model = xdino.pretrain(folder, run, minutes=5, settings=tiny, quiet=True)
    chosen = yaml.safe_load((run / "config.yaml").read_text())
    assert chosen["train"]["epochs"] == 2
    assert chosen["model"]["embed_dim"] == model.embed_dim == 32
    before = (run / "metrics.jsonl").read_bytes()
    again = xdino.pretrain(folder, run, minutes=5, settings=tiny, quiet=True)
    assert again.origin.sha256 == model.origin.sha256
    assert (run / "metrics.jsonl").read_bytes() == before


def test_minutes_beside_epochs_or_a_recipe_and_too_few(photos, tmp_path):
    with pytest.raises(ValueError, match="leave out config and epochs"):
        xdino.pretrain(photos, tmp_path / "a", minutes=1, epochs=2)
    with pytest.raises(UsageError, match=r"takes about .* minutes here with the smallest network"):
        xdino.pretrain(photos, tmp_path / "b", minutes=1e-4, quiet=True)
    assert not (tmp_path / "b" / "config.yaml").exists()
