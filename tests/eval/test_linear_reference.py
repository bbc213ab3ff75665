"""The probes against scikit-learn run directly, on digits and on Fashion-MNIST.

Logistic regression is scikit-learn's own fit: its scores come back to rounding. The SGD probe with
weight decay w minimises mean cross-entropy + w/2 (|W|^2 + |b|^2), which is strictly convex and is
scikit-learn's problem with C = 1/(w N) and the bias as a weight of a constant feature. As the cosine
takes the learning rate to 0, SGD comes to rest near the one minimum. How near is what is left of the
noise of its batches: 2 to 3 % of probability at most with batches of 64, and 1e-6 with the whole split
as one batch, which has no noise.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from xdino import data, xcit
from xdino_eval import linear
from xdino_eval.features import Features, extract
from xdino_eval.linear import logistic
from xdino_eval.linear.grid import Grid, PooledTokens, grid_probe_features, split
from xdino_eval.linear.sgd import Sgd
from xdino_eval.transform import EvalTransform


def digits() -> tuple[Features, Features]:
    """1,797 images of 8 x 8, the last 450 held out; D = 64."""
    images, labels = load_digits(return_X_y=True)
    table, target = torch.from_numpy(images.astype(np.float32) / 16), torch.from_numpy(labels)
    count = torch.arange(len(table))
    cut = slice(0, -450), slice(-450, None)
    return tuple(Features(table[c], target[c], count[c], data="digits") for c in cut)  # type: ignore[return-value]


def fashion() -> tuple[Features, Features]:
    """Class token and mean patch token of an untrained XCiT on 2,000 and 500 images; D = 64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = xcit.XCiT(patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    transform = EvalTransform(28, 28, (0.286,), (0.353,))
    found = [
        extract(PooledTokens(network, ("both",)), source, transform, 250, indices=range(count))
        for source, count in zip(data.open_splits("fashion_mnist_sample"), (2000, 500), strict=True)
    ]
    mean, std = found[0].features.mean(0), found[0].features.std(0)  # untrained: all nearly alike
    return tuple(replace(f, features=(f.features - mean) / std) for f in found)  # type: ignore[return-value]


SETS = {"digits": digits, "fashion": fashion}


@pytest.fixture(scope="module", params=SETS)
def splits(request) -> tuple[Features, Features]:
    return SETS[request.param]()


def test_logistic_probe_is_scikit_learns_fit(splits):
    train, val = splits
    done = logistic.logistic_probe(train, val, cs=[0.05])
    mean, std = train.features.mean(0), train.features.std(0)
    std[std == 0] = 1
    x, x_val = (((s.features - mean) / std).numpy() for s in splits)
    with threadpool_limits(1):  # as ours: another order of sums would stop lbfgs elsewhere
        model = LogisticRegression(C=0.05, max_iter=1000).fit(x, train.labels.numpy())
    theirs = model.predict_proba(x_val)
    ours = done.probe.scores(val.features).softmax(1).numpy()
    # Folding the standardisation into the weights moves a score by float32's rounding.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert done.row.top1 == pytest.approx(100 * model.score(x_val, val.labels.numpy()))
    assert done.row.top1 > 60


@pytest.mark.parametrize(
    ("batch", "epochs", "peak", "tolerance"), [(64, 60, 0.25, 0.05), (None, 700, 0.08, 1e-5)]
)
def test_sgd_probe_rests_at_scikit_learns_minimum(splits, batch, epochs, peak, tolerance):
    train, val = splits
    decay, batch = 0.03, batch or len(train.features)
    how = Sgd(epochs=epochs, batch_size=batch, lr=peak * 256 / batch, weight_decay=decay)
    done = linear.sgd_probe_features(train, val, how)
    x, x_val = (np.c_[s.features.double().numpy(), np.ones(len(s.features))] for s in splits)
    model = LogisticRegression(
        C=1 / (decay * len(x)), fit_intercept=False, max_iter=10_000, tol=1e-8
    ).fit(x, train.labels.numpy())
    theirs = model.predict_proba(x_val)
    ours = done.probe.scores(val.features).softmax(1).numpy()
    assert np.abs(ours - theirs).max() < tolerance
    # Only near-ties fall the other way: at most 2 % of the images, none without noise.
    limit = 0.02 if batch == 64 else 0.0
    assert (ours.argmax(1) != theirs.argmax(1)).mean() <= limit
    score = 100 * model.score(x_val, val.labels.numpy())
    assert done.row.top1 == pytest.approx(score, abs=100 * limit + 1e-9)


@pytest.mark.parametrize("cores", [1, 3])
def test_best_row_of_the_grid_is_the_same_probe_trained_alone(splits, cores, monkeypatch):
    """However many threads share the heads out. To float32's rounding, over 6 epochs of updates."""
    monkeypatch.setattr("xdino_eval.linear.stacked_heads.THREAD_PAYS", 1.0)
    train, val = splits
    how = Sgd(epochs=6, batch_size=64)
    grid = Grid(weight_decays=(0.0, 1e-3))
    done = grid_probe_features(train, val, grid, how, cores=cores)
    chosen = done.row.settings
    classes = np.unique(train.labels.numpy(), return_inverse=True)[1]
    kept, _ = split(classes, grid, how.seed)
    part = Features(train.features[kept], train.labels[kept], train.indices[kept], data="part")
    same = Sgd(epochs=6, batch_size=64, lr=chosen["lr"], weight_decay=chosen["weight_decay"])
    alone = linear.sgd_probe_features(part, val, same)
    scale = alone.probe.weight.abs().max().item()
    torch.testing.assert_close(done.probe.weight, alone.probe.weight, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(done.probe.bias, alone.probe.bias, rtol=0, atol=1e-5 * scale)
    assert (done.row.top1, done.row.top5) == (alone.row.top1, alone.row.top5)
