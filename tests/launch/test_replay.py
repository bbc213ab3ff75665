"""`xdino replay`: a step of a run made again, from a state or from the start, and what is said of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xdino import config, data, pretraining
from xdino.errors import RunFailed
from xdino_launch import replay as room


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(20):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def tiny(images):
    """tiny(**overrides) -> a configuration of five steps; keys with "__" for the dot."""

    def make(**overrides) -> config.Config:
        tree = {
            "model": {"arch": "xcit_nano_12_p4", "embed_dim": 32, "depth": 1, "num_heads": 2,
                      "drop_path": 0.3},
            "head": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 8},
            "crops": {"global_size": 16, "local_size": 8, "local_count": 2},
            "data": {"path": str(images)},
            "optim": {"warmup_epochs": 0},
            "train": {"epochs": 1, "batch_size": 4},
            "runtime": {"device": "cpu", "workers": 0, "log_every": 1, "checkpoint_every": 2},
        }  # fmt: skip
        for key, value in overrides.items():
            section, leaf = key.split("__")
            tree.setdefault(section, {})[leaf] = value
        return config.parse(tree)

    return make


@pytest.fixture
def break_at(monkeypatch):
    """break_at(5): a NaN in the last view of that step, in the run and in its replay."""
    plain = pretraining.to_device

    def use(number, view=-1):
        def to_device(batch, *rest):
            groups = plain(batch, *rest)
            if batch.iteration + 1 == number:
                groups[-1][view, 0, 0, 0, 0] = float("nan")
            return groups

        for module in (pretraining, room):
            monkeypatch.setattr(module, "to_device", to_device)

    return use


def contents(run):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_recorded_step_is_made_again_from_the_state_before_it(tiny, tmp_path, break_at, xdino):
    break_at(4)
    run = tmp_path / "run"
    with pytest.raises(RunFailed, match=r"the loss became nan \(iteration 4\)"):
        pretraining.pretrain(tiny(), run)
    before = contents(run)
    code, out, _ = xdino("replay", run, "--json")
    assert code == 0
    found = json.loads(out)
    assert contents(run) == before, "the run is only read"
    assert (found["iteration"], found["from_iteration"], found["processes"]) == (4, 2, 1)
    assert found["what"] == "the loss became nan"
    assert found["loss"] == "nan"
    assert found["module"]["network"] == "student"
    assert found["module"]["name"].startswith("backbone.patch_embed.proj.0")
    assert found["module"]["inputs"] == "not finite"
    assert found["gradient"] is not None
    # Every teacher view, all student views: two global ones, two local ones of which BatchNorm
    # makes both not finite.
    bad = {(p["teacher"], p["student"]) for p in found["pairs"] if not p["finite"]}
    assert bad == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert len(found["pairs"]) == 6
    expected = data.epoch_order(20, 0, 0)[12:16].tolist()
    assert [image["index"] for image in found["images"]] == expected
    code, out, _ = xdino("replay", run)
    assert code == 0
    assert "the loss became nan" in out
    assert all(f"{index:02}.png" in out for index in expected)


@pytest.mark.parametrize("iteration", [1, 2, 3, 5])
def test_a_replayed_step_is_the_run_s_own(tiny, tmp_path, xdino, iteration):
    run = tmp_path / "run"
    # The pairs' losses are those of float32.
    own = {"train__batch_size": 2, "train__accumulate": 2, "train__precision": "fp32"}
    pretraining.pretrain(tiny(**own), run)
    torch.manual_seed(5)
    code, out, _ = xdino("replay", run, "--iteration", iteration, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["what"] is None
    told = next(row["loss"] for row in rows(run) if row["iteration"] == iteration)
    assert float(f"{found['loss']:.7g}") == told
    assert all(pair["finite"] for pair in found["pairs"])
    mean = sum(pair["loss"] for pair in found["pairs"]) / len(found["pairs"])
    assert mean == pytest.approx(found["loss"], rel=1e-4)
    _, out, _ = xdino("replay", run, "--iteration", iteration)
    assert "every number of it is finite here" in out


def test_a_gradient_that_breaks_with_a_finite_loss_is_found(tiny, tmp_path, xdino, monkeypatch):
    run = tmp_path / "run"
    build = pretraining.build_learner

    def broken(plan, **how):
        learner = build(plan, **how)
        learner.student.head.mlp[2].weight.register_hook(lambda g: g * float("nan"))
        return learner

    for module in (pretraining, room):
        monkeypatch.setattr(module, "build_learner", broken)
    with pytest.raises(RunFailed, match=r"the gradient of head.mlp.2.weight became nan"):
        pretraining.pretrain(tiny(), run)
    found = room.replay(run)
    assert found.what.startswith("the gradient of head.mlp.2.weight became nan")
    assert (found.gradient, found.module) == ("head.mlp.2.weight", None)
    assert all(pair["finite"] for pair in found.pairs)


def test_a_run_that_went_back_is_replayed_with_its_rates(tiny, tmp_path, break_at):
    break_at(4)
    run = tmp_path / "run"
    pretraining.pretrain(tiny(train__nonfinite="rollback"), run)
    found = room.replay(run, 4)
    assert found.what == "the loss became nan"


def test_what_cannot_be_replayed_is_a_sentence(tiny, tmp_path, xdino):
    code, _, err = xdino("replay", tmp_path)
    assert (code, "is not a run" in err) == (2, True)
    run = tmp_path / "run"
    pretraining.pretrain(tiny(), run)
    code, _, err = xdino("replay", run)
    assert code == 2
    assert "name a step with --iteration" in err
    code, _, err = xdino("replay", run, "--iteration", 99)
    assert (code, "goes from 1 to 5" in err) == (2, True)
    (run / "nonfinite.json").write_text("[{")
    code, _, err = xdino("replay", run)
    assert (code, "nonfinite.json is damaged" in err) == (1, True)
    assert Path(run / "backbone.safetensors").exists()
