"""The grid of probes: each head is the probe trained alone, and val has no say in the choice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from xdino import xcit
from xdino.backbone import Spec
from xdino.errors import RunFailed, UsageError
from xdino_eval import linear
from xdino_eval.backbone_tokens import PooledTokens
from xdino_eval.features import Features
from xdino_eval.linear import grid as grids
from xdino_eval.linear import stacked_heads as heads_of
from xdino_eval.linear.grid import Grid, grid_probe, grid_probe_features
from xdino_eval.linear.sgd import OverImages, Sgd, new_head, train_head
from xdino_eval.linear.stacked_heads import Heads, top1_of_heads, train_heads
from xdino_eval.transform import EvalTransform


@pytest.fixture
def points():
    """points(count, width): noisy points around one centre for each of four classes."""

    def make(count: int = 200, width: int = 12, seed: int = 0) -> Features:
        centres = np.random.default_rng(9).normal(size=(4, width))
        rng = np.random.default_rng(seed)
        which = rng.integers(4, size=count)
        table = centres[which] + 1.2 * rng.normal(size=(count, width))
        return Features(
            torch.from_numpy(table.astype(np.float32)),
            torch.from_numpy(which * 3),
            torch.arange(count),
            data="points",
            transform="none",
        )

    return make


@pytest.fixture
def small_xcit() -> nn.Module:
    with torch.random.fork_rng():
        network = xcit.XCiT(patch_size=8, embed_dim=16, depth=1, num_heads=2)
    network.spec = Spec("", 3, {}, 24, 28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return network.eval()


def alone(batches, width: int, classes: int, how: Sgd) -> nn.Linear:
    head = new_head(width, classes, how.seed, "cpu")
    train_head(head, batches, how)
    return head


@pytest.mark.parametrize("decays", [(0.0,), (0.0, 0.03)])
def test_every_head_is_the_probe_trained_alone(decays):
    data = [(torch.randn(16, 20), torch.randint(5, (16,))) for _ in range(6)]

    def batches(epoch: int):
        return iter(data[epoch % 2 :: 2])

    how = Sgd(epochs=5, batch_size=16, seed=4)
    grid = Grid(lrs=(0.01, 0.3, 3.0), weight_decays=decays, features=("class", "patches", "both"))
    columns = grid.columns(20)
    stacks = grids.new_stacks(grid, columns, 5, how.seed, "cpu")
    train_heads(stacks, batches, columns, [lr for lr, _ in grid.pairs], how)
    for name, place in columns.items():
        assert stacks[name].weight.shape == (3 * len(decays), 5, 20 if name == "both" else 10)

        def own(epoch: int, place: slice = place):
            return ((x[:, place], target) for x, target in batches(epoch))

        for number, (lr, decay) in enumerate(grid.pairs):
            settings = Sgd(epochs=5, batch_size=16, lr=lr, weight_decay=decay, seed=4)
            single = alone(own, place.stop - place.start, 5, settings)
            head = stacks[name].head(number)
            torch.testing.assert_close(head.weight, single.weight, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(head.bias, single.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("rng_untouched")
def test_best_row_is_the_same_probe_trained_alone(points, tmp_path):
    train, val = points(), points(100, seed=1)
    how = Sgd(epochs=6, batch_size=32)
    done = grid_probe_features(train, val, how=how)
    row = done.row
    done.probe.save(tmp_path / "head.safetensors")
    assert row.protocol == "linear, SGD grid on features"
    assert row.settings["lrs"] == list(grids.LRS)
    assert len(row.settings["holdout_top1_of_grid"]) == 13
    lr, best = row.settings["lr"], row.settings["holdout_top1"]
    scores = list(row.settings["holdout_top1_of_grid"].values())
    assert best == max(scores)
    assert lr == grids.LRS[scores.index(best)]
    kept, held = grids.split(train.labels.numpy() // 3, Grid(), how.seed)
    assert (row.train_size, row.settings["holdout_size"]) == (len(kept), len(held)) == (180, 20)

    part = Features(train.features[kept], train.labels[kept], train.indices[kept], data="points")
    trained = linear.sgd_probe_features(part, val, Sgd(epochs=6, batch_size=32, lr=lr))
    trained.probe.save(tmp_path / "single.safetensors")
    single = trained.row
    assert (row.top1, row.top5) == (single.top1, single.top5)
    same = set(single.settings) - {"lr"}
    assert {name: row.settings[name] for name in same} == {
        name: single.settings[name] for name in same
    }
    with (
        safe_open(tmp_path / "head.safetensors", "pt") as ours,
        safe_open(tmp_path / "single.safetensors", "pt") as theirs,
    ):
        for name in ("weight", "bias", "classes"):
            torch.testing.assert_close(
                ours.get_tensor(name), theirs.get_tensor(name), rtol=1e-5, atol=1e-6
            )
        assert ours.metadata()["features"] == "class"


def test_val_has_no_say_in_the_choice(points):
    train, val = points(), points(60, seed=1)
    grid = Grid(weight_decays=(0.0, 0.1), features=("class", "patches", "both"))
    how = Sgd(epochs=3, batch_size=32)
    row = grid_probe_features(train, val, grid, how).row
    assert len(row.settings["holdout_top1_of_grid"]) == 3 * 13 * 2
    wrong = Features(-val.features, val.labels.flip(0), val.indices, data="points")
    other = grid_probe_features(train, wrong, grid, how).row
    assert other.settings == row.settings
    assert other.top1 != row.top1


@pytest.mark.parametrize("features", [("class",), ("patches",), ("both",), grids.FEATURES])
def test_tokens_of_one_forward_pass(small_xcit, features):
    images = torch.randn(3, 3, 24, 32)
    with torch.no_grad():
        out = PooledTokens(small_xcit, features)(images)
        token, mean = small_xcit(images), small_xcit.patch_tokens(images)[0].mean(1)
    expected = {"class": token, "patches": mean, "both": torch.cat((token, mean), 1)}
    for name, place in Grid(features=features).columns(out.shape[1]).items():
        torch.testing.assert_close(out[:, place], expected[name])
    assert out.shape[1] == (32 if grids.needs_both(features) else 16)


@pytest.mark.usefixtures("rng_untouched")
def test_grid_over_images(small_xcit, make_source):
    train = make_source(120, bad=(4,), classes=3)
    val = make_source(18, bad=(1, 2), classes=3, seed=1)
    transform = EvalTransform.of(small_xcit)
    weights = {name: value.clone() for name, value in small_xcit.state_dict().items()}
    small_xcit.train()
    grid = Grid(lrs=(1.0, 10.0, 100.0), features=("class", "both"))
    how = Sgd(epochs=6, batch_size=8)
    rows = [
        grid_probe(OverImages(small_xcit, train, val, transform, workers=workers), grid, how).row
        for workers in (1, 3)
    ]
    assert small_xcit.training
    assert all(torch.equal(value, weights[name]) for name, value in small_xcit.state_dict().items())
    assert rows[0].settings == rows[1].settings, "threads change nothing"
    assert (rows[0].top1, rows[0].top5) == (rows[1].top1, rows[1].top5)
    chosen = rows[0].settings
    assert rows[0].top1 > 60
    assert rows[0].train_size + chosen["holdout_size"] == 119
    assert rows[0].val_size == 16
    assert rows[0].notes[:2] == [f"{n} images of stand-in could not be read" for n in (1, 2)]

    lone = Grid(lrs=(chosen["lr"],), features=(chosen["features"],))
    single = grid_probe(OverImages(small_xcit, train, val, transform), lone, how).row
    assert (single.top1, single.top5) == (rows[0].top1, rows[0].top5)
    assert single.settings["holdout_top1"] == chosen["holdout_top1"]


class Interrupted(Exception):
    """Stands for a machine that goes away."""


def interrupt_after(epochs: int):
    def progress(done: int, _: int) -> None:
        if done == epochs:
            raise Interrupted

    return progress


@pytest.mark.parametrize("probe", [linear.sgd_probe, grid_probe])
def test_an_interrupted_probe_goes_on(probe, frozen, make_source, tmp_path):
    train, val = make_source(40, classes=3), make_source(12, classes=3, seed=1)
    how = Sgd(epochs=5, batch_size=8, lr=2.0)
    images = OverImages(frozen, train, val, EvalTransform.of(frozen))
    kept = replace(images, keep_in=tmp_path / "kept")
    whole = probe(images, how=how)
    with pytest.raises(Interrupted):
        probe(replace(kept, progress=interrupt_after(3)), how=how)
    (left,) = (tmp_path / "kept").iterdir()
    probe(kept, how=Sgd(epochs=2, batch_size=8))
    assert left.exists(), "another probe neither takes it up nor removes it"
    epochs: list[int] = []
    parts = probe(replace(kept, progress=lambda done, _: epochs.append(done)), how=how)
    assert epochs == [4, 5]
    parts.settled()
    assert not left.exists()
    assert torch.equal(whole.probe.weight, parts.probe.weight)
    assert torch.equal(whole.probe.bias, parts.probe.bias)
    assert (parts.row.top1, parts.row.settings) == (whole.row.top1, whole.row.settings)
    assert parts.row.notes[-1].startswith("went on from epoch 3")
    left.write_bytes(b"no such thing")
    with pytest.raises(RunFailed, match="unfinished probe, is damaged"):
        probe(kept, how=how)


def test_a_head_that_diverges_hurts_no_other(points):
    train, val = points(), points(60, seed=1)
    how = Sgd(epochs=3, batch_size=32)
    calm = grid_probe_features(train, val, Grid(lrs=(0.01, 0.1)), how).row
    row = grid_probe_features(train, val, Grid(lrs=(0.01, 0.1, 1e38)), how).row
    assert (row.top1, row.settings["lr"]) == (calm.top1, calm.settings["lr"])
    assert row.settings["holdout_top1_of_grid"]["class, lr 1e+38, wd 0.0"] is None
    assert "class, lr 1e+38, wd 0.0: diverged" in row.notes
    with pytest.raises(RunFailed, match="every probe of the grid diverged"):
        grid_probe_features(train, val, Grid(lrs=(1e38,)), how)


def test_weights_that_are_finite_and_overflow_are_no_choice(points):
    heads = Heads(new_head(12, 4, 0, "cpu"), torch.zeros(2))
    heads.weight[1] = 3e38
    x, target = points(20).features, points(20).labels // 3
    top1 = top1_of_heads(heads, x, target)
    assert top1[0] is not None
    assert top1[1] is None


@pytest.mark.parametrize("threads", [2, 5, 40])
def test_heads_shared_out_over_threads_are_the_same(threads):
    data = [(torch.randn(16, 20), torch.randint(5, (16,))) for _ in range(4)]
    grid = Grid(lrs=(0.01, 0.3, 3.0), weight_decays=(0.0, 0.02), features=("class", "both"))
    columns, how = grid.columns(20), Sgd(epochs=3, batch_size=16)
    found = []
    for number in (1, threads):
        stacks = grids.new_stacks(grid, columns, 5, 0, "cpu")
        before = torch.get_num_threads()
        train_heads(stacks, lambda epoch: iter(data), columns, grid.head_lrs, how, threads=number)
        assert torch.get_num_threads() == before
        found.append(stacks)
    for name in columns:
        torch.testing.assert_close(found[0][name].weight, found[1][name].weight)
        torch.testing.assert_close(found[0][name].momenta[0], found[1][name].momenta[0])


def test_threads_are_for_products_that_are_worth_one():
    grid = Grid()
    columns = grid.columns(384)

    def threads(classes: int) -> int:
        return heads_of.threads_for(grids.new_stacks(grid, columns, classes, 0, "cpu"), 256, 64)

    assert (threads(2), threads(100), threads(1000)) == (1, 12, 13)


def test_top1_of_heads_does_not_depend_on_blocks(monkeypatch):
    heads = Heads(new_head(6, 3, 0, "cpu"), torch.zeros(4))
    heads.weight = torch.randn(4, 3, 6)
    x, target = torch.randn(50, 6), torch.randint(3, (50,))
    expected: Tensor = torch.einsum("gkd,nd->gnk", heads.weight, x).argmax(2)
    right = (100.0 * (expected == target).float().mean(1)).tolist()
    assert top1_of_heads(heads, x, target) == pytest.approx(right)
    monkeypatch.setattr("xdino_eval.linear.stacked_heads.SCORED_AT_ONCE", 100)
    assert top1_of_heads(heads, x, target) == pytest.approx(right)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"features": ("clas",)}, 'no choice of features "clas"; did you mean "class"'),
        ({"features": ("both", "both")}, "features must name each value once"),
        ({"lrs": ()}, "lrs must name each value once"),
        ({"lrs": (0.1, 0.1)}, "lrs must name each value once"),
        ({"lrs": (0.0, 0.1)}, "learning rates must be positive"),
        ({"lrs": (float("nan"),)}, "learning rates must be positive"),
        ({"weight_decays": (-0.1,)}, "weight decays must be 0 or more"),
        ({"holdout": 1.0}, "holdout must lie between 0 and 1"),
    ],
)
def test_senseless_grids_are_refused(wrong, sentence):
    with pytest.raises(UsageError, match=sentence):
        Grid(**wrong)


def test_refusals(frozen, make_source, points):
    transform = EvalTransform.of(frozen)
    train, val = make_source(30), make_source(6)
    with pytest.raises(UsageError, match=r"need patch tokens, and a Frozen gives none"):
        grid_probe(OverImages(frozen, train, val, transform), Grid(features=("class", "both")))
    with pytest.raises(UsageError, match="no labels to train a probe"):
        grid_probe(OverImages(frozen, train, make_source(3, labelled=False), transform))
    with pytest.raises(UsageError, match="4 training images are too few to hold out"):
        grid_probe(OverImages(frozen, make_source(4), val, transform))
    with pytest.raises(UsageError, match="too few"):
        grid_probe_features(points(3), points(3))
    bare = Features(torch.ones(30, 4), None, torch.arange(30), data="points")
    with pytest.raises(UsageError, match="no labels"):
        grid_probe_features(bare, points(3))
