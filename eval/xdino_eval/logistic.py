"""Logistic regression on features extracted once.

The newer practice beside the SGD probe (DINOv2, https://arxiv.org/abs/2304.07193, appendix B.3):
L2-regularised, by scikit-learn, its strength chosen on images held out of the training split.

Letters: N images, D width, K classes.
"""

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from xdino.errors import UsageError, nearest
from xdino_eval.accuracy import class_indices, ranks, top1_top5
from xdino_eval.features import Features
from xdino_eval.knn import labels_of, row_of
from xdino_eval.linear import THREADS_PAY, held_out, small_products_alone
from xdino_eval.results import Row

GRIDS = {
    "default": tuple(10.0 ** np.linspace(-4, 2, 7)),
    "dino": tuple(10.0 ** np.linspace(-6, 5, 45)),
}
"""Inverse strengths of the regularisation. "dino" is DINOv2's; the other takes a sixth of it."""

MAX_ITER = 1000  # of L-BFGS


def logistic_probe(
    train: Features,
    val: Features,
    cs: str | Sequence[float] = "default",
    holdout: float = 0.1,
    seed: int = 0,
) -> Row:
    """Logistic regression; C from a held-out part of `train`; `val` is scored once, at the end.

    Features are standardised by the mean and standard deviation of `train` (without it L-BFGS
    takes many times the iterations), and the chosen C, the smallest of equals, is fitted again on
    all of `train`.

    Args:
        cs: inverse strengths of the regularisation, or a name in `GRIDS`.
        holdout: the fraction of `train` that chooses among them, taken evenly from every class.

    Raises:
        UsageError: a split without labels, fewer than two classes, or a grid or a fraction that
            makes no sense.
    """
    began = time.perf_counter()
    grid = _grid(cs)
    if not 0 < holdout < 1:
        raise UsageError(f"holdout must lie between 0 and 1, got {holdout}")
    classes, train_class, val_class = class_indices(
        labels_of(train).numpy(), labels_of(val).numpy()
    )
    if len(classes) < 2:
        raise UsageError(f"{train.data} has one class only: there is nothing to tell apart")
    mean, std = train.features.mean(0), train.features.std(0)
    std = torch.where(std > 0, std, 1.0)
    x_train = ((train.features - mean) / std).numpy()
    x_val = ((val.features - mean) / std).numpy()

    held = held_out(train_class, holdout, seed)
    notes: list[str] = []
    chosen, held_top1 = grid[0], None
    if len(grid) > 1:
        models = _fits(x_train[~held], train_class[~held], grid, notes)
        scores = [_logistic_score(m, x_train[held], train_class[held])[0] for m in models]
        chosen, held_top1 = grid[int(np.argmax(scores))], round(max(scores), 4)
        if chosen in (grid[0], grid[-1]):
            notes.append(f"C = {chosen:g} is an end of the grid")
    (model,) = _fits(x_train, train_class, [chosen], notes)
    score = _logistic_score(model, x_val, val_class)
    settings = {
        "C": chosen,
        "cs": list(grid),
        "holdout": holdout,
        "holdout_top1": held_top1,
        "features": "standardised by train mean and standard deviation",
        "solver": f"lbfgs, at most {MAX_ITER} iterations",
        "seed": seed,
    }
    seconds = time.perf_counter() - began
    return row_of("linear, logistic regression", settings, score, train, val, seconds, notes)


def _grid(cs: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(cs, str) and cs not in GRIDS:
        raise UsageError(f'no grid "{cs}"; {nearest(cs, GRIDS)}')
    grid = tuple(sorted(float(c) for c in (GRIDS[cs] if isinstance(cs, str) else cs)))
    if not grid or not grid[0] > 0:
        raise UsageError(f"C must be positive, got {list(grid)}")
    return grid


def _fits(
    x: np.ndarray, y: np.ndarray, grid: Sequence[float], notes: list[str]
) -> list[LogisticRegression]:
    """One model a value of C, small ones side by side; those that did not converge are noted."""
    multiplications = x.size * (int(y.max()) + 1)
    workers = os.cpu_count() if multiplications < THREADS_PAY else 1
    models = [LogisticRegression(C=c, max_iter=MAX_ITER) for c in grid]
    with (
        warnings.catch_warnings(),
        small_products_alone(multiplications),
        ThreadPoolExecutor(workers) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        list(pool.map(lambda model: model.fit(x, y), models))
    notes += [
        f"C = {model.C:g}: not converged after {MAX_ITER} iterations"
        for model in models
        if model.n_iter_.max() >= MAX_ITER
    ]
    return models


def _logistic_score(
    model: LogisticRegression, x: np.ndarray, target: np.ndarray
) -> tuple[float, float]:
    logits = model.decision_function(x)  # [N, K]; of two classes, [N] for the second
    if logits.ndim == 1:
        logits = np.stack([np.zeros_like(logits), logits], axis=1)
    # A class that the fit never saw, because all of it is held out, is never a prediction.
    scores = np.full((len(x), int(max(model.classes_.max(), target.max())) + 1), -np.inf)
    scores[:, model.classes_] = logits
    return top1_top5(ranks(torch.from_numpy(scores), torch.from_numpy(target)))
