"""Linear probes: the published crops, scikit-learn itself, and problems with a known answer."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torchvision.transforms import functional as TF

from xdino.errors import RunFailed, UsageError
from xdino.runtime import rng
from xdino_eval import linear
from xdino_eval.features import Features
from xdino_eval.linear import logistic
from xdino_eval.linear.probe_augment import augment, crop_parameters
from xdino_eval.linear.sgd import OverImages, Sgd, held_out
from xdino_eval.transform import EvalTransform


@pytest.fixture
def blobs():
    """blobs(spread, labels): two splits of points around one centre a class, [N, 6]."""

    def make(spread=0.6, labels=(2, 5, 11), train=240, val=120):
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(len(labels), 6))
        splits = []
        for count in (train, val):
            which = rng.integers(len(labels), size=count)
            points = centres[which] + spread * rng.normal(size=(count, 6))
            splits.append(
                Features(
                    torch.from_numpy(points.astype(np.float32)),
                    torch.from_numpy(np.array(labels)[which]),
                    torch.arange(count),
                    data="blobs",
                    transform="none",
                )
            )
        return splits

    return make


def test_crop_is_torchvisions_on_pil():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    flips = 0
    for index in range(40):
        ours = augment(image, 32, rng.probe_image(1, 2, index))
        left, top, right, bottom = crop_parameters(50, 70, rng.probe_image(1, 2, index))
        picture = Image.fromarray(image)
        theirs = TF.resized_crop(picture, top, left, bottom - top, right - left, [32, 32])
        flipped = not np.array_equal(ours, np.asarray(theirs))
        flips += flipped
        reference = TF.hflip(theirs) if flipped else theirs
        np.testing.assert_array_equal(ours, np.asarray(reference))
    assert 8 < flips < 32


def test_crop_parameters_stay_inside_their_ranges():
    areas, aspects = [], []
    for index in range(3000):
        left, top, right, bottom = crop_parameters(200, 300, rng.probe_image(0, 0, index))
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        areas.append((right - left) * (bottom - top) / 60000)
        aspects.append((right - left) / (bottom - top))
    assert 0.075 < min(areas) < 0.1
    assert max(areas) > 0.85  # the largest often do not fit at their aspect
    assert 0.73 < min(aspects) < 0.77
    assert 1.3 < max(aspects) < 1.36
    for height, width in ((1, 400), (400, 1), (1, 1)):
        left, top, right, bottom = crop_parameters(height, width, rng.probe_image(0, 0, 0))
        assert (right > left, bottom > top) == (True, True)


def test_learning_rate_is_a_cosine_per_epoch():
    how = Sgd(epochs=10, batch_size=64, lr=0.4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    published = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0)
    for epoch in range(10):
        assert math.isclose(how.lr_at(epoch), optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        optimizer.step()
        published.step()
    with pytest.raises(ValueError, match="must be positive"):
        Sgd(epochs=0)


@pytest.mark.usefixtures("rng_untouched")
def test_sgd_on_features_separates_blobs(blobs, tmp_path):
    train, val = blobs(spread=0.15)
    how = Sgd(epochs=20, batch_size=32, lr=1.0)
    done = linear.sgd_probe_features(train, val, how)
    row = done.row
    done.probe.save(tmp_path / "head.safetensors")
    assert row.top1 > 99
    assert row.top5 == 100.0, "three classes: the true one is always among the first five"
    assert row.settings["reported"] == "last epoch"
    assert linear.sgd_probe_features(train, val, how).row.top1 == row.top1
    head = load_file(tmp_path / "head.safetensors")
    assert head["classes"].tolist() == [2, 5, 11]
    best = (val.features @ head["weight"].T + head["bias"]).argmax(1)
    assert 100 * (head["classes"][best] == val.labels).float().mean().item() == pytest.approx(
        row.top1
    )
    broken = Features(train.features * 1e30, train.labels, train.indices)
    with pytest.raises(RunFailed, match="lower its lr"):
        linear.sgd_probe_features(broken, val, Sgd(epochs=2, lr=1e30))


@pytest.mark.usefixtures("rng_untouched")
def test_sgd_probe_on_augmented_images(frozen, make_source):
    train, val = (
        make_source(30, bad=(4,), classes=3),
        make_source(18, bad=(1, 2), classes=3, seed=1),
    )
    how = Sgd(epochs=12, batch_size=8, lr=10.0)
    frozen.train()
    weights = {name: value.clone() for name, value in frozen.state_dict().items()}
    rows = [
        linear.sgd_probe(
            OverImages(frozen, train, val, EvalTransform.of(frozen), workers=workers), how
        ).row
        for workers in (1, 3)
    ]
    assert frozen.training
    assert all(torch.equal(value, weights[name]) for name, value in frozen.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert (rows[0].top1, rows[0].top5) == (rows[1].top1, rows[1].top5), "threads change nothing"
    assert rows[0].top1 > 60
    assert (rows[0].train_size, rows[0].val_size) == (29, 16)
    assert [note.split()[0] for note in rows[0].notes] == ["1", "2"]
    bare = make_source(3, labelled=False)
    with pytest.raises(UsageError, match="no labels"):
        linear.sgd_probe(OverImages(frozen, train, bare, EvalTransform.of(frozen)))


@pytest.mark.parametrize("labels", [(2, 5, 11), (0, 7), tuple(range(8))])
def test_logistic_is_scikit_learns(blobs, labels):
    train, val = blobs(labels=labels)
    row = logistic.logistic_probe(train, val, cs=[0.02]).row
    mean, std = train.features.mean(0), train.features.std(0)
    model = LogisticRegression(C=0.02, max_iter=1000)
    model.fit(((train.features - mean) / std).numpy(), train.labels.numpy())
    x_val = ((val.features - mean) / std).numpy()
    assert row.top1 == pytest.approx(100 * model.score(x_val, val.labels.numpy()))
    best = np.argsort(-model.predict_proba(x_val), axis=1)[:, :5]
    hits = (model.classes_[best] == val.labels.numpy()[:, None]).any(1)
    assert row.top5 == pytest.approx(100 * hits.mean())
    assert row.notes == []


def test_logistic_chooses_c_on_training_images_only(blobs, monkeypatch):
    train, val = blobs(spread=1.0)
    train.labels[::5] = train.labels[::5].flip(0)  # some wrong labels: C matters
    grid = (1e-9, 1e-3, 0.1, 10.0)
    row = logistic.logistic_probe(train, val, cs=grid[::-1]).row
    wrong = Features(val.features, val.labels.flip(0), val.indices)
    other = logistic.logistic_probe(train, wrong, cs=grid).row
    assert row.settings == other.settings, "the choice does not look at val"
    x = ((train.features - train.features.mean(0)) / train.features.std(0)).numpy()
    y = train.labels.numpy()
    mask = held_out(np.unique(y, return_inverse=True)[1], 0.1, 0)
    scores = [LogisticRegression(C=c).fit(x[~mask], y[~mask]).score(x[mask], y[mask]) for c in grid]
    assert row.settings["C"] == grid[int(np.argmax(scores))]
    assert row.settings["holdout_top1"] == pytest.approx(100 * max(scores), abs=1e-3)
    monkeypatch.setattr(logistic, "MAX_ITER", 1)
    hurried = logistic.logistic_probe(train, val, cs=[1.0]).row
    assert hurried.notes == ["C = 1: not converged after 1 iterations"]


def test_logistic_grids_and_refusals(blobs):
    train, val = blobs()
    assert len(logistic.GRIDS["dino"]) == 45
    assert logistic.GRIDS["dino"][0] == pytest.approx(1e-6)
    assert logistic.GRIDS["dino"][-1] == pytest.approx(1e5)
    with pytest.raises(UsageError, match='no grid "dinos"; did you mean "dino"'):
        logistic.logistic_probe(train, val, cs="dinos")
    with pytest.raises(UsageError, match="C must be positive"):
        logistic.logistic_probe(train, val, cs=[0.0, 1.0])
    with pytest.raises(UsageError, match="one class only"):
        logistic.logistic_probe(Features(train.features, train.labels * 0, train.indices), val)
    with pytest.raises(UsageError, match="between 0 and 1"):
        logistic.logistic_probe(train, val, holdout=1.0)


def test_classes_of_one_image_and_classes_that_val_alone_has(blobs):
    train, val = blobs()
    rare = Features(train.features, train.labels.clone(), train.indices)
    rare.labels[:9] = torch.arange(100, 109)
    strange = Features(val.features, val.labels.clone(), val.indices)
    strange.labels[:60] = 77
    row = logistic.logistic_probe(rare, strange, cs=[0.01, 0.1, 1.0]).row
    assert row.top1 <= row.top5 <= 50.0


def test_held_out_is_even_over_the_classes():
    classes = np.repeat([0, 1, 2], [500, 300, 7])
    mask = held_out(classes, 0.1, seed=3)
    assert [mask[classes == c].sum() for c in (0, 1)] == [50, 30]
    assert mask[classes == 2].sum() <= 1
    assert np.array_equal(mask, held_out(classes, 0.1, seed=3))
    assert not np.array_equal(mask, held_out(classes, 0.1, seed=4))
