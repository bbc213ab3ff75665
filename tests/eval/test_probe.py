"""Saved probes: what is written is what scored, and what does not fit is a sentence."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from xdino.errors import RunFailed, UsageError
from xdino_eval.features import Features
from xdino_eval.linear import probe as probes
from xdino_eval.linear.grid import Grid, grid_probe, grid_probe_features
from xdino_eval.linear.logistic import folded, logistic_probe
from xdino_eval.linear.probe import Probe
from xdino_eval.linear.sgd import OverImages, Sgd, held_out, sgd_probe, sgd_probe_features
from xdino_eval.transform import EvalTransform

NAMES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture
def points():
    """points(count, seed, classes): noisy points around a centre a class, labels 1, 2, 4 by default."""

    def make(count=150, seed=0, classes=(1, 2, 4), width=8) -> Features:
        centres = np.random.default_rng(5).normal(size=(10, width))
        rng = np.random.default_rng(seed)
        labels = np.array(classes)[np.arange(count) % len(classes)]
        table = centres[labels] + 0.7 * rng.normal(size=(count, width))
        return Features(
            torch.from_numpy(table.astype(np.float32)),
            torch.from_numpy(labels),
            torch.arange(count),
            data="points",
            transform="none",
        )

    return make


HOW = Sgd(epochs=3, batch_size=32, lr=0.5)
PROTOCOLS = {
    "logistic": lambda a, b: logistic_probe(a, b, cs=[0.01, 1.0]),
    "sgd-features": lambda a, b: sgd_probe_features(a, b, HOW),
    "grid-features": lambda a, b: grid_probe_features(
        a, b, Grid(lrs=(0.1, 1.0), features=("class", "patches", "both")), HOW
    ),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_saved_probe_gives_the_row_again(points, tmp_path, protocol):
    train, val = points(), points(90, seed=1)
    val.labels[:4] = 4  # some mistakes
    done = PROTOCOLS[protocol](train, val)
    done.probe.signed(NAMES, "abc").save(tmp_path / "p")
    again = Probe.load(tmp_path / "p")
    assert again.names == ("bee", "cat", "elk")
    assert again.facts["checkpoint"] == "abc"
    assert again.facts["protocol"] == done.row.protocol
    width = {"class": slice(0, 4), "patches": slice(4, 8), "both": slice(0, 8)}
    if protocol == "grid-features":
        assert again.features == done.row.settings["features"]
        val = replace(val, features=val.features[:, width[again.features]])
    row = probes.apply(again, val, NAMES)
    assert (row.top1, row.top5) == (done.row.top1, done.row.top5)
    assert 50 < row.top1 < 100
    assert (row.train_size, row.val_size) == (done.row.train_size, 90)
    assert row.settings["trained by"] == done.row.protocol


def test_classes_are_matched_by_name(points):
    train, val = points(), points(60, seed=1)
    probe = sgd_probe_features(train, val, HOW).probe.signed(NAMES, "")
    expected = probes.apply(probe, val, NAMES).top1
    renumbered = replace(val, labels=4 - val.labels)
    assert probes.apply(probe, renumbered, NAMES[::-1]).top1 == expected
    assert probes.apply(probe, points(30, seed=2, classes=(4, 1)), NAMES).top1 > 60, "a subset"
    with pytest.raises(UsageError, match=r'2 classes that .* first "bees"; did you mean "bee"'):
        probes.apply(probe, val, ("ant", "bees", "cats", "dog", "elk"))
    with pytest.raises(UsageError, match=r'1 classes that the probe was not trained on.* "3"'):
        probes.apply(replace(probe, names=()), points(30, classes=(1, 3)))
    with pytest.raises(UsageError, match="no labels"):
        probes.apply(probe, replace(val, labels=None), NAMES)
    with pytest.raises(UsageError, match="reads 8 numbers an image, and here are 5"):
        probes.apply(probe, points(30, width=5), NAMES)


def test_files_that_hold_no_probe(tmp_path):
    with pytest.raises(UsageError, match="there is no probe"):
        Probe.load(tmp_path / "none")
    (tmp_path / "text").write_text("weights")
    good = {
        "weight": torch.ones(3, 4),
        "bias": torch.ones(3),
        "classes": torch.arange(3),
    }
    wrong = {
        "other": {"patch.weight": torch.ones(2)},
        "shapes": good | {"bias": torch.ones(4)},
        "classes": good | {"classes": torch.ones(3)},
        "nan": good | {"weight": torch.full((3, 4), torch.nan)},
    }
    for name, tensors in wrong.items():
        save_file(tensors, tmp_path / name)
    for name in ("text", *wrong):
        with pytest.raises(UsageError, match="is not a saved probe"):
            Probe.load(tmp_path / name)
    save_file(good, tmp_path / "good", {"features": "class"})
    assert Probe.load(tmp_path / "good").names == (), "files without names are read"


def test_predictions(points, tmp_path):
    train, val = points(), points(12, seed=1)
    probe = sgd_probe_features(train, val, HOW).probe.signed(NAMES, "")
    images = [f"a, {n}.png" for n in range(11)] + ["\udcff.png"]  # a name that is not UTF-8
    path = tmp_path / "new" / "out.csv"
    probes.write_predictions(path, probe, val, images, NAMES)
    with open(path, newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == images
    assert [row["label"] for row in rows] == [NAMES[label] for label in val.labels]
    best = probe.scores(val.features).softmax(1)
    assert [row["prediction"] for row in rows] == [probe.names[i] for i in best.argmax(1)]
    shares = [float(row["probability"]) for row in rows]
    torch.testing.assert_close(torch.tensor(shares), best.amax(1), rtol=1e-5, atol=1e-6)
    probes.write_predictions(path, probe, replace(val, labels=None), images)
    assert ",\n" in path.read_text(errors="surrogateescape").replace("\r", ""), "no label known"


@pytest.mark.parametrize("classes", [(1, 2), (1, 2, 4)])
def test_folding_the_standardisation_changes_no_score(points, classes):
    train = points(classes=classes)
    x = train.features * 7 + 40  # far from standardised
    mean, std = x.mean(0), x.std(0)
    model = LogisticRegression(C=0.5).fit(((x - mean) / std).numpy(), train.labels.numpy())
    probe = folded(model, mean, std, np.array(classes))
    theirs = torch.from_numpy(model.predict_proba(((x - mean) / std).numpy()))
    torch.testing.assert_close(
        probe.scores(x).softmax(1), theirs, rtol=0, atol=1e-4, check_dtype=False
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bad_features_are_one_sentence(points, protocol):
    train, val = points(), points(30, seed=1)
    broken = replace(train, features=train.features.clone())
    broken.features[7, 2] = torch.inf
    run = PROTOCOLS[protocol]
    with pytest.raises(RunFailed, match=r"1 of 150 features of points are not finite.* image 7"):
        run(broken, val)
    for one, other in ((train, replace(val, labels=None)), (replace(train, labels=None), val)):
        with pytest.raises(UsageError, match="points has no labels"):
            run(one, other)
    with pytest.raises(UsageError, match="have 8 numbers, those of points 6"):
        run(train, points(width=6))
    empty = Features(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), torch.arange(0))
    with pytest.raises(UsageError, match="no image"):
        run(train, empty)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_classes_of_one_image_train_and_are_never_held_out(points, protocol):
    train, val = points(), points(60, seed=1)
    train.labels[:20] = torch.arange(100, 120)
    val.labels[:6] = 77
    notes = PROTOCOLS[protocol](train, val).row.notes
    assert "6 images of val have a class that train lacks: counted as wrong" in notes
    assert "20 classes have one training image, which is not held out" in notes
    number = np.unique(train.labels.numpy(), return_inverse=True)[1]
    for seed in range(5):
        mask = held_out(number, 0.3, seed)
        assert set(number[~mask]) == set(number)
        assert mask.sum() > 25


def test_features_of_images_that_are_not_finite(frozen, make_source):
    class Breaking(type(frozen)):
        def forward(self, images):
            return super().forward(images) / (0 if len(images) == 8 else 1)

    network = Breaking().eval()
    source, val = make_source(16), make_source(9)  # batches of 8 to train on, the last of 1
    images = OverImages(network, source, val, EvalTransform.of(network))
    for probe in (sgd_probe, grid_probe):
        with pytest.raises(RunFailed, match=r"features .*not finite.*image \d+ of stand-in"):
            probe(images, how=Sgd(epochs=1, batch_size=8))


# Going on


class Interrupted(Exception):
    """Stands for a machine that goes away."""


@pytest.mark.parametrize("protocol", ["logistic", "sgd-features", "grid-features"])
def test_an_interrupted_probe_on_features_goes_on(points, tmp_path, monkeypatch, protocol):
    monkeypatch.setattr("xdino_eval.linear.sgd.SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("xdino_eval.linear.grid.SECONDS_BETWEEN", 0.0)
    train, val = points(), points(60, seed=1)
    how = Sgd(epochs=5, batch_size=32)
    run = {
        "logistic": lambda **more: logistic_probe(
            train, val, cs=[1e-4, 1e-3, 0.01, 0.1, 1.0], **more
        ),
        "sgd-features": lambda **more: sgd_probe_features(train, val, how, **more),
        "grid-features": lambda **more: grid_probe_features(train, val, how=how, **more),
    }[protocol]
    whole = run()

    def interrupt(done: int, _: int) -> None:
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(keep_in=tmp_path, progress=interrupt)
    (left,) = tmp_path.iterdir()
    seen: list[int] = []
    parts = run(keep_in=tmp_path, progress=lambda done, _: seen.append(done))
    assert seen == [4, 5]
    assert left.exists(), "until the results are safe"
    parts.settled()
    assert not left.exists()
    assert torch.equal(whole.probe.weight, parts.probe.weight)
    assert parts.row.settings == whole.row.settings
    assert any("seconds are of" in note for note in parts.row.notes)


def test_a_disk_that_refuses_the_state_does_not_cost_the_probe(points, tmp_path, monkeypatch):
    monkeypatch.setattr("xdino_eval.linear.sgd.SECONDS_BETWEEN", 0.0)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the probe goes on, but"):
        done = sgd_probe_features(points(), points(30), HOW, keep_in=tmp_path / "file" / "below")
    assert done.row.top1 > 50


def test_features_far_from_zero_and_close_together(points, tmp_path):
    """Folded in single precision, a probe on features of 1 +- 1e-7 forgets what it learned."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    steps = torch.randint(-1, 2, (400, 192), generator=generator)
    steps[:, :20] += torch.eye(10, dtype=torch.int64).repeat(1, 2)[labels]
    near_one = (1 + steps.double() * 2.0**-23).float()  # exact in single precision
    assert len(near_one.unique()) == 4
    count = torch.arange(400)
    far, plain = (Features(x, labels, count, data="far") for x in (near_one, steps.float()))
    done = logistic_probe(far, far, cs=[0.01])
    wanted = logistic_probe(plain, plain, cs=[0.01]).row.top1
    assert done.row.top1 == pytest.approx(wanted, abs=0.5)
    assert wanted > 90
    done.probe.save(tmp_path / "p.safetensors")
    again = Probe.load(tmp_path / "p.safetensors")
    assert probes.apply(again, far).top1 == done.row.top1
